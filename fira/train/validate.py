"""Score a model on held-out batches while it trains."""
from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from fira.loss.head import head_token_losses
from fira.parallel.layout import Layout


@torch.no_grad()  # sharded weights cannot be gathered in inference mode
def validate(layout: Layout, batches: Iterable[Any],
             token_bytes_V: torch.Tensor) -> dict[str, float]:
    """Mean loss in nats per token, and bits per byte of the text the targets stand for.

    The ranks of a layout take the batches in turn and add up what they found.
    token_bytes_V holds the length in bytes of every token. Special tokens have none: they count in
    the loss and not in bits per byte.
    """
    layout.model.eval()
    device = layout.mesh.device
    token_bytes_V = token_bytes_V.to(device)
    sums = torch.zeros(4, dtype=torch.float64)  # nats, of them of text; tokens, bytes
    def score(model: Any, batch: Any) -> torch.Tensor:
        x_BTD = model.features(batch.tokens_BT)
        weight_VD, bias_V = model.head_weights()
        return head_token_losses(x_BTD, weight_VD, bias_V, batch.targets_BT)

    for batch, mine in layout.take_turns(batches):
        targets_BT = batch.targets_BT.to(device)
        losses_BT = layout.score(score, batch)
        if losses_BT is None or not mine:
            continue
        losses_BT = losses_BT.double()
        bytes_BT = token_bytes_V[targets_BT]
        sums += torch.stack([losses_BT.sum(), losses_BT[bytes_BT > 0].sum(),
                             bytes_BT.new_tensor(targets_BT.numel()), bytes_BT.sum()]).cpu()
    nats, text_nats, tokens, text_bytes = layout.sum(sums).tolist()
    return {"loss": nats / tokens, "bits_per_byte": text_nats / math.log(2) / text_bytes}
