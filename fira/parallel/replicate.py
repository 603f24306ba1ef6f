"""Sums of gradients over replicas, begun while the rest of the backward pass still runs.

What torch's DistributedDataParallel does, for gradients of two kinds at once (experts are summed
over other ranks than the rest), and without wrapping the model, so that a loss may call any of its
methods and names stay.
"""
from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fira.parallel.memory import SharedRows

BUCKET = 4 << 20  # elements: large enough for full bandwidth, small enough to overlap


class Bucket:
    """Gradients that are summed together over `group`, in shared memory where there is one."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.parameters: list[nn.Parameter] = []
        self.elements = self.missing = 0
        self.memory: SharedRows | None = None
        self.flat: Tensor | None = None
        self.work: Any = None

    def map(self) -> None:
        """Look for memory to share; all ranks must call it."""
        memory = SharedRows(self.group, self.elements, self.parameters[0].device)
        self.memory = memory if memory.is_mapped else None

    def start(self) -> None:
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        row = None if self.memory is None else self.memory.own
        self.flat = torch.cat([grad.flatten() for grad in grads], out=row)
        for parameter in self.parameters:
            parameter.grad = None  # until the sum is there: gradients are not held twice
        if self.memory is None:
            self.work = dist.all_reduce(self.flat, group=self.group, async_op=True)

    def finish(self) -> None:
        if self.memory is not None:
            # row by row: torch's sum over so short an axis takes about twice as long
            self.flat = functools.reduce(torch.add, self.memory.gather())
        else:
            self.work.wait()
        assert self.flat is not None
        for parameter, part in zip(self.parameters,
                                   self.flat.split([p.numel() for p in self.parameters]),
                                   strict=True):
            parameter.grad = part.view_as(parameter)
        self.flat = self.work = None


class GradientSum:
    """Sums the gradients of `members`, (parameter, group) in the model's order."""

    def __init__(self, members: list[tuple[nn.Parameter, Any]]) -> None:
        self.buckets: list[Bucket] = []
        self.owner: dict[nn.Parameter, Bucket] = {}
        self.armed = False
        self.started = 0
        open_buckets: dict[int, Bucket] = {}
        for parameter, group in reversed(members):  # about the order in which backward makes them
            bucket = open_buckets.get(id(group))
            if bucket is None or bucket.elements >= BUCKET:
                bucket = open_buckets[id(group)] = Bucket(group)
                self.buckets.append(bucket)
            bucket.parameters.append(parameter)
            bucket.elements += parameter.numel()
            self.owner[parameter] = bucket
            parameter.register_post_accumulate_grad_hook(self._arrived)
        for bucket in self.buckets:
            bucket.map()

    def arm(self) -> None:
        """The next backward pass is the last of this step: send gradients as they arrive."""
        self.armed, self.started = True, 0
        for bucket in self.buckets:
            bucket.missing = len(bucket.parameters)

    def _arrived(self, parameter: Tensor) -> None:
        if self.armed:
            self.owner[parameter].missing -= 1  # type: ignore[index]
            while (self.started < len(self.buckets)  # in one order on all ranks
                   and not self.buckets[self.started].missing):
                self._start()

    def _start(self) -> None:
        self.buckets[self.started].start()
        self.started += 1

    def finish(self) -> None:
        """Send what is left, wait for all."""
        self.armed = False
        while self.started < len(self.buckets):
            self._start()
        for bucket in self.buckets:
            bucket.finish()
        self.started = 0
