"""One optimizer step: accumulate gradients over micro-batches, average, clip, update or skip."""
from __future__ import annotations

import math

import torch
from torch import nn

from fira.parallel.shard import local


def finish_step(model: nn.Module, optimizer: torch.optim.Optimizer, loss: float, clip: float,
                norm: float) -> tuple[float, bool]:
    """Clip the gradients, then update. Returns (gradient norm, whether it updated).

    A non-finite loss or norm skips the update: weights and optimizer state stay as they were. On
    many ranks loss and norm are global, so all of them skip together.
    """
    gradients = [local(p.grad) for p in model.parameters() if p.grad is not None]
    finite = math.isfinite(norm) and math.isfinite(loss)
    if finite:
        scale = min(1.0, clip / (norm + 1e-6))
        if scale != 1.0:
            torch._foreach_mul_(gradients, scale)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, finite
