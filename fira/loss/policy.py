"""Learning from the rewards of answers that the model wrote itself (GRPO, Shao et al. 2024,
2402.03300), without the two biases that Liu et al. 2025 (2503.20783) found in it.

    advantage = reward - mean reward of the answers to the same prompt
    r = p(token) / p_sampled(token)
    loss = mean of -min(r * advantage, clip(r, 1 - c, 1 + c) * advantage) + kl * (e^d - d - 1)

The mean is over all tokens of all answers of the global batch, so that a token weighs the same in a
short answer and in a long one; and advantages are not divided by their standard deviation, so that
prompts that are nearly always or never solved do not weigh more. d = log p_reference(token) -
log p(token); the last term estimates KL(p || p_reference) and is never negative.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fira.loss.head import IGNORED
from fira.loss.preference import log_probabilities


class PolicyBatch(NamedTuple):
    """Prompts with sampled answers, packed as in `PackedBatch`; targets are the answers' tokens.

    Of each target: `sampled_BT`, its log-probability when it was sampled, `advantages_BT`, and
    `reference_BT`, its log-probability under the reference (read only if kl is above 0).
    `experts_BTLK` are the experts that processed each token when it was sampled, negative where
    they are not known; with L = 0 the routers choose themselves.
    """

    tokens_BT: Tensor
    targets_BT: Tensor
    positions_BT: Tensor
    sampled_BT: Tensor
    advantages_BT: Tensor
    reference_BT: Tensor
    experts_BTLK: Tensor

    @property
    def weight(self) -> int:
        """Number of tokens of answers."""
        return int((self.targets_BT != IGNORED).sum())


def policy_loss(clip: float | None = None, kl: float = 0.0
                ) -> Callable[..., tuple[Tensor, dict[str, Any]]]:
    """The loss function of a `PolicyBatch`, and metrics over its tokens: entropy, estimated by
    -log p of the sampled tokens; gap and gap_max, the mean and the largest absolute difference of
    log p from what it was when the token was sampled; clipped, the share of tokens without a
    gradient because r left the range; and kl, if it is above 0."""
    def loss_fn(model: Any, batch: Any) -> tuple[Tensor, dict[str, Any]]:
        scored_BT = batch.targets_BT != IGNORED
        logs_N, sampled_N, advantages_N, reference_N = (values_BT[scored_BT] for values_BT in (
            log_probabilities(model, batch), batch.sampled_BT, batch.advantages_BT,
            batch.reference_BT))
        ratio_N = (logs_N - sampled_N).exp()
        costs_N = -ratio_N * advantages_N
        gap_N = (logs_N - sampled_N).detach().abs()
        metrics = {"entropy": -_mean(logs_N.detach()), "gap": _mean(gap_N),
                   "gap_max": gap_N.max() if len(gap_N) else 0.0}
        if clip is not None:
            bounded_N = -ratio_N.clamp(1 - clip, 1 + clip) * advantages_N
            metrics["clipped"] = _mean((bounded_N > costs_N).float())
            costs_N = torch.maximum(costs_N, bounded_N)
        if kl:
            change_N = reference_N - logs_N
            divergence_N = change_N.exp() - change_N - 1
            metrics["kl"] = _mean(divergence_N.detach())
            costs_N = costs_N + kl * divergence_N
        return _mean(costs_N), metrics
    return loss_fn


def _mean(values: Tensor) -> Tensor:
    return values.sum() / max(1, len(values))
