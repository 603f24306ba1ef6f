"""How large a model is and what a token costs it, from its shapes alone."""
from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from fira.model.files import build_meta

PARTS = ("token embedding", "positions", "attention", "router", "experts", "norms", "head")


@dataclass(frozen=True)
class Row:
    """One part of a model: parameters it has, and those that one token passes through."""

    part: str
    total: int
    active: int


@dataclass(frozen=True)
class Count:
    """`rows` by part, their sums, and floating-point operations per token in training."""

    rows: tuple[Row, ...]
    total: int
    active: int
    flops_per_token: int


def count_parameters(spec: Any, sequence_length: int | None = None) -> Count:
    """Count `spec` at `sequence_length` (its context if None).

    A token reads one row of an embedding, but by custom the whole embedding counts as active; of
    the experts, the top_k it is sent to. FLOPs are those of one token forward and backward, two
    per multiply-add: 6 per active matrix weight (the head's too when tied) and, per layer,
    6 * T * H * C for causal attention, which reads T/2 positions on average.
    """
    totals = dict.fromkeys(PARTS, 0)
    matrices = 0
    share = spec.top_k / spec.num_experts
    for name, parameter in build_meta(spec).named_parameters():
        part, size = _part(name), prod(parameter.shape)
        totals[part] += size
        if name.endswith("weight") and part in ("attention", "router", "experts", "head"):
            matrices += round(size * share) if part == "experts" else size
    if not totals["head"]:  # tied
        matrices += totals["token embedding"]
    rows = tuple(Row(part, size, round(size * share) if part == "experts" else size)
                 for part, size in totals.items() if size)
    width = spec.n_head * spec.head_dim
    attention = 6 * spec.num_layers * width * (sequence_length or spec.context)
    return Count(rows, sum(row.total for row in rows), sum(row.active for row in rows),
                 6 * matrices + attention)


def _part(name: str) -> str:
    parts = name.split(".")
    if parts[-2].endswith("norm"):
        return "norms"
    found = [label for label in PARTS if label in parts]
    return found[0] if found else {"token_embedding": "token embedding",
                                   "position_embedding": "positions"}[parts[0]]
