"""Initial weights: a function of the seed and of each parameter's name, and of nothing else.

Every parameter, and every single expert of a stack, has a generator of its own. So a rank that
holds only some of them makes exactly those, and the model is the same however it is divided.
"""
from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fira.model.spec import FIRA2Spec

STD = 0.02  # standard deviation of initial weights, GPT-2's
# Shares of the fastest rotary frequencies in a score of `look_back`: its peak is one position wide.
LOOK_BACK_SHARES = 0.5, 0.35, 0.15


class TensorSlice(NamedTuple):
    """Rows start .. start + len(rows) of a tensor of `shape`, along its first axis."""

    name: str
    rows: Tensor
    start: int
    shape: tuple[int, ...]


def whole(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[TensorSlice]:
    """Slices that are all of their tensors: a model on one device."""
    for name, tensor in tensors:
        yield TensorSlice(name, tensor, 0, tuple(tensor.shape))


@torch.no_grad()
def initialize(model: nn.Module, seed: int | None = None,
               slices: Iterable[TensorSlice] | None = None) -> None:
    """Fill every parameter and buffer of `model` in place; `slices` are its parameters, if divided.

    Normal with STD; matrices that write into the residual stream (`output`, `down`) get
    STD / sqrt(2L), so that its variance does not grow with depth (GPT-2); biases 0, norms 1. A
    module's `initial_std(leaf_name)`, where it has one that returns a number, decides about its
    own parameters. The model's `initial_offsets`, by name, are added. Without a seed one is drawn
    from torch's global state. Nothing happens on the meta device.
    """
    if next(model.parameters()).is_meta:
        return
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    offsets = getattr(model, "initial_offsets", {})
    for part in whole(model.named_parameters()) if slices is None else slices:
        std = _initial_std(model, part.name)
        if std is None:
            part.rows.fill_(0 if part.name.endswith("bias") else 1)
        else:
            _draw(part, std, seed)
        if part.name in offsets:
            end = part.start + len(part.rows)
            part.rows.add_(offsets[part.name][part.start:end].to(part.rows.device))
    reset_buffers(model)


def _initial_std(model: nn.Module, name: str) -> float | None:
    """The standard deviation of a parameter; None for biases and norms, which are constant."""
    path, _, leaf = name.rpartition(".")
    rule = getattr(model.get_submodule(path), "initial_std", None)
    std = None if rule is None else rule(leaf)
    module = path.rpartition(".")[2]
    if std is not None or leaf == "bias" or module.endswith("norm"):
        return std
    num_layers: int = getattr(getattr(model, "spec", None), "num_layers", 1)
    return STD / (math.sqrt(2 * num_layers) if module in ("output", "down") else 1)


def _draw(part: TensorSlice, std: float, seed: int) -> None:
    """Normal numbers: drawn on the CPU, so that every device gets the same."""
    if ".experts." in part.name:
        for row, tensor in enumerate(part.rows, start=part.start):
            tensor.copy_(_normal(part.shape[1:], std, f"{seed}/{part.name}/{row}"))
    elif len(part.rows):
        drawn = _normal(part.shape, std, f"{seed}/{part.name}")
        part.rows.copy_(drawn[part.start:part.start + len(part.rows)])


def _normal(shape: tuple[int, ...], std: float, key: str) -> Tensor:
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    return torch.empty(shape, device="cpu").normal_(0, std, generator=generator)


def reset_buffers(model: nn.Module) -> None:
    """Recompute what is not a weight: rotary tables, load shares, counters."""
    for module in model.modules():
        reset = getattr(module, "reset_buffers", None)
        if reset is not None:
            reset()


def look_back(spec: FIRA2Spec) -> dict[str, Tensor]:
    """Offsets of initial weights with which head h of the first group attends h + 1 tokens back.

    In-context copying takes two layers, of which the first tells each token what came before it
    (Olsson et al. 2022). Such a head depends on positions only, so it needs a direction that all
    tokens share: every embedding begins with a common component, from which the first group of
    heads makes equal queries and keys, rotated against each other by as many positions as its head
    is to look back. Training may change all of it.
    """
    common = torch.zeros(1, spec.d_model)
    common[:, 0] = 1.0
    sizes = torch.tensor(LOOK_BACK_SHARES[:spec.head_dim // 2]).sqrt()
    frequencies = spec.rope_theta ** (-2 / spec.head_dim * torch.arange(len(sizes)))
    qkv = torch.zeros(spec.n_head + 2 * spec.n_kv_head, 2, spec.head_dim // 2, spec.d_model)
    for head in range(spec.n_head // spec.n_kv_head):
        angles = frequencies * (head + 1)
        qkv[head, 0, :len(sizes), 0] = sizes * angles.cos()
        qkv[head, 1, :len(sizes), 0] = -sizes * angles.sin()
    qkv[spec.n_head, 0, :len(sizes), 0] = sizes
    return {"token_embedding.weight": common.expand(spec.vocab_size, -1),
            "blocks.0.attention.qkv.weight": qkv.flatten(0, 2)}
