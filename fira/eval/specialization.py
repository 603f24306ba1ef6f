"""Do experts specialize? Two measures, each with a control.

Token information, per layer: the mutual information between a token's identity and the expert that
processes it, as a fraction of the entropy of the expert load. At 0 an expert gets any token, at 1
the token alone decides the expert. Few tokens show some information by chance, so the same is
computed with the assignments shuffled within each batch, and subtracted.

Expert exchange: bits per byte when every token is processed by its expert's neighbor (e + 1 in the
place of e) with unchanged router weights. If experts were interchangeable it would not change.
"""
from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fira.data.sources import inputs
from fira.data.text import items
from fira.eval.bits_per_byte import bits_per_byte, windows
from fira.eval.score import TreeBatch, batches, make_tree
from fira.infer.load import load
from fira.model.generate import window_length
from fira.model.moe import MoE
from fira.model.router import Watch, routers

BATCH_TOKENS = 8192
TOKENS = 1_000_000  # of the text's beginning; more does not change a digit that is shown


@torch.inference_mode()
def specialization(run: str | Path, sources: list[str], device: str = "auto",
                   adapter: Path | None = None) -> dict[str, Any]:
    """`token_information` per layer, and bits per byte with experts in place and exchanged.

    Raises ValueError for a dense model or an empty text.
    """
    model, tokenizer, folder = load(run, device, adapter)
    if not routers(model):
        raise ValueError(f"{folder} is dense: it has no routing to measure; leave out --routing")
    parts = list(read_tokens(tokenizer, sources, TOKENS))
    sizes = torch.tensor([len(text) for text in tokenizer.token_bytes()])
    size = sum(int(sizes[ids].sum()) for ids, _ in parts if ids)
    if size == 0:
        raise ValueError("the text is empty, nothing to route; give a file with text in it")
    trees = [make_tree([window]) for window in windows(parts, window_length(model),
                                                       tokenizer.end_of_text)]
    given = [TreeBatch([trees[number] for number in numbers], model) for numbers in batches(
        {number: len(tree.tokens) for number, tree in enumerate(trees)}, BATCH_TOKENS)]
    nats, read, experts = 0.0, [], []
    with Watch(model) as watch:
        for batch in given:
            nats += batch.costs(model)[:, 0].sum()
            read.append(batch.tokens_N[batch.places_P].cpu())
            experts.append([experts_NK[batch.places_P].cpu() for experts_NK in watch.experts
                            if experts_NK is not None])
    with _exchanged(model):
        exchanged = sum(batch.costs(model)[:, 0].sum() for batch in given)
    tokens_N = torch.cat(read)
    return {"tokens": len(tokens_N), "bits_per_byte": bits_per_byte(nats, size),
            "bits_per_byte_experts_exchanged": bits_per_byte(exchanged, size),
            "token_information": [_above_chance(tokens_N, layer, model.spec.num_experts)
                                  for layer in zip(*experts, strict=True)]}


def information(tokens_N: Tensor, experts_NK: Tensor, num_experts: int) -> float:
    """Mutual information of token and expert over the entropy of the expert, 0..1."""
    K = experts_NK.shape[1]
    _, place_N = tokens_N.unique(return_inverse=True)
    flat_R = place_N.repeat_interleave(K) * num_experts + experts_NK.flatten()
    cells = (int(place_N.max()) + 1) * num_experts
    joint_UE = torch.bincount(flat_R.cpu(), minlength=cells).double()
    joint_UE = (joint_UE / joint_UE.sum()).view(-1, num_experts)
    load_E, token_U = joint_UE.sum(0), joint_UE.sum(1)
    entropy = -torch.special.xlogy(load_E, load_E).sum()
    shared = (torch.special.xlogy(joint_UE, joint_UE).sum()
              - torch.special.xlogy(token_U, token_U).sum() + entropy)
    return float(shared / entropy) if entropy > 0 else 0.0


def _above_chance(tokens_N: Tensor, batches_NK: tuple[Tensor, ...],
                  num_experts: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    shuffled = [experts_NK[torch.randperm(len(experts_NK), generator=generator)]
                for experts_NK in batches_NK]
    real, chance = (information(tokens_N, torch.cat(list(rows)), num_experts)
                    for rows in (batches_NK, shuffled))
    return {"information": real, "by_chance": chance, "above_chance": real - chance}


def read_tokens(tokenizer: Any, sources: Sequence[str], limit: int
                ) -> Iterator[tuple[list[int], bool]]:
    """The first `limit` tokens of the text, as `windows` takes them."""
    left = limit
    for item in items(inputs(sources)):
        ids = tokenizer.encode(item.text)[:left]
        left -= len(ids)
        yield ids, item.ends or not left
        if not left:
            return


@contextlib.contextmanager
def _exchanged(model: Any) -> Iterator[None]:
    """Give every expert its neighbor's weights, and put them back."""
    weights = [weight for module in model.modules() if isinstance(module, MoE)
               for weight in module.experts.state_dict().values()]  # [E, ...], in shared memory

    for weight in weights:
        weight.copy_(weight.roll(-1, dims=0))
    try:
        yield
    finally:
        for weight in weights:
            weight.copy_(weight.roll(1, dims=0))
