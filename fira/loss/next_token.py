"""The loss of pre-training: cross-entropy of the token that follows."""
from __future__ import annotations

from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor

from fira.loss.head import head_loss


class Batch(Protocol):
    """Ids and, at each place, the id to predict (-100 where nothing is scored), [B, T] both."""

    @property
    def tokens_BT(self) -> Tensor: ...
    @property
    def targets_BT(self) -> Tensor: ...


def next_token_loss(model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean cross-entropy over the scored targets of a batch, in nats; no further metrics."""
    x_BTD = model.features(batch.tokens_BT)
    return head_loss(x_BTD, *model.head_weights(), batch.targets_BT), {}


def next_token_loss_plain(model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The same from whole logits: the definition."""
    logits_BTV = model(batch.tokens_BT)
    return F.cross_entropy(logits_BTV.flatten(0, 1).float(), batch.targets_BT.flatten()), {}
