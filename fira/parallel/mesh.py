"""The ranks of a run: their grid, the process groups along its axes, sums over all of them."""
from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fira import runtime
from fira.config import Config, ConfigError

AXES = ("pipeline", "data", "expert", "shard")  # outermost first: neighbors communicate most


class ParallelConfig(Config):
    """How many ranks divide what. The product of the sizes is the number of ranks."""

    data: int | None = Field(None, ge=1, description="replicas; null takes the ranks left over")
    shard: int = Field(1, ge=1, description="ranks that share the rows of every weight")
    expert: int = Field(1, ge=1, description="ranks that divide the experts")
    pipeline: int = Field(1, ge=1, description="ranks that divide the blocks")
    # a setting, because a slow file system delays ranks for minutes, and tests wait for seconds
    timeout: float = Field(1800.0, gt=0, description="seconds to wait for a rank that is silent")


def describe_sizes(sizes: dict[str, int], sign: str = " ") -> str:
    """The sizes above one, such as "data 2 x expert 4"."""
    return " x ".join(f"{axis}{sign}{size}" for axis, size in sizes.items() if size > 1)


@dataclass(frozen=True)
class Mesh:
    """This rank's place in the grid: sizes along AXES, and `groups` by the axes they span.

    `timeout` is how long operations wait for a silent rank. A process group has a limit of its own,
    half an hour unless told otherwise, so every group is made with this one.
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
        """The number of ranks that a batch is divided between."""
        return self.size // self.sizes["pipeline"]

    @property
    def batch_rank(self) -> int:
        return self.rank % self.batch_ranks

    def __str__(self) -> str:
        if self.size == 1:
            return str(self.device)
        return f"{self.size} {self.device.type} ranks ({describe_sizes(self.sizes)})"

    def group(self, *axes: str) -> Any:
        """The process group of the ranks that differ from this one along `axes` only."""
        return self.groups[axes]

    @cached_property
    def shard_meshes(self) -> tuple[DeviceMesh, DeviceMesh]:
        """The ranks as (replicas, shards) of dense weights, and as (replicas, shards) of experts,
        which are not replicated along the expert axis."""
        return self._shard_mesh("data", "expert"), self._shard_mesh("data")

    def _shard_mesh(self, *replicas: str) -> DeviceMesh:
        shards, copies = self.group("shard"), self.group(*replicas)
        if copies is None:
            return DeviceMesh.from_group(shards, self.device.type)
        place = tuple(slice(None) if axis in (*replicas, "shard") else self.place[axis]
                      for axis in AXES)
        ranks = np.arange(self.size).reshape(self.shape)[place].reshape(-1, self.sizes["shard"])
        return DeviceMesh.from_group([copies, shards], self.device.type, mesh=ranks.tolist(),
                                     mesh_dim_names=("replica", "shard"))

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks of a small CPU tensor."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """The small `value` of every rank, in the order of the ranks."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def agree(self, *values: float) -> list[float]:
        """The largest of each value over all ranks."""
        if self.size == 1:
            return list(values)
        largest = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.tolist()

    def wait(self) -> None:
        """Wait until every rank has called this."""
        self.agree(0.0)


LOST = ("onnection closed", "onnection reset", "Timed out", "timed out", "imeout", "roken pipe",
        "NCCL", "onnection refused")  # parts of the messages of gloo and NCCL when a peer dies
GROUPS = (("pipeline",), ("expert",), ("data",), ("shard",), ("data", "expert"))


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
    """Make a group of every list of two or more; returns the one that holds `rank`, or None."""
    found = None
    for members in lists:
        if len(members) > 1:
            group = dist.new_group(members, timeout=timeout)
            found = group if rank in members else found
    return found


def resolve_sizes(config: ParallelConfig, world: int) -> dict[str, int]:
    """Sizes along AXES. Raises ConfigError if their product is not `world`."""
    sizes = {axis: getattr(config, axis) for axis in AXES}
    others = config.shard * config.expert * config.pipeline
    if config.data is None:
        sizes["data"] = max(1, world // others)
    need = prod(sizes.values())
    if need != world:
        asked = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
        raise ConfigError(f"parallel {asked} needs {need} ranks, but {world} run; start them with: "
                          f"torchrun --nproc-per-node {need} -m fira train ...")
    return sizes


@contextlib.contextmanager
def joined(config: ParallelConfig, device_name: str) -> Iterator[Mesh]:
    """Join the ranks that a launcher started, and leave them at the end; one rank without one.

    NCCL communicates tensors on CUDA devices, gloo all others. Raises ConfigError if the sizes do
    not fit the number of ranks, ValueError if this machine has fewer CUDA devices than ranks.
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
    """Start the process group of a launcher's ranks; returns the mesh of `sizes` over them."""
    launch = runtime.launch()
    if device.type == "cuda":
        if launch.local_rank >= torch.cuda.device_count():
            raise ValueError(f"rank {launch.rank} is number {launch.local_rank} on its machine, "
                             f"which has {torch.cuda.device_count()} CUDA devices; start at most "
                             "one rank per device, or use --device cpu")
        device = torch.device("cuda", launch.local_rank)
        torch.cuda.set_device(device)
    limit = datetime.timedelta(seconds=config.timeout)
    if not dist.is_initialized():
        store, _, _ = next(dist.rendezvous("env://", launch.rank, launch.world, timeout=limit))
        # torchrun keeps its store over restarts: no address of a dead rank may be read again
        store = dist.PrefixStore(f"restart-{launch.restarts}", store)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                                store=store, rank=launch.rank, world_size=launch.world,
                                timeout=limit)
    return make_mesh(sizes, launch.rank, device, limit)
