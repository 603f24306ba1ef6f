"""What a run would need on N devices, before anybody rents them: memory, bytes sent, speed.

Parameters come from the model on the meta device, activations from what its layers keep for the
backward pass, bytes from what this room's exchanges send. Memory is that of tensors at the worst
moment of a step. Speeds are estimates: sheet figures of the device times a measured utilization.
"""
from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod
from typing import Any, NamedTuple

from fira.config import ConfigError
from fira.loss.head import BLOCK_ELSEWHERE
from fira.model.count import count_parameters
from fira.model.files import build_meta
from fira.parallel.accumulate import BUCKET
from fira.parallel.layout import check_fit
from fira.parallel.mesh import AXES
from fira.parallel.pipeline import layers_of

FLOAT, COUNT = 4, 8  # bytes of weights, gradients, optimizer state, activations; of counts and sums
RESERVE = 0.9  # of a device's memory may be planned; the rest is the allocator's and CUDA's
UTILIZATION = 0.28  # of the sheet's bf16 rate: NeMo AutoModel, Qwen3-30B-A3B on H100


class Device(NamedTuple):
    """Bytes, bf16 FLOP/s, bytes/s to neighbors in its machine and beyond, devices, $/hour."""

    memory: float
    flops: float
    near: float
    far: float
    per_machine: int
    price: float  # a typical list price of rented ones in 2025; --price replaces it


DEVICES = {
    "h100-80g": Device(80e9, 989e12, 450e9, 50e9, 8, 2.5),
    "a100-80g": Device(80e9, 312e12, 300e9, 25e9, 8, 1.5),
    "a100-40g": Device(40e9, 312e12, 300e9, 25e9, 8, 1.2),
    "l40s-48g": Device(48e9, 362e12, 25e9, 12e9, 8, 1.0),
    "rtx4090-24g": Device(24e9, 165e12, 25e9, 3e9, 8, 0.5),
}


@dataclass(frozen=True)
class Work:
    """What is trained: sequences per step and micro-batch, tokens per sequence, the optimizer."""

    spec: Any
    batch_size: int
    micro_batch: int
    sequence_length: int
    rule: str = "adamw"
    recompute: bool = False

    @property
    def tokens(self) -> int:
        """Tokens per micro-batch."""
        return self.micro_batch * self.sequence_length

    def micro_batches(self, sizes: dict[str, int]) -> int:
        """Micro-batches per rank and step."""
        ranks = sizes["data"] * sizes["shard"] * sizes["expert"]
        return max(1, self.batch_size // ranks // self.micro_batch)


@lru_cache(maxsize=8)
def _shapes(spec: Any) -> tuple[Any, list[tuple[str, tuple[int, ...]]]]:
    model = build_meta(spec)
    return ((model.before, model.after),
            [(name, tuple(p.shape)) for name, p in model.named_parameters()])


@lru_cache(maxsize=512)
def count_elements(spec: Any, pipeline: int, expert: int, shard: int, rank: int) -> Counter[str]:
    """Elements of parameters on a rank of the `rank`-th pipeline stage, as `Layout` divides them.

    `kept` stay on the rank, of them `experts` and those that `muon` updates; the rank computes with
    `blocks` and `ends`; `stack` is its largest stack of experts.
    """
    (before, after), shapes = _shapes(spec)
    layers = {str(layer) for layer in layers_of(rank, pipeline, spec.num_layers)}
    ends = (before if rank == 0 else ()) + (after if rank == pipeline - 1 else ())
    found: Counter[str] = Counter()
    for name, shape in shapes:
        part, layer, *_ = name.split(".")
        if layer in layers if part == "blocks" else part in ends:
            stacked = ".experts." in name
            rows, width = shape[0] // (expert if stacked else 1), prod(shape[1:])
            kept = -(-rows // shard) * width
            muon = part == "blocks" and ".router." not in name and len(shape) >= 2 + stacked
            found.update({"kept": kept, "experts": kept * stacked, "muon": kept * muon,
                          "blocks" if part == "blocks" else "ends": rows * width})
            found["stack"] = max(found["stack"], rows * width * stacked)
    return found


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


def memory_of(work: Work, sizes: dict[str, int], rank: int) -> dict[str, float]:
    """Bytes by part on a rank of the `rank`-th pipeline stage, at the worst moment of a step.

    `working` is needed for a while beside the rest: by the head (logits, their gradient, its own),
    by a block's backward pass (routed rows, gradients under way, gathered weights) or by Muon.
    """
    spec, tokens, (pipeline, data, expert, shard) = work.spec, work.tokens, _along_axes(sizes)
    found = count_elements(spec, pipeline, expert, shard, rank)
    layers = len(layers_of(rank, pipeline, spec.num_layers))
    flying = min(work.micro_batches(sizes), pipeline - rank)  # micro-batches under way
    recomputed = activations_per_token(spec) if work.recompute else 0
    per_layer = spec.d_model + 2 * spec.top_k if recomputed else activations_per_token(spec)
    activations = tokens * (flying * layers * per_layer + 3 * spec.d_model)
    head = spec.vocab_size * spec.d_model if rank == pipeline - 1 else 0
    logits = (2 * min(tokens * spec.vocab_size, BLOCK_ELSEWHERE) + flying * head) if head else 0
    backward = tokens * (spec.top_k * 2 * (spec.d_model + spec.d_ff) + recomputed)
    if shard > 1:  # of a block weights and gradients, and the next block's weights
        backward += found["ends"] + 3 * found["blocks"] // layers
    else:
        bucket = BUCKET if data * expert > 1 else 0
        backward += head + found["stack"] + min(bucket, found["kept"])
    muon = found["muon"] if work.rule == "muon" else 0  # its matrices, and products as large
    gathered = found["ends"] if shard > 1 else 0  # during the whole step
    return {part: FLOAT * count for part, count in {
        "weights": found["kept"] + gathered, "gradients": found["kept"],
        "optimizer": 2 * found["kept"] - muon, "activations": activations,
        "working": max(logits, backward, 5 * found["stack"] * bool(muon) - activations)}.items()}


def sent_by(work: Work, sizes: dict[str, int], rank: int) -> dict[str, float]:
    """Bytes by reason that a rank of the `rank`-th pipeline stage sends in a step.

    Sums go as in a ring, to gather every rank sends its part to each other; loads are balanced.
    """
    spec, micros, (pipeline, data, expert, shard) = (work.spec, work.micro_batches(sizes),
                                                     _along_axes(sizes))
    found = count_elements(spec, pipeline, expert, shard, rank)
    layers = len(layers_of(rank, pipeline, spec.num_layers))
    routing = spec.num_layers * 2 * (spec.num_experts + 1) if spec.num_experts > 1 else 0
    dense = found["kept"] - found["experts"]
    sent = {"gradients": FLOAT * (_ring(data * expert) * dense + _ring(data) * found["experts"]),
            "sums": COUNT * _ring(prod(sizes.values())) * (routing + 3)}  # weight, tokens, norm
    if shard > 1:  # per micro-batch: blocks gathered twice, ends once, gradients scattered
        sent["shards"] = FLOAT * (shard - 1) * micros * (3 * found["kept"] - found["ends"] / shard)
    if expert > 1:  # rows there and back, forward and backward; counts once
        rows, counts = work.tokens * spec.top_k * spec.d_model, COUNT * spec.num_experts
        sent["experts"] = (FLOAT * 4 * rows + counts) * layers * micros * (expert - 1) / expert
    if pipeline > 1:
        crossings = 2 - (rank == 0) - (rank == pipeline - 1)
        sent["pipeline"] = FLOAT * crossings * micros * work.tokens * spec.d_model
        if crossings < 2 and getattr(spec, "tied", False):  # both ends have the embedding
            sent["gradients"] += FLOAT * _ring(2) * spec.vocab_size * spec.d_model
    return sent


def _along_axes(sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(sizes[axis] for axis in AXES)


def _ring(ranks: int) -> float:
    """The bytes that a rank sends to sum one byte over `ranks`."""
    return 2 * (ranks - 1) / ranks


class Estimate(NamedTuple):
    """One layout: bytes per device by part, bytes each sends per step by reason, tokens/s."""

    sizes: dict[str, int]
    memory: dict[str, float]
    sent: dict[str, float]
    tokens_per_second: float


def estimate(work: Work, sizes: dict[str, int], device: Device) -> Estimate:
    """Memory and bytes of the pipeline stage that needs most, and the layout's speed."""
    memory, sent = (max((of(work, sizes, rank) for rank in range(sizes["pipeline"])),
                        key=lambda parts: sum(parts.values())) for of in (memory_of, sent_by))
    ranks, micros = prod(sizes.values()), work.micro_batches(sizes)
    tokens = work.batch_size * work.sequence_length
    flops = count_parameters(work.spec, work.sequence_length).flops_per_token * tokens
    busy = micros / (micros + sizes["pipeline"] - 1)  # the rest of the time stages wait for others
    compute = flops / ranks / (device.flops * UTILIZATION) / busy
    spans = {"shards": sizes["shard"], "experts": sizes["shard"] * sizes["expert"],
             "gradients": ranks // sizes["pipeline"]}  # all others reach beyond a machine
    times = {reason: count / (device.near if spans.get(reason, ranks + device.per_machine)
                              <= device.per_machine else device.far)
             for reason, count in sent.items()}
    waiting = times.pop("experts", 0.0)  # nothing hides an exchange; the others overlap
    return Estimate(sizes, memory, sent, tokens / (max(compute, sum(times.values())) + waiting))


def layouts(work: Work, gpus: int) -> Iterator[dict[str, int]]:
    """Every grid of `gpus` ranks that the model and the batch divide into."""
    divisors = [size for size in range(1, gpus + 1) if gpus % size == 0]
    for pipeline, expert, shard in product(divisors, repeat=3):
        if gpus % (pipeline * expert * shard) == 0:
            data = gpus // (pipeline * expert * shard)
            sizes = dict(zip(AXES, (pipeline, data, expert, shard), strict=True))
            with contextlib.suppress(ConfigError):
                check_fit(sizes, work.spec, work.batch_size, work.micro_batch,
                          work.sequence_length)
                yield sizes


def plan(work: Work, gpus: int, device: Device) -> list[Estimate]:
    """Layouts that fit into the memory of `gpus` devices, fastest first, then with less memory."""
    found = [estimate(work, sizes, device) for sizes in layouts(work, gpus)]
    fitting = [one for one in found if sum(one.memory.values()) <= RESERVE * device.memory]
    return sorted(fitting,
                  key=lambda one: (-round(one.tokens_per_second, -3), sum(one.memory.values())))
