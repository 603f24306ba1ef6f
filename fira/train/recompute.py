"""Activation checkpointing: keep each block's input, run the block again in the backward pass.

Saves most of a training step's memory for about a third more computation (Chen et al. 2016,
1604.06174). Routers keep the experts they chose, so that the second run takes the same way, and do
not count it.
"""
from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fira.model.moe import routers
from fira.model.router import Router


def recompute_blocks(model: Any) -> None:
    """Let every block of `model` recompute its activations from now on; dropout repeats too."""
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False,
                                context_fn=partial(_contexts, block))


def _contexts(block: nn.Module) -> tuple[Any, Any]:
    """What surrounds the first run of a block, and the one in the backward pass."""
    chosen: list[Tensor] = []
    return _keep(routers(block), chosen), _replay(routers(block), chosen)


@contextlib.contextmanager
def _keep(found: list[Router], chosen: list[Tensor]) -> Iterator[None]:
    for router in found:
        router.record = chosen.append
    try:
        yield
    finally:
        for router in found:
            router.record = None


@contextlib.contextmanager
def _replay(found: list[Router], chosen: list[Tensor]) -> Iterator[None]:
    for router, experts_NK in zip(found, chosen, strict=True):
        router.replay_NK = experts_NK
    try:
        yield
    finally:
        for router in found:
            router.replay_NK = None
