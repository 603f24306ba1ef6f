"""Initial weights: a function of the seed and of each parameter's name, and of nothing else.

Every parameter, and every single expert of a stack, has a generator of its own. So a machine that
holds only some of them makes exactly those, and the model is the same however it is cut.
"""
from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


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
    """Fill every parameter and buffer of `model` in place; `slices` are its parameters, if cut.

    Normal with `std`; matrices that write into the residual stream (`output`, `down`) get
    std / sqrt(2L), so that its variance does not grow with depth (GPT-2); biases 0, norms 1.
    What the model has as its `prior`, by name, is added. Without a seed one is drawn from torch's
    global state.
    """
    if next(model.parameters()).is_meta:
        return
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    prior = getattr(model, "prior", {})
    spec: Any = getattr(model, "spec", None)
    std, num_layers = getattr(spec, "init_std", 0.5), getattr(spec, "num_layers", 1)
    for piece in whole(model.named_parameters()) if slices is None else slices:
        module = piece.name.split(".")[-2]
        if piece.name.endswith("bias"):
            piece.rows.zero_()
        elif module.endswith("norm"):
            piece.rows.fill_(1)
        else:
            scale = math.sqrt(2 * num_layers) if module in ("output", "down") else 1
            _draw(piece, std / scale, seed)
        if piece.name in prior:
            end = piece.start + len(piece.rows)
            piece.rows.add_(prior[piece.name][piece.start:end].to(piece.rows.device))
    reset_buffers(model)


def _draw(piece: TensorSlice, std: float, seed: int) -> None:
    """Normal numbers: drawn on the CPU, so that every device gets the same."""
    if ".experts." in piece.name:
        for row, tensor in enumerate(piece.rows, start=piece.start):
            tensor.copy_(_normal(piece.shape[1:], std, f"{seed}/{piece.name}/{row}"))
    elif len(piece.rows):
        drawn = _normal(piece.shape, std, f"{seed}/{piece.name}")
        piece.rows.copy_(drawn[piece.start:piece.start + len(piece.rows)])


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
