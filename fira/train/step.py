"""One optimizer step: accumulate gradients over micro-batches, average, clip, update or skip."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fira.parallel.shard import local
from fira.runtime import autocast

LossFn = Callable[[Any, Any], "tuple[torch.Tensor, dict[str, Any]]"]


def accumulate(model: nn.Module, batches: Iterable[Any], loss_fn: LossFn) -> tuple[Tensor, int]:
    """Add every micro-batch's gradients; returns the mean loss and the number of micro-batches.

    Losses go backward unscaled: the auxiliary losses inside the layers then weigh the same however
    the batch is cut, and `finish_step` divides once. Equal micro-batches are assumed.
    """
    losses = []
    for batch in batches:
        with autocast(batch.tokens_BT.device):
            loss, _ = loss_fn(model, batch)
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).mean(), len(losses)


def gradient_norm(model: nn.Module) -> float:
    """The norm of all gradients together."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients, foreach=True))


def finish_step(model: nn.Module, optimizer: torch.optim.Optimizer, loss: float | Tensor,
                num_micro_batches: int, clip: float,
                norm_of: Callable[[nn.Module], float] = gradient_norm) -> tuple[float, bool]:
    """Average and clip the gradients, then update. Returns (gradient norm, whether it updated).

    A non-finite loss or norm skips the update: weights and optimizer state stay as they were. On
    many ranks loss and norm are global, so all of them skip together.
    """
    gradients = [local(p.grad) for p in model.parameters() if p.grad is not None]
    norm = norm_of(model) / num_micro_batches  # here, and not before, a GPU is waited for
    finite = math.isfinite(norm) and math.isfinite(loss)
    if finite:
        scale = min(1.0, clip / (norm + 1e-6)) / num_micro_batches
        if scale != 1.0:
            torch._foreach_mul_(gradients, scale)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, finite
