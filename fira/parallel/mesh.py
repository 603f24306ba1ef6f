"""The ranks of a run: their grid, the process groups along its axes, sums over all of them."""
from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable, Iterator
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from pydantic import Field
from torch.distributed.device_mesh import DeviceMesh

from fira import runtime
from fira.config import Config, ConfigError

TIMEOUT = datetime.timedelta(minutes=30)
AXES = ("pipeline", "data", "expert", "shard")  # the last communicate most: neighbors


class ParallelConfig(Config):
    """The number of ranks along each axis. Their product is the number of all ranks."""

    data: int | None = Field(None, ge=1, description="replicas; null takes all ranks that are left")
    shard: int = Field(1, ge=1, description="ranks that share the rows of every weight")
    expert: int = Field(1, ge=1, description="ranks that divide the experts")
    pipeline: int = Field(1, ge=1, description="ranks that divide the blocks")
    # a setting, because a slow file system delays ranks for minutes, and tests wait for seconds
    timeout: float = Field(TIMEOUT.total_seconds(), gt=0,
                           description="seconds to wait for a rank that is silent")


def describe_sizes(sizes: dict[str, int], sign: str = " ") -> str:
    """The sizes above one, such as "data 2 x expert 4"."""
    return " x ".join(f"{axis}{sign}{size}" for axis, size in sizes.items() if size > 1)


class Mesh:
    """This rank's place in the grid; without arguments, the only rank of a run.

    `groups` are process groups by the axes that they span, of the ranks that differ from this one
    along these axes only; None where that is this rank alone. `timeout` is how long operations wait
    for a silent rank. A process group has a limit of its own, half an hour unless told otherwise,
    so every group is made with this one.
    """

    def __init__(self, sizes: dict[str, int] | None = None, rank: int = 0,
                 device: torch.device | None = None, groups: dict[Any, Any] | None = None,
                 timeout: datetime.timedelta = TIMEOUT) -> None:
        self.sizes = sizes or dict.fromkeys(AXES, 1)
        self.rank, self.groups, self.timeout = rank, groups or {}, timeout
        self.device = device or torch.device("cpu")
        shape = [self.sizes[axis] for axis in AXES]
        self.size = prod(shape)
        self.place = dict(zip(AXES, map(int, np.unravel_index(rank, shape)), strict=True))
        self.batch_ranks = self.size // shape[0]  # a batch is divided between these
        self.batch_rank = rank % self.batch_ranks

    def __str__(self) -> str:
        if self.size == 1:
            return str(self.device)
        return f"{self.size} {self.device.type} ranks ({describe_sizes(self.sizes)})"

    @cached_property
    def shard_meshes(self) -> tuple[DeviceMesh, DeviceMesh]:
        """The ranks as (replicas, shards) of dense weights, and as (replicas, shards) of experts,
        which are not replicated along the expert axis."""
        return self._shard_mesh("data", "expert"), self._shard_mesh("data")

    def _shard_mesh(self, *axes: str) -> DeviceMesh:
        shards, replicas = self.groups["shard",], self.groups[axes]
        if replicas is None:
            return DeviceMesh.from_group(shards, self.device.type)
        ranks = [[first + other - self.rank for other in dist.get_process_group_ranks(shards)]
                 for first in dist.get_process_group_ranks(replicas)]  # ranks are linear in places
        return DeviceMesh.from_group([replicas, shards], self.device.type, mesh=ranks,
                                     mesh_dim_names=("replica", "shard"))

    def gather(self, value: Any, group: Any = None) -> list[Any]:
        """The small `value` of every rank, in the order of the ranks, by a group of all ranks."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=group)
        return values

    def first(self, task: Callable[[], Any]) -> Any:
        """What `task` returns on the first rank, which alone runs it; all raise its error."""
        found = fault = None
        if self.rank == 0:
            try:
                found = task()
            except (ValueError, OSError) as error:
                fault = error
        found, fault = self.gather((found, fault))[0]
        if fault is not None:
            raise fault
        return found

    def agree(self, *values: float) -> list[float]:
        """The largest of each value over all ranks."""
        largest = torch.tensor(values, dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.tolist()


LOST = ("onnection closed", "onnection reset", "Timed out", "timed out", "imeout", "roken pipe",
        "NCCL", "onnection refused")  # parts of the messages of gloo and NCCL when a peer dies
GROUPS = (("pipeline",), ("expert",), ("data",), ("shard",), ("data", "expert"))


def make_mesh(sizes: dict[str, int], rank: int, device: torch.device,
              timeout: datetime.timedelta = TIMEOUT) -> Mesh:
    """The grid of `sizes` with its process groups; every rank must call it."""
    ranks = np.arange(prod(sizes.values())).reshape([sizes[axis] for axis in AXES])
    groups: dict[tuple[str, ...], Any] = {}
    for axes in GROUPS:
        last = range(-len(axes), 0)
        lists = np.moveaxis(ranks, [AXES.index(axis) for axis in axes], last)
        groups[axes] = _own_group(lists.reshape(-1, prod(sizes[axis] for axis in axes)), timeout)
    if sizes["pipeline"] > 1:
        groups["ends",] = _own_group(ranks[[0, -1]].reshape(2, -1).T, timeout)
    return Mesh(sizes, rank, device, groups, timeout)


def _own_group(ranks: np.ndarray, timeout: datetime.timedelta) -> Any:
    """Make a process group of every row of `ranks`; returns this rank's, None if it has none."""
    if ranks.shape[1] == 1:
        return None
    return dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=timeout)[0]


def resolve_sizes(config: ParallelConfig, world: int) -> dict[str, int]:
    """Sizes along AXES. Raises ConfigError if their product is not `world`."""
    sizes = {axis: getattr(config, axis) for axis in AXES}
    if config.data is None:
        sizes["data"] = max(1, world // (config.shard * config.expert * config.pipeline))
    need = prod(sizes.values())
    if need != world:
        asked = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
        raise ConfigError(f"parallel {asked} needs {need} ranks, but {world} run; start them with: "
                          f"torchrun --nproc-per-node {need} -m fira train ...")
    return sizes


def check_fit(sizes: dict[str, int], spec: Any, batch_size: int, micro_batch: int,
              sequence_length: int) -> None:
    """Raises ConfigError, one line, where a model or batch cannot be divided as asked."""
    expert, pipeline = sizes["expert"], sizes["pipeline"]
    if spec.num_experts % expert:
        fit = max(size for size in range(1, expert) if spec.num_experts % size == 0)
        raise ConfigError(f"parallel.expert={expert} must divide model.num_experts="
                          f"{spec.num_experts}; try parallel.expert={fit}")
    if sizes["shard"] > 1 and pipeline > 1:
        raise ConfigError(f"parallel.shard={sizes['shard']} cannot be combined with "
                          f"parallel.pipeline={pipeline}; try parallel.shard=1 with parallel.data "
                          "or parallel.expert")
    if pipeline > spec.num_layers:
        raise ConfigError(f"parallel.pipeline={pipeline} is more than model.num_layers="
                          f"{spec.num_layers}; try parallel.pipeline={spec.num_layers}")
    ranks = sizes["data"] * sizes["shard"] * expert
    least = ranks * micro_batch * pipeline  # a pipeline needs a micro-batch for every stage
    if batch_size % least:
        fit = max(1, round(batch_size / least)) * least
        raise ConfigError(f"train.batch_tokens={batch_size * sequence_length} are {batch_size} "
                          f"sequences, which do not divide into micro-batches of {micro_batch} on "
                          f"parallel {describe_sizes(sizes, sign='=')}; "
                          f"try train.batch_tokens={fit * sequence_length}")


@contextlib.contextmanager
def joined(config: ParallelConfig, device_name: str) -> Iterator[Mesh]:
    """Join the ranks that a launcher started, and leave them at the end; alone without a launcher.

    NCCL communicates tensors on CUDA devices, gloo all others. Raises ConfigError if the sizes do
    not fit the number of ranks, ValueError if this machine has fewer CUDA devices than ranks.
    """
    launch = runtime.launch()
    try:
        yield enter(config, runtime.pick_device(device_name))
    except RuntimeError as error:
        if launch.world == 1 or not any(sign in str(error) for sign in LOST):
            raise
        raise ValueError(f"rank {launch.rank}: another rank is gone, or was silent for "
                         f"{config.timeout:g} s ({str(error).splitlines()[0]}); the newest "
                         "checkpoint is whole: continue with --resume") from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def enter(config: ParallelConfig, device: torch.device) -> Mesh:
    """Start the process group of a launcher's ranks; returns the mesh over them."""
    launch = runtime.launch()
    sizes = resolve_sizes(config, launch.world)
    if launch.world == 1:
        return Mesh(sizes, device=device)
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
