"""Learning from pairs of answers, one of them preferred (DPO, Rafailov et al. 2023, 2305.18290).

    d = log p(answer) - log p_reference(answer)        summed over the answer's tokens
    loss = -log sigmoid(beta * (d_chosen - d_rejected))

The reference is the model as it was before. With `normalized`, d is the mean over the answer's
tokens, so that long answers do not weigh more (length-normalized DPO of Tulu 3, Lambert et al.
2024, 2411.15124); beta is then larger.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fira.loss.head import IGNORED, token_losses


class PairBatch(NamedTuple):
    """Rows that stand in pairs, the chosen answer before the rejected one, packed as in
    `PackedBatch`; `reference_BT` are the reference's log-probabilities of the targets."""

    tokens_BT: Tensor
    targets_BT: Tensor
    positions_BT: Tensor
    reference_BT: Tensor

    @property
    def weight(self) -> int:
        """Number of pairs."""
        return int(_answers(self)[1].sum()) // 2


def log_probabilities(model: Any, batch: Any) -> Tensor:
    """Of every target, fp32 [B, T], 0 where none is scored."""
    x_BTD = model.features(batch.tokens_BT)
    weight_VD, bias_V = model.head_weights()
    return -token_losses(x_BTD, weight_VD, bias_V, batch.targets_BT)


def preference_loss(beta: float, normalized: bool) -> Callable[..., tuple[Tensor, dict[str, Any]]]:
    """The loss function of a batch of pairs, and metrics: the change of each answer's
    log-probability per token, the margin beta * (d_chosen - d_rejected), and the share of pairs in
    which it is positive (a pair without a margin counts as half of one)."""
    def loss_fn(model: Any, batch: Any) -> tuple[Tensor, dict[str, Any]]:
        change_BT = log_probabilities(model, batch) - batch.reference_BT
        answers_BT, used_BS = _answers(batch)
        zeros_BS = torch.zeros_like(used_BS, dtype=change_BT.dtype)
        sums_BS = zeros_BS.scatter_add(1, answers_BT, change_BT)
        tokens_BS = zeros_BS.scatter_add(1, answers_BT, (batch.targets_BT != IGNORED).float())
        means_BS = sums_BS / tokens_BS.clamp(min=1)
        chosen_P, rejected_P = (means_BS if normalized else sums_BS)[used_BS].view(-1, 2).unbind(1)
        margin_P = beta * (chosen_P - rejected_P)
        each_P2, size_P2 = (rows[used_BS].view(-1, 2).detach() for rows in (means_BS, tokens_BS))
        return -F.logsigmoid(margin_P).sum() / max(1, len(margin_P)), {
            "chosen_change": _mean(each_P2[:, 0]), "rejected_change": _mean(each_P2[:, 1]),
            "margin": _mean(margin_P.detach()), "accuracy": _mean((margin_P.sign() + 1) / 2),
            "chosen_tokens": _mean(size_P2[:, 0]), "rejected_tokens": _mean(size_P2[:, 1])}
    return loss_fn


def _mean(values: Tensor) -> Tensor:
    return values.sum() / max(1, len(values))


def _answers(batch: Any) -> tuple[Tensor, Tensor]:
    """The number in its sequence of the row that each place belongs to, [B, T], and which of the
    numbers are rows with an answer, [B, S] with S = T; empty places are rows without one."""
    numbers_BT = (batch.positions_BT == 0).cumsum(1) - 1
    scored_BS = torch.zeros_like(numbers_BT).scatter_add(
        1, numbers_BT, (batch.targets_BT != IGNORED).long())
    return numbers_BT, scored_BS > 0
