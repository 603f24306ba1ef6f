"""Next-token cross-entropy, the pretraining loss."""
from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F

from fira.loss.head import head_loss

Model = Any


class Batch(Protocol):
    tokens_BT: torch.Tensor
    targets_BT: torch.Tensor


def next_token_loss(model: Model, batch: Batch) -> tuple[torch.Tensor, dict[str, Any]]:
    """Mean cross-entropy over a batch's targets, in nats; targets of -100 are not scored.

    The model is called once, wrapped or compiled as it may be, and applies the loss to its head.
    """
    x_BTD = model.features(batch.tokens_BT)
    return head_loss(x_BTD, *model.head_weights(), batch.targets_BT), {}


def next_token_loss_plain(model: Model, batch: Batch) -> tuple[torch.Tensor, dict[str, Any]]:
    """The same from whole logits: the definition."""
    logits_BTV = model(batch.tokens_BT)
    loss = F.cross_entropy(logits_BTV.flatten(0, 1).float(), batch.targets_BT.flatten())
    return loss, {}
