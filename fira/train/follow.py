"""A head that follows the embedding: between one that is tied to it and one that is not.

To copy a token from further up, attention must carry its embedding to its row of the head. With a
tied head that is easy to learn, for both are the same, but then every token also predicts itself.
With a head of its own, embedding and head have nothing in common, and copying (by the induction
heads of Olsson et al. 2022) is learned very late. Here the head is

    head = strength * turned(embedding) + what it learns for itself

where `turned` is a quarter turn, so that what it takes over is orthogonal to the token's own
embedding. The model is not changed by this and knows nothing of it: only how its two matrices move.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fira.parallel.shard import local


def follow(optimizer: torch.optim.Optimizer, embedding: nn.Parameter, head: nn.Parameter,
           strength: float) -> None:
    """Let every step of `optimizer` that moves `embedding` [V, D] move `head` [V, D] with it.

    The embedding also gets the gradient of what follows it. Nothing is kept from step to step. The
    rows of sharded weights are the same ones of both.
    """
    before: list[Tensor] = []

    def gather(*_: Any) -> None:
        assert embedding.grad is not None and head.grad is not None
        followed = turned_back(local(head.grad)).to(embedding.device)
        local(embedding.grad).add_(followed, alpha=strength)
        before.append(local(embedding).detach().clone())

    @torch.no_grad()
    def move(*_: Any) -> None:
        moved = local(embedding) - before.pop()
        local(head).add_(turned(moved).to(head.device), alpha=strength)

    optimizer.register_step_pre_hook(gather)
    optimizer.register_step_post_hook(move)


def turned(rows: Tensor) -> Tensor:
    """(a, b) -> (-b, a), of the halves of every row: a quarter turn."""
    half = rows.shape[-1] // 2
    return torch.cat([-rows[..., half:], rows[..., :half]], dim=-1)


def turned_back(rows: Tensor) -> Tensor:
    """The inverse of `turned`, which is also its transpose."""
    half = rows.shape[-1] - rows.shape[-1] // 2
    return torch.cat([rows[..., half:], -rows[..., :half]], dim=-1)
