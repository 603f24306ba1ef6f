"""Next-token cross-entropy, the pretraining loss."""
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from fira.loss.head import IGNORED, head_loss


class Batch(NamedTuple):
    """Ids and, at each place, the id that follows, or IGNORED."""

    tokens_BT: torch.Tensor
    targets_BT: torch.Tensor

    @property
    def weight(self) -> int:
        """The number of scored tokens."""
        return int((self.targets_BT != IGNORED).sum())


def next_token_loss(model: Any, batch: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """Mean cross-entropy over a batch's targets, in nats; targets of IGNORED are not scored."""
    x_BTD = model.features(batch.tokens_BT)
    return head_loss(x_BTD, *model.head_weights(), batch.targets_BT), {}


def next_token_loss_plain(model: Any, batch: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """The same from whole logits: the definition."""
    logits_BTV = model(batch.tokens_BT)
    loss = F.cross_entropy(logits_BTV.flatten(0, 1).float(), batch.targets_BT.flatten())
    return loss, {}
