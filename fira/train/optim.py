"""The optimizer: which parameter gets which rule and learning rate, and when a step is skipped."""
from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fira.config import Config
from fira.model.router import routers
from fira.parallel.layout import local
from fira.train.muon import MuonAdamW

BETAS = 0.9, 0.95  # decay of the averages of gradients and of their squares, as in GPT-3
WEIGHT_DECAY = 0.1  # decoupled, of matrices only; GPT-3's, and the same in every preset
MAX_NORM = 1.0  # gradients of a larger global norm are scaled down to it; GPT-3's


class OptimConfig(Config):
    rule: Literal["adamw", "muon"] = Field(
        "adamw", description="optimizer of matrices; all other parameters use AdamW")
    lr: float = Field(6e-4, gt=0, description="peak learning rate")
    router_lr: float | None = Field(
        None, gt=0, description="peak learning rate of routers; null takes lr")
    embedding_lr: float | None = Field(
        None, gt=0, description="peak learning rate of embeddings; null takes lr")
    head_follows: float = Field(
        0.0, ge=0, description="an untied head also moves by this factor times the embedding's "
        "update, rotated by a quarter turn; copying is then learned early (docs/decisions/0009)")
    expert_interval: int = Field(
        1, ge=1, description="Muon updates each expert only every N-th step, with N times the "
        "learning rate: the same progress for an N-th of the optimizer's time")


def parameter_groups(model: nn.Module, config: OptimConfig,
                     weight_decay: float = WEIGHT_DECAY) -> list[dict[str, Any]]:
    """The trainable parameters by rule. Matrices decay, embeddings and head too; norms, biases and
    routers do not."""
    interval = config.expert_interval if routers(model) else 1  # a dense model has one expert
    rules: dict[str, dict[str, Any]] = {
        "matrix": {"rule": config.rule, "lr": config.lr, "weight_decay": weight_decay,
                   "interval": interval},
        "embedding": {"rule": "adamw", "lr": config.embedding_lr or config.lr,
                      "weight_decay": weight_decay},
        "head": {"rule": "adamw", "lr": config.lr, "weight_decay": weight_decay},
        "vector": {"rule": "adamw", "lr": config.lr, "weight_decay": 0.0},
        "router": {"rule": "adamw", "lr": config.router_lr or config.lr, "weight_decay": 0.0},
    }
    members: dict[str, list[nn.Parameter]] = {kind: [] for kind in rules}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[_kind(name, parameter)].append(parameter)
    return [{"params": members[kind], "kind": kind, "peak_lr": rule["lr"], **rule}
            for kind, rule in rules.items() if members[kind]]


def _kind(name: str, parameter: nn.Parameter) -> str:
    if ".router." in name:
        return "router"
    if parameter.dim() < (3 if ".experts." in name else 2):  # expert biases are [E, out]
        return "vector"
    if name.startswith("head"):
        return "head"
    return "embedding" if "embedding" in name else "matrix"


def make_optimizer(model: nn.Module, config: OptimConfig,
                   weight_decay: float = WEIGHT_DECAY) -> torch.optim.Optimizer:
    """AdamW, fused where such a kernel exists (on a CPU 3 to 8 times as fast as the foreach form),
    or Muon. Raises ValueError if the model has no trainable parameter."""
    groups = parameter_groups(model, config, weight_decay)
    if not groups:
        raise ValueError("no parameter of the model is trainable; unfreeze some")
    sharded = any(local(p) is not p for p in model.parameters())
    optimizer: torch.optim.Optimizer
    if config.rule == "muon" or sharded:
        optimizer = MuonAdamW(groups, BETAS)
    else:
        fused = next(model.parameters()).device.type in ("cpu", "cuda")
        optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=BETAS, fused=fused)
    if config.head_follows:
        weights = dict(model.named_parameters())
        follow_embedding(optimizer, weights["token_embedding.weight"], weights["head.weight"],
                         config.head_follows)
    return optimizer


def set_rates(optimizer: torch.optim.Optimizer, step: int, factor: float) -> None:
    """Give every group `factor` of its peak learning rate, for step number `step`."""
    for group in optimizer.param_groups:
        group["step"] = step
        group["lr"] = group["peak_lr"] * factor


def update(optimizer: torch.optim.Optimizer, loss: float, norm: float,
           max_norm: float = MAX_NORM) -> bool:
    """Clip the gradients, whose global norm is `norm`, and take one step; says whether it did.

    A loss or norm that is not finite skips the step: weights and optimizer state stay as they were.
    Both are global, so that all ranks skip together. The gradients are gone afterwards.
    """
    finite = math.isfinite(norm) and math.isfinite(loss)
    if finite:
        scale = min(1.0, max_norm / (norm + 1e-6))
        if scale != 1.0:
            torch._foreach_mul_([local(p.grad) for group in optimizer.param_groups
                                 for p in group["params"] if p.grad is not None], scale)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return finite


def follow_embedding(optimizer: torch.optim.Optimizer, embedding: nn.Parameter,
                     head: nn.Parameter, strength: float) -> None:
    """Train head = strength * rotated(embedding) + rest, where only the sum is stored.

    To copy an earlier token, attention must carry its embedding to its row of the head. A tied head
    makes that easy, but then every token also predicts itself; with a head of its own, embedding
    and head have nothing in common, and copying (by the induction heads of Olsson et al. 2022) is
    learned very late. Rotated by a quarter turn, the part that follows is orthogonal to the token's
    own embedding. By the chain rule the embedding [V, D] receives strength * rotated^-1(dL/dhead)
    in addition to its own gradient, and each of its updates moves the head [V, D] by strength *
    rotated(update). Nothing is kept between steps; sharded weights hold the same rows of both.
    """
    before: list[Tensor] = []

    def add_gradient(*_: Any) -> None:
        assert embedding.grad is not None and head.grad is not None
        followed = rotated_back(local(head.grad)).to(embedding.device)
        local(embedding.grad).add_(followed, alpha=strength)
        before.append(local(embedding).detach().clone())

    @torch.no_grad()
    def move_head(*_: Any) -> None:
        moved = local(embedding) - before.pop()
        local(head).add_(rotated(moved).to(head.device), alpha=strength)

    optimizer.register_step_pre_hook(add_gradient)
    optimizer.register_step_post_hook(move_head)


def rotated(rows: Tensor) -> Tensor:
    """(a, b) -> (-b, a) for the halves of every row."""
    half = rows.shape[-1] // 2
    return torch.cat([-rows[..., half:], rows[..., :half]], dim=-1)


def rotated_back(rows: Tensor) -> Tensor:
    """The inverse of `rotated`, which is also its transpose."""
    half = rows.shape[-1] - rows.shape[-1] // 2
    return torch.cat([rows[..., half:], -rows[..., :half]], dim=-1)
