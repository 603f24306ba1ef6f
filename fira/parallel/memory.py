"""A row for each rank of a group, that all of them read: memory they share on one machine.

Sockets, which gloo uses, copy every byte several times (docs/log.md has figures).
"""
from __future__ import annotations

import os
import uuid
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

FOLDER = Path("/dev/shm")  # Linux keeps its files in memory


class SharedRows:
    """`own` is this rank's to write; after `gather` every rank reads all of `rows` [ranks, n].

    What was read may be written anew only after another collective that every rank has passed.
    """

    def __init__(self, group: Any, elements: int, device: torch.device) -> None:
        self.group, self.rank = group, dist.get_rank(group)
        shape = dist.get_world_size(group), elements
        mapped = map_rows(group, shape) if device.type == "cpu" else None
        self.is_mapped = mapped is not None
        self.rows = torch.empty(shape, device=device) if mapped is None else mapped

    @property
    def own(self) -> Tensor:
        return self.rows[self.rank]

    def gather(self) -> Tensor:
        """Wait until every rank has written its row; returns all of them."""
        if self.is_mapped:
            dist.barrier(self.group)
        else:
            dist.all_gather_into_tensor(self.rows.view(-1), self.own.clone(), group=self.group)
        return self.rows


def map_rows(group: Any, shape: tuple[int, int]) -> Tensor | None:
    """float32 memory that all ranks of `group` see, or None if they are on several machines, or
    this one has no room. All ranks must call it.

    The file has lost its name when this returns, so nothing of it outlives the processes.
    """
    if dist.get_backend(group) != "gloo" or not FOLDER.is_dir():
        return None
    file, elements = FOLDER / f"fira-{uuid.uuid4().hex}", shape[0] * shape[1]
    made = dist.get_rank(group) == 0 and _make(file, 4 * elements)
    said = [file.name if made else ""]
    dist.broadcast_object_list(said, group=group, group_src=0)
    file = FOLDER / (said[0] or "nowhere")
    rows = torch.from_file(str(file), shared=True, size=elements) if file.exists() else None
    everyone = torch.tensor([int(rows is not None)])
    dist.all_reduce(everyone, dist.ReduceOp.MIN, group=group)
    if made:
        file.unlink()
    return rows.view(shape) if rows is not None and int(everyone) else None


def _make(file: Path, size: int) -> bool:
    """Reserve a file of `size` bytes; says so in a line if there is no room."""
    with open(file, "xb") as handle:
        try:
            os.posix_fallocate(handle.fileno(), 0, size)
        except OSError as error:
            file.unlink()
            warnings.warn(f"{size / 2**20:.0f} MiB in {FOLDER} for what ranks exchange: {error}; "
                          "ranks of this machine use sockets, which is slower", stacklevel=1)
            return False
    return True
