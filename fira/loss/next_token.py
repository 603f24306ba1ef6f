"""Next-token cross-entropy, the pretraining loss."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F


class Batch(Protocol):
    tokens_BT: torch.Tensor
    targets_BT: torch.Tensor


def token_losses(logits_BTV: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each target, in nats, float32 [B, T]."""
    losses_N = F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten(),
                               reduction="none")
    return losses_N.view_as(targets_BT)


def next_token_loss(model: Callable[[torch.Tensor], torch.Tensor],
                    batch: Batch) -> tuple[torch.Tensor, dict[str, Any]]:
    """Mean cross-entropy over a batch's targets, in nats."""
    logits_BTV = model(batch.tokens_BT)
    loss = F.cross_entropy(logits_BTV.flatten(0, 1).float(), batch.targets_BT.flatten())
    return loss, {}
