"""Score a model on held-out text while it trains."""
from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fira.loss.head import token_losses
from fira.parallel.layout import Layout


def validate(layout: Layout, batches: Iterable[Any], token_bytes_V: Tensor) -> dict[str, float]:
    """Mean loss in nats per token, and bits per byte of the text that the targets stand for.

    The ranks of a layout take the batches in turns and add up what they found. `token_bytes_V`
    holds the length of every token in bytes. Special tokens stand for no text: they count in the
    loss and not in bits per byte.
    """
    layout.model.eval()
    sums = torch.zeros(4, dtype=torch.float64)  # nats, nats of text tokens, tokens, bytes
    for batch, mine in layout.take_turns(batches):
        losses_BT = layout.score(_losses, batch)
        if losses_BT is None or not mine:
            continue
        losses_BT = losses_BT.cpu().double()
        bytes_BT = token_bytes_V[batch.targets_BT]
        sums += torch.stack([losses_BT.sum(), losses_BT[bytes_BT > 0].sum(),
                             bytes_BT.new_tensor(bytes_BT.numel()), bytes_BT.sum()])
    nats, text_nats, tokens, text_bytes = layout.sum(sums).tolist()
    return {"loss": nats / tokens, "bits_per_byte": text_nats / math.log(2) / text_bytes}


def _losses(model: Any, batch: Any) -> Tensor:
    x_BTD = model.features(batch.tokens_BT)
    weight_VD, bias_V = model.head_weights()
    return token_losses(x_BTD, weight_VD, bias_V, batch.targets_BT)
