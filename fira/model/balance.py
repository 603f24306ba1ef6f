"""What keeps experts evenly loaded: one table, a row per method.

loss      a loss on the router's probabilities (Switch, Fedus et al. 2021), with the loads of the
          whole previous step (decision 0002)
bias      a bias per expert that only selects, nudged by the sign of its lack of load, so that no
          balance gradient disturbs the language model (Wang et al. 2024, 2408.15664)
quantile  the same bias, set to the score quantile at which an expert gets its even share: one round
          of solving the balanced assignment, without a coefficient
handover  quantile for most of the run; over its last part the bias fades to exactly nothing and the
          loss takes its place, so that the finished model is one without a bias
none      nothing
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fira.model.choose import rank_smallest

FADE = 0.4  # of a run, at its end, in which `handover` hands over (docs/log.md)
RATE = 1e-3  # a step's nudge, in probability (2408.15664); lost in bf16, so the bias stays fp32


def share_price(share_E: Tensor) -> Tensor:
    """Of E * sum_e share_e * mean probability_e, which is 1 when even (Switch, equation 4)."""
    return len(share_E) * share_E


def nudge(bias_LE: Tensor, share_LE: Tensor) -> Tensor:
    """The biases after one step in which expert e of layer l had share_le of the rows."""
    return _centered(bias_LE + RATE * torch.sign(share_LE.mean(dim=-1, keepdim=True) - share_LE))


def even_bias(probs_NE: Tensor, threshold_N: Tensor, top_k: int) -> Tensor:
    """The bias that gives every expert N*K/E of these tokens, were their thresholds to stay.

    A token's threshold lies between its K-th and next biased score; an expert's bias lets in the
    N*K/E tokens over whose thresholds it is furthest. Alternating the two descends on the dual of
    the balanced assignment problem.
    """
    N, E = probs_NE.shape
    margins_EN = (probs_NE - threshold_N.unsqueeze(1)).t().contiguous()
    return _centered(-rank_smallest(margins_EN, max(1, N - max(1, N * top_k // E))))


def _centered(bias_E: Tensor) -> Tensor:
    return bias_E - bias_E.mean(dim=-1, keepdim=True)


def bias_strength(fraction: float) -> float:
    """Of `handover`, after `fraction` (0..1) of the run: 1, and 0 at the end."""
    return min(1.0, max(0.0, (1 - fraction) / FADE))


class Method(NamedTuple):
    """price(share_E) is what each expert's mean probability costs in the training loss; vote is
    taken of every micro-batch; update ends a step.

    Votes are averaged over the step, so how a batch is cut into micro-batches matters a little.

    update(bias_LE, share_LE, mean vote_LE) -> bias_LE, of all layers; a method with an update has a
    selection bias. Where it fades, bias and loss are weighed by bias_strength and what it lacks to
    1.
    """

    price: Callable[[Tensor], Tensor] | None = None
    vote: Callable[[Tensor, Tensor, int], Tensor] | None = None
    update: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    fades: bool = False


METHODS = {
    "loss": Method(price=share_price),
    "bias": Method(update=lambda bias_LE, share_LE, _: nudge(bias_LE, share_LE)),
    "quantile": Method(vote=even_bias, update=lambda bias_LE, share_LE, vote_LE: vote_LE),
    "handover": Method(price=share_price, vote=even_bias,
                       update=lambda bias_LE, share_LE, vote_LE: vote_LE, fades=True),
    "none": Method(),
}


def set_loss_share(model: nn.Module, share: float) -> None:
    """The share of the global batch's tokens that the next micro-batch holds."""
    for module in model.modules():
        if hasattr(module, "loss_share"):
            module.loss_share = share


def __getattr__(name: str) -> Any:
    from fira.model import moe

    return getattr(moe, {"begin_step": "fade"}.get(name, name))
