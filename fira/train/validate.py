"""Score a model on held-out batches while it trains."""
from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fira.loss.head import head_token_losses
from fira.runtime import autocast


@torch.inference_mode()
def validate(model: nn.Module, batches: Iterable[Any],
             token_bytes_V: torch.Tensor) -> dict[str, float]:
    """Mean loss in nats per token, and bits per byte of the text the targets stand for.

    token_bytes_V holds the length in bytes of every token. Special tokens have none: they count in
    the loss and not in bits per byte.
    """
    model.eval()
    device = next(model.parameters()).device
    token_bytes_V = token_bytes_V.to(device)
    nats = text_nats = 0.0
    tokens = text_bytes = 0
    for batch in batches:
        targets_BT = batch.targets_BT.to(device)
        with autocast(device):
            losses_BT = model(batch.tokens_BT.to(device), targets_BT=targets_BT,
                              loss=head_token_losses).double()
        bytes_BT = token_bytes_V[targets_BT]
        nats += float(losses_BT.sum())
        tokens += targets_BT.numel()
        text_nats += float(losses_BT[bytes_BT > 0].sum())
        text_bytes += int(bytes_BT.sum())
    return {"loss": nats / tokens, "bits_per_byte": text_nats / math.log(2) / text_bytes}
