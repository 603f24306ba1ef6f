"""A step's gradient on one device: micro-batches one after the other, each loss times its share.

A micro-batch's share is its weight over that of the global batch, so the sum over all micro-batches
of all ranks is the gradient of the weighted mean, and nothing is divided afterwards. Pipelines
compute the same in another order.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fira.runtime import autocast

LossFn = Callable[[Any, Any], "tuple[Tensor, dict[str, Any]]"]
BUCKET = 4 << 20  # elements per message: enough for full bandwidth, and little memory on top


class Result(NamedTuple):
    """A micro-batch's share of the global batch's weight, its mean loss and its metrics."""

    share: float
    loss: Tensor
    metrics: dict[str, Any]


def accumulate(model: Any, batches: Sequence[Any], shares: Sequence[float], loss_fn: LossFn,
               device: torch.device, before: Callable[[int], None]) -> list[Result]:
    """Forward and backward of every micro-batch; calls `before` with the number of each."""
    results = []
    for number, (batch, share) in enumerate(zip(batches, shares, strict=True)):
        before(number)
        loss, result = run_loss(model, to_device(batch, device), share, loss_fn)
        loss.backward()
        results.append(result)
    return results


def run_loss(model: Any, batch: Any, share: float, loss_fn: LossFn) -> tuple[Tensor, Result]:
    """The loss of a micro-batch times its share, to go backward, and what is recorded of it."""
    with autocast(batch.tokens_BT.device):
        loss, metrics = loss_fn(model, batch)
    metrics = {name: torch.as_tensor(value).detach() for name, value in metrics.items()}
    return loss * share, Result(share, loss.detach(), metrics)


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch, which is a named tuple of tensors, on `device`."""
    return type(batch)(*(field.to(device, non_blocking=True) for field in batch))


def average(results: list[Result], gather: Callable[[Any], list[Any]]) -> dict[str, float]:
    """The mean of the loss and of every metric, by weight, over the results of all ranks.

    Micro-batches without weight count for nothing, and a rank may lack a metric that others have.
    """
    sums: dict[str, tuple[float, float]] = {}
    for share, loss, metrics in results:
        assert "loss" not in metrics, "the loss itself has this name"
        for name, value in {"loss": loss, **metrics}.items() if share else ():
            total, weight = sums.get(name, (0.0, 0.0))
            sums[name] = total + share * float(value), weight + share
    everyone = gather(sums)
    means = {}
    for name in dict.fromkeys(name for found in everyone for name in found):
        parts = [found[name] for found in everyone if name in found]
        means[name] = sum(total for total, _ in parts) / sum(weight for _, weight in parts)
    return means


def sum_gradients(parameters: Sequence[nn.Parameter], group: Any) -> None:
    """Sum the gradients over the ranks of `group`, several of them in each message."""
    while parameters:
        count = size = 0
        while count < len(parameters) and size < BUCKET:
            size += parameters[count].numel()
            count += 1
        bucket, parameters = parameters[:count], parameters[count:]
        flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
                          for p in bucket])
        for parameter in bucket:
            parameter.grad = None  # gradients are not held twice
        dist.all_reduce(flat, group=group)
        for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            parameter.grad = part.view_as(parameter)
