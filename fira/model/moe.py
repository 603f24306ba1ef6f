"""The Mixture-of-Experts layer: route, scatter rows to experts, apply them, gather back.

Dropless: every token reaches all K experts it chose. Nothing here depends on scheduling, so that
training repeats to the bit.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fira.model.balance import bias_strength
from fira.model.experts import multiplied
from fira.model.router import Router, end_steps
from fira.model.rows import Gather, Scatter, sort_by_expert


def apply_here(experts: nn.Module, rows_RD: Tensor, counts_E: Tensor) -> Tensor:
    """The plain dispatch: every expert is on this device."""
    return experts(rows_RD, counts_E)


class MoE(nn.Module):
    """x_BTD -> x_BTD through the K experts its router chooses for each token."""

    def __init__(self, router: Router, experts: nn.Module) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.dispatch: Callable[..., Tensor] = apply_here

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        weights_NK, experts_NK = self.router(x_ND)
        order_R, inverse_R, counts_E = sort_by_expert(experts_NK, len(self.router.weight))
        rows_RD = Scatter.apply(*multiplied(x_ND), order_R, inverse_R)
        rows_RD = self.dispatch(self.experts, rows_RD, counts_E)
        return Gather.apply(rows_RD, weights_NK, order_R, inverse_R).view(x_BTD.shape)


class Dense(nn.Module):
    """The control: one expert, no router. Its weights are named as an MoE's experts are."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        counts_E = torch.full((1,), len(x_ND), device=x_ND.device)
        return self.experts(x_ND, counts_E).view(x_BTD.shape)


def routers(model: nn.Module) -> list[Router]:
    """The routers of a model, in layer order; none for a dense one."""
    return [module for module in model.modules() if isinstance(module, Router)]


def fade(model: nn.Module, fraction: float) -> None:
    """Before `end_step`: how far the run is (0..1), for methods whose bias fades."""
    for router in routers(model):
        router.strength.fill_(bias_strength(fraction))


def end_step(model: nn.Module) -> None:
    """After each optimizer step: its loads decide what balances the next one."""
    layers = routers(model)
    for device in dict.fromkeys(router.load_count_E.device for router in layers):
        end_steps([router for router in layers if router.load_count_E.device == device])


def routing_health(model: nn.Module) -> dict[str, Any] | None:
    """`health` of a model's routers, in layer order."""
    return health(routers(model))


def health(layers: Iterable[Router]) -> dict[str, Any] | None:
    """Load per expert and what it implies, per layer, counted since the last `end_step`.

    load: share of routed rows per expert; cv: standard deviation over mean of the load; max_mean:
    busiest expert over the mean; entropy: of the router, 0..1 of log E; dead: experts without
    a row. None for a dense model or before anything was counted.
    """
    layers = list(layers)
    if not layers:
        return None
    home = layers[0].load_count_E.device  # from where everything comes at once: a copy is a wait
    counted = torch.stack([torch.cat([router.load_count_E, router.entropy_sum.double().view(1)])
                           .to(home) for router in layers]).cpu()
    used = counted[:, :-1].sum(dim=1) > 0
    if not used.any():
        return None
    counts, entropies = counted[used, :-1], counted[used, -1]
    relative = counts / counts.mean(dim=1, keepdim=True)
    tokens = counts.sum(dim=1) / layers[0].top_k
    return {
        "load": (counts / counts.sum(dim=1, keepdim=True)).tolist(),
        "cv": relative.std(dim=1, correction=0).tolist(),
        "max_mean": relative.max(dim=1).values.tolist(),
        "entropy": (entropies / (tokens * math.log(counts.shape[1]))).tolist(),
        "dead": (counts == 0).sum(dim=1).tolist(),
    }
