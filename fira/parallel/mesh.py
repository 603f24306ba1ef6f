"""The ranks of a run: their grid, the groups that talk to each other, sums over all of them."""
from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor

from fira import runtime
from fira.config import Config, ConfigError

AXES = ("pipeline", "data", "expert", "shard")  # outermost first: neighbors talk most


class ParallelConfig(Config):
    """How many ranks divide what. Their product is the number of ranks."""

    data: int | None = Field(None, ge=1, description="replicas; null takes the ranks left over")
    shard: int = Field(1, ge=1, description="ranks that share the rows of every weight")
    expert: int = Field(1, ge=1, description="ranks that divide the experts")
    pipeline: int = Field(1, ge=1, description="ranks that divide the blocks")
    schedule: Literal["gpipe", "1f1b", "interleaved", "zero_bubble"] = Field(
        "1f1b", description="order of micro-batches in the pipeline")
    timeout: float = Field(1800.0, gt=0, description="seconds to wait for a rank that is silent")


@dataclass(frozen=True)
class Mesh:
    """This rank's place: sizes and coordinates along AXES; `groups` by the axes they span.

    `timeout` is how long a rank that is silent is waited for. A process group has a limit of its
    own, half an hour unless told otherwise, so every group is made with it.
    """

    sizes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(AXES, 1))
    rank: int = 0
    device: torch.device = torch.device("cpu")
    groups: dict[tuple[str, ...], Any] = field(default_factory=dict)
    timeout: datetime.timedelta = datetime.timedelta(seconds=1800)

    @property
    def size(self) -> int:
        return prod(self.sizes.values())

    @property
    def place(self) -> dict[str, int]:
        """This rank's coordinate along every axis."""
        return dict(zip(AXES, map(int, np.unravel_index(self.rank, self.shape)), strict=True))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.sizes[axis] for axis in AXES)

    @property
    def batch_ranks(self) -> int:
        """Ranks between which a batch is divided."""
        return self.size // self.sizes["pipeline"]

    @property
    def batch_rank(self) -> int:
        return self.rank % self.batch_ranks

    def __str__(self) -> str:
        if self.size == 1:
            return str(self.device)
        axes = " x ".join(f"{axis} {self.sizes[axis]}" for axis in AXES if self.sizes[axis] > 1)
        return f"{self.size} {self.device.type} ranks ({axes})"

    def group(self, *axes: str) -> Any:
        """The process group of the ranks that differ from this one along `axes` only."""
        return self.groups[axes]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks of a small CPU tensor."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def agree(self, *values: float) -> list[float]:
        """The largest of each value over all ranks."""
        if self.size == 1:
            return list(values)
        largest = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.tolist()

    def wait(self) -> None:
        """Until every rank is here."""
        self.agree(0.0)


LOST = ("onnection closed", "onnection reset", "Timed out", "timed out", "imeout", "roken pipe",
        "NCCL", "onnection refused")  # what gloo and NCCL say when a peer dies
GROUPS = (("pipeline",), ("expert",), ("data",), ("data", "expert"), ("data", "expert", "shard"))


def make_mesh(sizes: dict[str, int], rank: int, device: torch.device,
              timeout: datetime.timedelta = Mesh.timeout) -> Mesh:
    """The grid of `sizes` with its process groups; every rank must call it."""
    ranks = np.arange(prod(sizes.values())).reshape([sizes[axis] for axis in AXES])
    groups: dict[tuple[str, ...], Any] = {}
    for axes in GROUPS:
        last = [AXES.index(axis) for axis in axes]
        rest = [number for number in range(len(AXES)) if number not in last]
        lists = ranks.transpose(*rest, *last).reshape(-1, prod(sizes[axis] for axis in axes))
        groups[axes] = _new_group(lists.tolist(), rank, timeout)
    if sizes["pipeline"] > 1:
        ends = ranks[[0, -1]].reshape(2, -1).T
        groups["ends",] = _new_group(ends.tolist(), rank, timeout)
    return Mesh(sizes, rank, device, groups, timeout)


def _new_group(lists: list[list[int]], rank: int, timeout: datetime.timedelta) -> Any:
    """Make a group of every list; returns the one of `rank` (None where it is in none)."""
    mine = None
    for members in lists:
        if len(members) > 1:
            group = dist.new_group(members, timeout=timeout)
            mine = group if rank in members else mine
    return mine


def resolve_sizes(config: ParallelConfig, world: int) -> dict[str, int]:
    """Sizes along AXES. Raises ConfigError if they do not make up `world` ranks."""
    sizes = {axis: getattr(config, axis) for axis in AXES}
    others = config.shard * config.expert * config.pipeline
    if config.data is None:
        sizes["data"] = max(1, world // others)
    if prod(sizes.values()) != world:
        asked = " x ".join(f"{axis}={sizes[axis]}" for axis in ("data", "shard", "expert",
                                                                "pipeline"))
        need = prod(sizes.values())
        raise ConfigError(f"parallel {asked} needs {need} ranks, but {world} run; start them with: "
                          f"torchrun --nproc-per-node {need} -m fira train ...")
    return sizes


@contextlib.contextmanager
def joined(config: ParallelConfig, device_name: str) -> Iterator[Mesh]:
    """Join the ranks that a launcher started, and leave them at the end; alone without one.

    NCCL carries what is on CUDA devices, gloo the rest. Raises ConfigError if the sizes do not fit
    the number of ranks, ValueError if there are fewer CUDA devices than ranks on this machine.
    """
    launch = runtime.launch()
    sizes = resolve_sizes(config, launch.world)
    device = runtime.pick_device(device_name)
    if launch.world == 1:
        yield Mesh(sizes, device=device)
        return
    try:
        yield enter(config, sizes, device)
    except RuntimeError as error:
        if not any(sign in str(error) for sign in LOST):
            raise
        raise ValueError(f"rank {launch.rank}: another rank is gone, or was silent for "
                         f"{config.timeout:g} s ({str(error).splitlines()[0]}); the newest "
                         "checkpoint is whole: continue with --resume") from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def enter(config: ParallelConfig, sizes: dict[str, int], device: torch.device) -> Mesh:
    """This process's place among the ranks of its launcher, with what carries their words."""
    launch = runtime.launch()
    if device.type == "cuda":
        if launch.local_rank >= torch.cuda.device_count():
            raise ValueError(f"rank {launch.rank} is number {launch.local_rank} on its machine, "
                             f"which has {torch.cuda.device_count()} CUDA devices; start at most "
                             "one rank a device, or use --device cpu")
        device = torch.device("cuda", launch.local_rank)
        torch.cuda.set_device(device)
    limit = datetime.timedelta(seconds=config.timeout)
    if not dist.is_initialized():
        store, _, _ = next(dist.rendezvous("env://", launch.rank, launch.world, timeout=limit))
        # torchrun keeps its store over restarts: the addresses of the dead must not be read again
        store = dist.PrefixStore(f"restart-{launch.restarts}", store)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                                store=store, rank=launch.rank, world_size=launch.world,
                                timeout=limit)
    return make_mesh(sizes, launch.rank, device, limit)
