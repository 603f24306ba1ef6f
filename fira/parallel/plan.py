"""What a run would need on N devices, before anybody rents them: memory, bytes sent, time, cost.

Parameters come from the shapes of the code on the meta device, activations from what its layers
keep for the backward pass, bytes sent from what the room's own exchanges move. Speeds are
estimates: sheet figures of the device times a utilization that others have measured.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

from fira.config import ConfigError
from fira.loss.head import BLOCK_ELSEWHERE
from fira.model.count import count_parameters
from fira.model.files import build_meta
from fira.parallel.layout import check_fit
from fira.parallel.mesh import AXES
from fira.parallel.pipeline import SCHEDULES, blocks_of, stages_of

FLOAT = 4  # bytes: weights, gradients, optimizer state and the residual stream are float32
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
class Work:
    """What is trained: sequences a step and a micro-batch, tokens in each, the optimizer's rule."""

    spec: Any
    batch_size: int
    micro_batch: int
    sequence_length: int
    rule: str = "adamw"


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


class Elements(NamedTuple):
    """Parameters of one pipeline rank: outside the experts, in them; of both, Muon's matrices."""

    dense: int
    experts: int
    muon: int
    muon_experts: int
    layers: int
    ends: bool  # it holds the head


@lru_cache(maxsize=8)
def _parameters(spec: Any) -> tuple[Any, list[tuple[str, int, bool]]]:
    """The model on the meta device, and of each parameter name, size and whether a matrix."""
    model = build_meta(spec)
    return model, [(name, p.numel(), ".router." not in name and "embedding" not in name
                    and name.split(".")[0] != "head"
                    and p.dim() >= (3 if ".experts." in name else 2))
                   for name, p in model.named_parameters()]


def elements(spec: Any, rank: int, ranks: int, schedule: str) -> Elements:
    """Counted on the meta device, as `keep_stages` cuts the model."""
    model, parameters = _parameters(spec)
    stages = ranks * SCHEDULES[schedule][1] if ranks > 1 else 1
    held = stages_of(rank, ranks, schedule) if ranks > 1 else [0]
    layers = {str(layer) for stage in held for layer in blocks_of(stage, stages, spec.num_layers)}
    parts = (model.before if 0 in held else ()) + (model.after if stages - 1 in held else ())
    counts = dict.fromkeys(("dense", "experts", "muon", "muon_experts"), 0)
    for name, size, matrix in parameters:
        first, second = name.split(".")[:2]
        if second in layers if first == "blocks" else first in parts:
            expert = ".experts." in name
            counts["experts" if expert else "dense"] += size
            counts["muon_experts" if expert else "muon"] += size * matrix
    return Elements(**counts, layers=len(layers), ends=rank == ranks - 1)


def activations_per_token(spec: Any) -> int:
    """Floats that one layer keeps of a token until its backward pass, in float32 on any device.

    Of width D: residual and norms around attention and experts; queries, keys and values as the
    projection made them, normalized, rotated; the attention's output; routed rows before and after
    the experts; what the activation function's gradient needs; the router's logits and choices.
    """
    D, K, F, E = spec.d_model, spec.top_k, spec.d_ff, spec.num_experts
    routed = 2 * K * D + (2 * E + 8 * K if E > 1 else -K * D)
    if spec.architecture == "fira2":
        HC, GC = spec.n_head * spec.head_dim, spec.n_kv_head * spec.head_dim
        return 6 * D + 4 * HC + 4 * GC + 4 * K * F + routed + 3 * spec.n_head
    dropped = 2 * D if spec.dropout else 0
    return 8 * D + dropped + 2 * K * F + routed + spec.n_head


def memory(work: Work, sizes: dict[str, int], schedule: str) -> dict[str, float]:
    """Bytes by part on the rank that needs most."""
    ranks = [_memory_of(work, sizes, schedule, elements(work.spec, rank, sizes["pipeline"],
                                                        schedule), rank)
             for rank in {0, sizes["pipeline"] - 1}]
    return max(ranks, key=lambda parts: sum(parts.values()))


def _memory_of(work: Work, sizes: dict[str, int], schedule: str, held: Elements,
               rank: int) -> dict[str, float]:
    spec, shard, expert = work.spec, sizes["shard"], sizes["expert"]
    local = held.dense / shard + held.experts / (shard * expert)
    muon = held.muon / shard + held.muon_experts / (shard * expert) if work.rule == "muon" else 0
    tokens = work.micro_batch * work.sequence_length
    flying = in_flight(sizes["pipeline"], micro_batches(work, sizes), schedule, rank)
    gathered = 0.0
    if shard > 1:  # the root stays gathered, and one block at a time with the next one coming
        per_layer = (held.experts / expert + held.muon) / max(1, held.layers)
        gathered = (held.dense - held.muon) + 2 * per_layer
    return {"weights": FLOAT * (local + gathered), "gradients": FLOAT * local,
            "optimizer": FLOAT * (2 * local - muon),
            "activations": FLOAT * tokens * (flying * held.layers * activations_per_token(spec)
                                             + 3 * spec.d_model),
            "logits": (FLOAT * 2 * min(tokens * spec.vocab_size, BLOCK_ELSEWHERE)
                       if held.ends else 0.0)}


def micro_batches(work: Work, sizes: dict[str, int]) -> int:
    """Of each rank in a step."""
    ranks = sizes["data"] * sizes["shard"] * sizes["expert"]
    return max(1, work.batch_size // ranks // work.micro_batch)


def in_flight(pipeline: int, micros: int, schedule: str, rank: int) -> float:
    """Micro-batches whose activations a rank holds at once, as if over all its layers."""
    if pipeline == 1:
        return 1
    most = {"gpipe": micros, "1f1b": pipeline - rank,
            "interleaved": 1.5 * pipeline - rank, "zero_bubble": 1.5 * pipeline}[schedule]
    return min(micros, most)


def bytes_sent(work: Work, sizes: dict[str, int], schedule: str) -> dict[str, float]:
    """Bytes that a rank sends in a step, by reason; sums as a ring does, loads balanced."""
    spec, held = work.spec, elements(work.spec, 0, sizes["pipeline"], schedule)
    data, shard, expert, pipeline = (sizes[axis] for axis in ("data", "shard", "expert",
                                                              "pipeline"))
    micros, tokens = micro_batches(work, sizes), work.micro_batch * work.sequence_length
    local_dense, local_experts = held.dense / shard, held.experts / (shard * expert)
    sent = {"gradients": FLOAT * (ring(data * expert) * local_dense + ring(data) * local_experts)}
    if shard > 1:  # gathered forward and backward for each micro-batch, scattered once
        sent["shards"] = FLOAT * (shard - 1) * (local_dense + local_experts) * (2 * micros + 1)
    if expert > 1:  # there and back, forward and backward
        rows = tokens * spec.top_k * held.layers * micros
        sent["experts"] = FLOAT * 4 * rows * spec.d_model * (expert - 1) / expert
    if pipeline > 1:
        crossings = SCHEDULES[schedule][1]
        sent["pipeline"] = FLOAT * crossings * micros * tokens * spec.d_model
    return sent


def ring(ranks: int) -> float:
    """What a rank sends, over what it sums."""
    return 2 * (ranks - 1) / ranks


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
              "pipeline": device.far}
    times = {reason: count / speeds[reason] for reason, count in sent.items()}
    waiting = times.pop("experts", 0.0)  # nothing hides an exchange; the others overlap
    return Estimate(sizes, schedule, memory(work, sizes, schedule), sent,
                    batch_tokens / (max(compute, sum(times.values())) + waiting))


@lru_cache(maxsize=8)
def _flops_per_token(work: Work) -> int:
    return count_parameters(work.spec, work.sequence_length).flops_per_token


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
