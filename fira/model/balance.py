"""What keeps experts evenly loaded: a table of methods, and what they do between steps.

loss      a loss on the router's probabilities (Switch, Fedus et al. 2021), with the loads of the
          whole previous step (decision 0002), which makes it global over micro-batches and ranks
          (Qiu et al. 2025, 2501.11873)
bias      a bias per expert that only selects, moved by a fixed amount towards an even load, so that
          no balance gradient disturbs the language model (Wang et al. 2024, 2408.15664)
quantile  the same bias, set to the score quantile at which an expert gets its even share: one round
          of solving the balanced assignment problem, without a coefficient
handover  quantile for most of the run; over its last part the bias fades to exactly zero and the
          loss takes its place, so that the finished model needs no bias
none      nothing

A training step calls `set_progress` once, `set_loss_share` before each micro-batch, and `end_step`
after the optimizer; `health` reads the counters before `end_step` empties them.
"""
from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fira.model.router import NO_METHOD, Method, Router, routers

# The last part of the run in which `handover` hands over. At its end the load's imbalance is 0.14
# where with 0.2 it is 0.48, at equal bits per byte (decision 0007).
HANDOVER = 0.4
RATE = 1e-3  # change of a bias per step, in probability (2408.15664); bf16 would lose it


def switch_coefficients(share_E: Tensor) -> Tensor:
    """The loss is E * sum_e share_e * mean probability_e, 1 when even (Switch, equation 4)."""
    return len(share_E) * share_E


def move_bias(bias_LE: Tensor, share_LE: Tensor) -> Tensor:
    """The biases after one step in which expert e of layer l had share_le of the rows."""
    return _centered(bias_LE + RATE * torch.sign(share_LE.mean(dim=-1, keepdim=True) - share_LE))


def even_bias(probs_NE: Tensor, threshold_N: Tensor, top_k: int) -> Tensor:
    """The bias that gives every expert N*K/E of these tokens if their thresholds stay.

    A token's threshold lies between its K-th and next biased score. An expert takes the tokens
    whose probability plus its bias exceeds their threshold, so minus its bias must be the
    (N - N*K/E)-th smallest of probability - threshold. Alternating between biases and thresholds
    descends on the dual of the balanced assignment problem.
    """
    N, E = probs_NE.shape
    margins_EN = (probs_NE - threshold_N.unsqueeze(1)).t().contiguous()
    rank = max(1, N - max(1, N * top_k // E))
    return _centered(-margins_EN.kthvalue(rank, dim=1).values)


def _centered(bias_E: Tensor) -> Tensor:
    return bias_E - bias_E.mean(dim=-1, keepdim=True)


QUANTILE = Method(estimate_bias=even_bias,
                  update_bias=lambda bias_LE, share_LE, estimate_LE: estimate_LE)
METHODS = {
    "loss": Method(loss_coefficients=switch_coefficients),
    "bias": Method(update_bias=lambda bias_LE, share_LE, _: move_bias(bias_LE, share_LE)),
    "quantile": QUANTILE,
    "handover": QUANTILE._replace(loss_coefficients=switch_coefficients, hands_over=True),
    "none": NO_METHOD,
}


def set_progress(model: nn.Module, fraction: float) -> None:
    """Before a step: `fraction` (0..1) of the run is done, which decides how far a bias fades."""
    scale = min(1.0, max(0.0, (1 - fraction) / HANDOVER))
    _fill([router.bias_scale for router in routers(model)], scale)


def set_loss_share(model: nn.Module, share: float) -> None:
    """Before a micro-batch: `share` (0..1) of the global batch's tokens are in it.

    The routers' own losses are means over the micro-batch's tokens, so they enter the gradient with
    this weight. It is 1 until set. Filled in place, so that compiled graphs stay the same.
    """
    _fill([router.loss_share for router in routers(model)], share)


@torch.no_grad()
def _fill(buffers: list[Tensor], value: float) -> None:
    """Fill all buffers with few launches on a GPU."""
    if buffers:
        torch._foreach_zero_(buffers)
        torch._foreach_add_(buffers, value)


@torch.no_grad()
def end_step(model: nn.Module) -> None:
    """After the optimizer's step: the step's loads decide what balances the next one."""
    found = routers(model)
    for device in dict.fromkeys(router.load_count_E.device for router in found):
        _end_step([router for router in found if router.load_count_E.device == device])


def _end_step(layers: list[Router]) -> None:
    """All layers of a device at once, with few launches; a layer that counted nothing stays."""
    counts_LE, shares_LE, bias_sums_LE, estimates_L = (
        torch.stack([router.get_buffer(name) for router in layers])
        for name in ("load_count_E", "load_share_E", "bias_sum_E", "num_estimates"))
    total_L1 = counts_LE.sum(dim=1, keepdim=True)
    share_LE = torch.where(total_L1 > 0, counts_LE / total_L1.clamp(min=1), shares_LE)
    torch._foreach_copy_([router.load_share_E for router in layers], list(share_LE.unbind()))
    method = layers[0].method
    if method.update_bias is not None:
        biases = [router.get_buffer("selection_bias_E") for router in layers]
        old_LE = torch.stack(biases)
        estimate_LE = bias_sums_LE / estimates_L.clamp(min=1).unsqueeze(1)
        new_LE = method.update_bias(old_LE, share_LE, estimate_LE)
        if method.hands_over:
            new_LE = new_LE * torch.stack([router.bias_scale for router in layers]).unsqueeze(1)
        torch._foreach_copy_(biases, list(torch.where(total_L1 > 0, new_LE, old_LE).unbind()))
    for counters in zip(*(router.counters for router in layers), strict=True):
        torch._foreach_zero_(counters)


def health(layers: Iterable[Router]) -> dict[str, Any] | None:
    """Load per expert and what it implies, per layer, counted since the last `end_step`.

    load: share of routed rows per expert; cv: standard deviation over mean of the load; max_mean:
    largest load over the mean; entropy: of the router, 0..1 of log E; dead: experts without a row.
    None for a dense model or before anything was counted.
    """
    layers = list(layers)
    if not layers:
        return None
    home = layers[0].load_count_E.device  # gathered there first: each copy to the CPU is a wait
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
