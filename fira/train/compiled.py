"""torch.compile for training, part by part: every block is the same graph, which is made once.

A whole model of twelve blocks is twelve times as much to compile, for the same code.
"""
from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fira.loss.head import block_gradients, head_loss


def compiled(model: Any, backend: str | Callable[..., Any] = "inductor") -> Callable[..., Tensor]:
    """`model` as training calls it, tokens_BT -> logits or loss, with its blocks compiled, and a
    block of the rows that `head_loss` goes through. The model itself stays as it is.
    """
    def whole(part: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(part, backend=backend, fullgraph=True)

    blocks, rows = [whole(block) for block in model.blocks], whole(block_gradients)

    def forward(tokens_BT: Tensor, targets_BT: Tensor | None = None,
                loss: Callable[..., Tensor] | None = None) -> Tensor:
        x_BTD = model.norm(model.through(blocks, model.embed(tokens_BT)))
        if loss is head_loss:
            loss = functools.partial(head_loss, block=rows)
        return model.read_out(x_BTD, targets_BT, loss)
    return forward
