"""Ranks that hold the same matrices divide the work on them (as ZeRO stage 1 divides AdamW's)."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fira.parallel.memory import SharedRows


class Share(NamedTuple):
    """Matrices `start` to `stop` of stack `number` are rank `rank`'s, at `offset` of its row."""

    number: int
    start: int
    stop: int
    rank: int
    offset: int


class Team:
    """The ranks of `group`, for stacks [matrices, rows, columns] that are equal on all of them."""

    def __init__(self, group: Any, shapes: Sequence[torch.Size], device: torch.device) -> None:
        self.rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        self.shares: list[Share] = []
        used = [0] * ranks
        for number, (matrices, *sides) in enumerate(shapes):
            parts = min(ranks, matrices)
            for index in range(parts):
                start, stop = matrices * index // parts, matrices * (index + 1) // parts
                rank = used.index(min(used))  # the one with the least to do
                self.shares.append(Share(number, start, stop, rank, used[rank]))
                used[rank] += (stop - start) * sides[0] * sides[1]
        self.memory = SharedRows(group, max(used), device)

    def each(self, function: Callable[[Tensor], Tensor], stacks: list[Tensor]) -> list[Tensor]:
        """function(stack) of every stack; a rank computes its share and takes the rest."""
        for share in self.shares:
            if share.rank == self.rank:
                part = function(stacks[share.number][share.start:share.stop])
                self.memory.own[share.offset:share.offset + part.numel()] = part.flatten()
        rows = self.memory.gather()
        results = [torch.empty_like(stack) for stack in stacks]
        for share in self.shares:
            part = results[share.number][share.start:share.stop]
            part.copy_(rows[share.rank, share.offset:share.offset + part.numel()].view_as(part))
        return results
