"""Do experts specialize? What an expert is told apart by, measured against shuffled routing.

Diet, per layer: mutual information between a token's identity and the expert that gets it, in bits,
as a share of the entropy of the experts' load. Few tokens would show information by chance, so the
same is computed with the assignments shuffled within each batch, and subtracted. 0: an expert
gets any token; 1: the token alone decides.

Skill: bits per byte when every token goes to its expert's neighbor instead (e -> e + 1), with the
weights left alone. If experts were interchangeable nothing would change.
"""
from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fira.data.sources import inputs
from fira.data.text import items
from fira.infer.load import load
from fira.loss.head import head_token_losses
from fira.model.generate import window_length
from fira.model.router import routers

ROWS = 8              # windows at a time: the batch within which routing is shuffled
TOKENS = 1_000_000    # of the text's beginning; more changes no digit that is shown


@torch.inference_mode()
def specialization(run: str, sources: list[str], device: str = "auto") -> dict[str, Any]:
    """`diet` per layer, bits per byte, and the same with experts exchanged, of a run's newest step.

    Windows do not overlap, so bits per byte is a little above `fira eval`'s. Raises ValueError for
    a dense model or a text of fewer than two tokens.
    """
    model, tokenizer, folder = load(run, device)
    if not routers(model):
        raise ValueError(f"{folder} is dense: it has no routing to measure; leave out --routing")
    ids: list[int] = [tokenizer.end_of_text]
    for item in items(inputs(sources)):
        ids += [*tokenizer.encode(item.text), *([tokenizer.end_of_text] if item.ends else [])]
        if len(ids) > TOKENS:
            break
    sizes = torch.tensor([len(piece) for piece in tokenizer.token_bytes()])
    if int(sizes[ids].sum()) == 0:
        raise ValueError("the text is empty, nothing to route; give a file with text in it")
    batches = list(_batches(torch.tensor(ids[:TOKENS]), window_length(model)))
    plain, diet = _pass(model, batches, sizes, exchanged=False)
    exchanged, _ = _pass(model, batches, sizes, exchanged=True)
    return {"tokens": len(ids[:TOKENS]), "diet": diet, "bits_per_byte": plain,
            "bits_per_byte_experts_exchanged": exchanged}


def information(tokens_N: Tensor, experts_NK: Tensor, num_experts: int) -> float:
    """Mutual information of token and expert over the entropy of the expert, 0..1."""
    K = experts_NK.shape[1]
    _, place_N = tokens_N.unique(return_inverse=True)
    flat_R = place_N.repeat_interleave(K) * num_experts + experts_NK.flatten()
    joint_UE = torch.bincount(flat_R, minlength=(int(place_N.max()) + 1) * num_experts).double()
    joint_UE = (joint_UE / joint_UE.sum()).view(-1, num_experts)
    load_E, token_U = joint_UE.sum(0), joint_UE.sum(1)
    entropy = -torch.special.xlogy(load_E, load_E).sum()
    known = (torch.special.xlogy(joint_UE, joint_UE).sum()
             - torch.special.xlogy(token_U, token_U).sum() + entropy)
    return float(known / entropy) if entropy > 0 else 0.0


def _batches(ids: Tensor, context: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows that follow each other, ROWS at a time; a text below one window is one window."""
    length = min(context, len(ids) - 1)
    windows = (len(ids) - 1) // length
    tokens_WT = ids[:windows * length].view(windows, length)
    targets_WT = ids[1:windows * length + 1].view(windows, length)
    yield from zip(tokens_WT.split(ROWS), targets_WT.split(ROWS), strict=True)


def _pass(model: Any, batches: list[tuple[Tensor, Tensor]], sizes: Tensor,
          exchanged: bool) -> tuple[float, list[dict[str, float]]]:
    """Bits per byte of the batches, and the diet of every layer."""
    found, device = routers(model), next(model.parameters()).device
    seen: list[list[Tensor]] = [[] for _ in found]
    nats = 0.0
    with _routing(found, seen, exchanged):
        for tokens_BT, targets_BT in batches:
            losses_BT = model(tokens_BT.to(device), targets_BT=targets_BT.to(device),
                              loss=head_token_losses)
            nats += float(losses_BT.double()[(sizes[targets_BT] > 0).to(device)].sum())
    size = sum(int(sizes[targets_BT].sum()) for _, targets_BT in batches)
    tokens_N = torch.cat([tokens_BT.flatten() for tokens_BT, _ in batches])
    diet = [] if exchanged else [_diet(tokens_N, parts, model.spec.num_experts) for parts in seen]
    return nats / math.log(2) / size, diet


def _diet(tokens_N: Tensor, parts: list[Tensor], num_experts: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    shuffled = [part[torch.randperm(len(part), generator=generator)] for part in parts]
    real, chance = (information(tokens_N, torch.cat(rows), num_experts)
                    for rows in (parts, shuffled))
    return {"information": real, "shuffled": chance, "own": real - chance}


@contextlib.contextmanager
def _routing(found: list[Any], seen: list[list[Tensor]], exchanged: bool) -> Iterator[None]:
    """Note the experts of every layer, exchanging each for its neighbor if asked to."""
    def hook(module: Any, _: Any, out: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        weights_NK, experts_NK = out
        seen[found.index(module)].append(experts_NK.cpu())
        E = len(module.weight)
        return weights_NK, (experts_NK + 1) % E if exchanged else experts_NK

    handles = [router.register_forward_hook(hook) for router in found]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
