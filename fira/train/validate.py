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
    """Mean loss in nats per token, and bits per byte of the text that the targets stand for, with
    its standard error if there are several windows.

    The ranks of a layout take the batches in turns and add up what they found. `token_bytes_V`
    holds the length of every token in bytes. Special tokens stand for no text: they count in the
    loss and not in bits per byte. The error takes windows as independent, so it is too small where
    documents are much longer.
    """
    layout.model.eval()
    sums_55 = torch.zeros(5, 5, dtype=torch.float64)  # of products of the five columns below
    for batch, mine in layout.take_turns(batches):
        losses_BT = layout.score(_losses, batch)
        if losses_BT is None or not mine:
            continue
        losses_BT, scored_BT = losses_BT.cpu().double(), batch.targets_BT >= 0
        bytes_BT = (token_bytes_V[batch.targets_BT.clamp(min=0)] * scored_BT).double()
        rows_B5 = torch.stack([(losses_BT * (bytes_BT > 0)).sum(1), bytes_BT.sum(1),
                               losses_BT.sum(1), scored_BT.sum(1).double(),
                               torch.ones(len(bytes_BT), dtype=torch.float64)], dim=1)
        sums_55 += rows_B5.T @ rows_B5
    sums_55 = layout.sum(sums_55)
    text_nats, size, nats, tokens, windows = sums_55[4].tolist()
    row = {"loss": nats / tokens, "bits_per_byte": text_nats / math.log(2) / size}
    if windows > 1:  # variance of a ratio: mean square of nats - ratio * bytes over windows
        weights_5 = torch.tensor([1, -text_nats / size, 0, 0, 0], dtype=torch.float64)
        square = float(weights_5 @ sums_55 @ weights_5) * windows / (windows - 1)
        row["bits_per_byte_error"] = math.sqrt(max(square, 0.0)) / math.log(2) / size
    return row


def _losses(model: Any, batch: Any) -> Tensor:
    x_BTD = model.features(batch.tokens_BT)
    weight_VD, bias_V = model.head_weights()
    return token_losses(x_BTD, weight_VD, bias_V, batch.targets_BT)
