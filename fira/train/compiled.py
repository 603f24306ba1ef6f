"""torch.compile for training, part by part: every block is the same graph, which is made once.

A whole model of twelve blocks is twelve times as much to compile, for the same code.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def compiled(model: Any, backend: str | Callable[..., Any] = "inductor") -> Callable[..., Tensor]:
    """`model` as training calls it, tokens_BT -> logits or loss, with its blocks and what reads
    them out compiled. The model itself stays as it is.
    """
    def whole(part: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return torch.compile(part, backend=backend, fullgraph=True)

    blocks, read_out = [whole(block) for block in model.blocks], whole(model.read_out)

    def forward(tokens_BT: Tensor, targets_BT: Tensor | None = None,
                loss: Callable[..., Tensor] | None = None) -> Tensor:
        x_BTD = model.norm(model.through(blocks, model.embed(tokens_BT)))
        return read_out(x_BTD, targets_BT, loss)
    return forward
