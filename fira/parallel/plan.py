"""What a run would need on N devices, before anybody rents them: memory, bytes sent, time, cost.

Memory and bytes are those of `footprint`. Speeds are estimates: sheet figures of the device times
a utilization that others have measured.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import NamedTuple

from fira.config import ConfigError
from fira.model.files import build_meta
from fira.model.transformer import count_parameters
from fira.parallel.footprint import Work, bytes_sent, memory, micro_batches
from fira.parallel.layout import check_fit
from fira.parallel.mesh import AXES
from fira.parallel.pipeline import SCHEDULES

RESERVE = 0.9  # of a device's memory may be planned; the rest is the allocator's and CUDA's
UTILIZATION = 0.28  # of the sheet's bf16 rate: NeMo AutoModel, Qwen3-30B-A3B on H100


class Device(NamedTuple):
    """One accelerator: bytes, bf16 FLOP/s, bytes/s to neighbors in its machine and beyond, $/h."""

    memory: float
    flops: float
    near: float
    far: float
    per_machine: int
    price: float  # a typical list price of rented ones in 2025; --price says yours


DEVICES = {
    "h100-80g": Device(80e9, 989e12, 450e9, 50e9, 8, 2.5),
    "a100-80g": Device(80e9, 312e12, 300e9, 25e9, 8, 1.5),
    "a100-40g": Device(40e9, 312e12, 300e9, 25e9, 8, 1.2),
    "l40s-48g": Device(48e9, 362e12, 25e9, 12e9, 8, 1.0),
    "rtx4090-24g": Device(24e9, 165e12, 25e9, 3e9, 8, 0.5),
}


@dataclass(frozen=True)
class Estimate:
    """One layout: bytes per device by part, bytes each sends per step by reason, tokens/s."""

    sizes: dict[str, int]
    schedule: str
    memory: dict[str, float]
    sent: dict[str, float]
    tokens_per_second: float

    @property
    def total_memory(self) -> float:
        return sum(self.memory.values())

    @property
    def name(self) -> str:
        parts = [f"{axis} {self.sizes[axis]}" for axis in ("data", "shard", "expert", "pipeline")
                 if self.sizes[axis] > 1]
        return " x ".join(parts) or "one device"


def estimate(work: Work, sizes: dict[str, int], schedule: str, device: Device) -> Estimate:
    """Everything about one layout."""
    sent = bytes_sent(work, sizes, schedule)
    batch_tokens = work.batch_size * work.sequence_length
    flops = _flops_per_token(work) * batch_tokens
    pipeline, each = sizes["pipeline"], SCHEDULES[schedule][1]
    micros = micro_batches(work, sizes)
    bubble = (pipeline - 1) / (micros * each + pipeline - 1)
    if schedule == "zero_bubble":
        bubble /= 3  # weight gradients fill the waiting
    compute = flops / prod(sizes.values()) / (device.flops * UTILIZATION) / (1 - bubble)
    speeds = {"shards": _speed(device, sizes["shard"]),
              "experts": _speed(device, sizes["shard"] * sizes["expert"]),
              "gradients": _speed(device, prod(sizes.values()) // pipeline),
              "pipeline": device.far, "sums": device.far}
    times = {reason: count / speeds[reason] for reason, count in sent.items()}
    waiting = times.pop("experts", 0.0)  # nothing hides an exchange; the others overlap
    return Estimate(sizes, schedule, memory(work, sizes, schedule), sent,
                    batch_tokens / (max(compute, sum(times.values())) + waiting))


@lru_cache(maxsize=8)
def _flops_per_token(work: Work) -> int:
    return count_parameters(build_meta(work.spec), work.sequence_length).flops_per_token


def _speed(device: Device, ranks: int) -> float:
    return device.near if ranks <= device.per_machine else device.far


def layouts(work: Work, gpus: int) -> Iterator[tuple[dict[str, int], str]]:
    """Every grid of `gpus` ranks that the model and the batch divide into."""
    divisors = [size for size in range(1, gpus + 1) if gpus % size == 0]
    for pipeline in divisors:
        for expert in (size for size in divisors if gpus % (pipeline * size) == 0):
            for shard in (size for size in divisors if gpus % (pipeline * expert * size) == 0):
                sizes = dict(zip(AXES, (pipeline, gpus // (pipeline * expert * shard), expert,
                                        shard), strict=True))
                for schedule in SCHEDULES if pipeline > 1 else ("1f1b",):
                    try:
                        check_fit(sizes, schedule, work.spec, work.batch_size, work.micro_batch,
                                  work.sequence_length)
                    except ConfigError:
                        continue
                    yield sizes, schedule


def plan(work: Work, gpus: int, device: Device) -> list[Estimate]:
    """Layouts that fit into the memory of `gpus` devices, fastest first; ties to less memory."""
    made = [estimate(work, sizes, schedule, device) for sizes, schedule in layouts(work, gpus)]
    fitting = [one for one in made if one.total_memory <= RESERVE * device.memory]
    return sorted(fitting, key=lambda one: (-round(one.tokens_per_second, -3), one.total_memory))
