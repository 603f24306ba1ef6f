"""The optimizer: which parameter gets which rule and rate, in one table."""
from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import nn

from fira.config import Config
from fira.model.moe import routers
from fira.parallel.shard import local
from fira.train.follow import follow
from fira.train.muon import MuonAdamW

BETAS = 0.9, 0.95  # decay of the averages of gradients and of their squares, as GPT-3's


class OptimConfig(Config):
    rule: Literal["adamw", "muon"] = Field("adamw", description="for matrices; the rest is AdamW")
    lr: float = Field(6e-4, gt=0, description="peak learning rate")
    router_lr: float | None = Field(None, gt=0, description="peak rate of routers; null follows lr")
    embedding_lr: float | None = Field(
        None, gt=0, description="peak rate of embeddings; null follows lr")
    head_follows: float = Field(
        0.0, ge=0, description="how far an untied head goes along with the embedding, turned by a "
        "quarter; makes copying easy to learn")
    turns: int = Field(1, ge=1, description="Muon moves each expert in one of so many steps, at as "
                       "many times the rate")
    weight_decay: float = Field(0.1, ge=0, description="decoupled weight decay of matrices")
    clip: float = Field(1.0, gt=0, description="largest global gradient norm")


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict]:
    """Matrices decay, embeddings and head too; norms, biases and routers do not."""
    rules: dict[str, dict] = {
        "matrix": {"rule": config.rule, "lr": config.lr, "weight_decay": config.weight_decay,
                   "turns": config.turns if routers(model) else 1},  # a dense model has one expert
        "embedding": {"rule": "adamw", "lr": config.embedding_lr or config.lr,
                      "weight_decay": config.weight_decay},
        "head": {"rule": "adamw", "lr": config.lr, "weight_decay": config.weight_decay},
        "vector": {"rule": "adamw", "lr": config.lr, "weight_decay": 0.0},
        "router": {"rule": "adamw", "lr": config.router_lr or config.lr, "weight_decay": 0.0},
    }
    members: dict[str, list[nn.Parameter]] = {kind: [] for kind in rules}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
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


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW, fused where there is such a kernel (on CPU 3-8 times the foreach form), or Muon."""
    groups = parameter_groups(model, config)
    sharded = any(local(p) is not p for p in model.parameters())
    optimizer: torch.optim.Optimizer
    if config.rule == "muon" or sharded:
        optimizer = MuonAdamW(groups, BETAS)
    else:
        fused = next(model.parameters()).device.type in ("cpu", "cuda")
        optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=BETAS, fused=fused)
    if config.head_follows:
        weights = dict(model.named_parameters())
        follow(optimizer, weights["token_embedding.weight"], weights["head.weight"],
               config.head_follows)
    return optimizer


def set_step(optimizer: torch.optim.Optimizer, step: int, factor: float) -> None:
    """Before step `step`: every group at `factor` of its peak rate."""
    for group in optimizer.param_groups:
        group["step"] = step
        group["lr"] = group["peak_lr"] * factor
