"""What a run would need on N devices, before anybody rents them: memory, bytes, time, dollars.

Memory is that of tensors at the moment of a step that needs most. Speeds are estimates: the figures
of the data sheet times a measured utilization. A grid is the number of ranks along each of AXES.
"""
from __future__ import annotations

import contextlib
from collections import Counter
from functools import lru_cache
from itertools import product
from math import prod
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from fira.config import ConfigError
from fira.loss.head import BLOCK_ELSEWHERE
from fira.model import build_meta
from fira.model.transformer import count_parameters
from fira.parallel.layout import BUCKET
from fira.parallel.mesh import AXES, check_fit, describe_sizes
from fira.parallel.pipeline import layers_of

FLOAT = 4  # bytes of weights, gradients, optimizer state and activations
USABLE = 0.9  # the part of a device's memory that is planned; allocator and CUDA need the rest
UTILIZATION = 0.28  # of the data sheet's bf16 rate: NeMo AutoModel, Qwen3-30B-A3B on H100
Grid = tuple[int, ...]
Estimate = tuple[dict[str, float], dict[str, float], float]  # see `estimate`
build_shapes = lru_cache(maxsize=8)(build_meta)


class Device(NamedTuple):
    """One accelerator; the price is a typical one for renting it in 2025 (--price replaces it)."""

    memory: float  # bytes
    flops: float  # bf16 operations per second
    within: float  # bytes per second to a device of the same machine
    between: float  # bytes per second to a device of another machine
    per_machine: int
    price: float  # dollars per hour


DEVICES = {
    "h100-80g": Device(80e9, 989e12, 450e9, 50e9, 8, 2.5),
    "a100-80g": Device(80e9, 312e12, 300e9, 25e9, 8, 1.5),
    "a100-40g": Device(40e9, 312e12, 300e9, 25e9, 8, 1.2),
    "l40s-48g": Device(48e9, 362e12, 25e9, 12e9, 8, 1.0),
    "rtx4090-24g": Device(24e9, 165e12, 25e9, 3e9, 8, 0.5),
}


class Work(NamedTuple):
    """What is trained."""

    spec: Any
    batch_size: int  # sequences per step of all ranks
    micro_batch: int  # sequences per forward and backward pass of one rank
    sequence_length: int
    rule: str = "adamw"
    recompute: bool = False
    logits: int = BLOCK_ELSEWHERE  # held at a time


@lru_cache(maxsize=1024)
def count_elements(spec: Any, grid: Grid, stage: int) -> Counter[str]:
    """Layers of a pipeline stage on one rank, and elements of parameters before rows are sharded:
    in all, in experts, in blocks, those that Muon updates, and in the largest stack of experts."""
    model, layers = build_shapes(spec), layers_of(stage, grid[0], spec.num_layers)
    found = Counter(layers=len(layers))
    ends = (model.before if stage == 0 else ()) + (model.after if stage == grid[0] - 1 else ())
    for name, parameter in model.named_parameters():
        part, layer, *_ = name.split(".")
        if int(layer) in layers if part == "blocks" else part in ends:
            expert, block = ".experts." in name, part == "blocks"
            muon = block and ".router." not in name and parameter.dim() > 1 + expert
            size = parameter.numel() // (grid[2] if expert else 1)
            found.update({"all": size, "experts": size * expert, "blocks": size * block,
                          "muon": size * muon})
            found["stack"] = max(found["stack"], size * expert)
    return found


def activations_per_token(spec: Any) -> int:
    """Floats per token that one layer keeps until its backward pass: residual and norms; queries,
    keys and values as projected, normalized, rotated; the attention's output; routed rows around
    the experts and their activation function; the router's logits and choices."""
    D, K, F, E = spec.d_model, spec.top_k, spec.d_ff, spec.num_experts
    routed = 2 * K * D + (2 * E + 8 * K if E > 1 else -K * D)
    if spec.architecture == "fira2":
        HC, GC = spec.n_head * spec.head_dim, spec.n_kv_head * spec.head_dim
        return 6 * D + 4 * HC + 4 * GC + 4 * K * F + routed + 3 * spec.n_head
    return (10 if spec.dropout else 8) * D + 2 * K * F + routed + spec.n_head


def memory_of(work: Work, grid: Grid, stage: int) -> dict[str, float]:
    """Bytes by part on a rank of a pipeline stage. `working` is needed for part of a step only, by
    the head (logits, their gradient, its own gradient) or by a block's backward pass (routed rows,
    gradients that are being sent, gathered weights)."""
    (pipeline, data, expert, shard), spec = grid, work.spec
    found, tokens = count_elements(spec, grid, stage), work.micro_batch * work.sequence_length
    kept, ends = found["all"] / shard, found["all"] - found["blocks"]
    layers, per_layer = found["layers"], activations_per_token(spec)
    in_flight = min(work.batch_size // prod(grid[1:]) // work.micro_batch, pipeline - stage)
    backward = tokens * spec.top_k * 2 * (spec.d_model + spec.d_ff)
    if work.recompute:  # a block keeps its input and the choice of experts
        backward, per_layer = backward + tokens * per_layer, spec.d_model + 2 * spec.top_k
    activations = tokens * (in_flight * layers * per_layer + 3 * spec.d_model)
    head = spec.vocab_size * spec.d_model if stage == pipeline - 1 else 0
    logits = (2 * min(tokens * spec.vocab_size, work.logits) + in_flight * head) if head else 0
    if shard > 1:  # weights and gradients of a block, and the next block's weights
        backward += ends + 3 * found["blocks"] // layers
    else:
        backward += head + found["stack"] + (min(BUCKET, kept) if data * expert > 1 else 0)
    muon = found["muon"] / shard if work.rule == "muon" else 0
    return {part: FLOAT * count for part, count in {
        "weights": kept + (ends if shard > 1 else 0), "gradients": kept,
        "optimizer": 2 * kept - muon, "activations": activations,
        "working": max(logits, backward)}.items()}


def sent_by(work: Work, grid: Grid, stage: int) -> dict[str, float]:
    """Bytes by reason that a rank of a pipeline stage sends in a step, but for sums of counts.
    Sums go around a ring; to gather, a rank sends its part to each other; expert loads are even."""
    (pipeline, data, expert, shard), spec = grid, work.spec
    found, ranks = count_elements(spec, grid, stage), data * expert * shard
    micro_batches = work.batch_size // ranks // work.micro_batch
    tokens = work.batch_size // ranks * work.sequence_length
    ends, dense = found["all"] - found["blocks"], found["all"] - found["experts"]
    dense_sum = 2 * (data * expert - 1) / (data * expert) * dense
    sent = {"gradients": FLOAT * (dense_sum + 2 * (data - 1) / data * found["experts"]) / shard}
    if shard > 1:  # a micro-batch gathers blocks twice, the rest once, and scatters gradients
        sent["shards"] = FLOAT * (shard - 1) * micro_batches * (3 * found["all"] - ends) / shard
    if expert > 1:  # rows go there and back, forward and backward; counts of 8 bytes once
        rows = FLOAT * 4 * tokens * spec.top_k * spec.d_model + 8 * spec.num_experts * micro_batches
        sent["experts"] = rows * found["layers"] * (expert - 1) / expert
    if pipeline > 1:
        neighbors = 2 - (stage == 0) - (stage == pipeline - 1)
        sent["pipeline"] = FLOAT * neighbors * tokens * spec.d_model
        if neighbors < 2 and getattr(spec, "tied", False):  # first and last have the embedding
            sent["gradients"] += FLOAT * spec.vocab_size * spec.d_model
    return sent


def estimate(work: Work, grid: Grid, device: Device) -> Estimate:
    """The most bytes that a device holds by part and sends by reason, and tokens per second."""
    memory, sent = (max((of(work, grid, stage) for stage in range(grid[0])),
                        key=lambda parts: sum(parts.values())) for of in (memory_of, sent_by))
    tokens = work.batch_size * work.sequence_length
    micro_batches = work.batch_size // prod(grid[1:]) // work.micro_batch
    flops = count_parameters(build_shapes(work.spec), work.sequence_length).flops_per_token * tokens
    busy = micro_batches / (micro_batches + grid[0] - 1)  # the rest: a stage waits for others
    compute = flops / prod(grid) / (device.flops * UTILIZATION) / busy
    spans = {"shards": grid[3], "experts": grid[2] * grid[3], "gradients": prod(grid[1:]),
             "pipeline": device.per_machine + 1}
    times = {reason: count / (device.within if spans[reason] <= device.per_machine
                              else device.between) for reason, count in sent.items()}
    waiting = times.pop("experts", 0.0)  # an exchange of rows overlaps with nothing
    return memory, sent, tokens / (max(compute, sum(times.values())) + waiting)


def plan(work: Work, gpus: int, device: Device) -> list[tuple[dict[str, int], Estimate]]:
    """Every layout that fits into the memory of `gpus` devices, the fastest first."""
    found, divisors = [], [size for size in range(1, gpus + 1) if gpus % size == 0]
    for grid in product(divisors, repeat=len(AXES)):
        sizes = dict(zip(AXES, grid, strict=True))
        if prod(grid) == gpus:
            with contextlib.suppress(ConfigError):  # of a layout that does not divide the work
                check_fit(sizes, work.spec, *work[1:4])
                found.append((sizes, estimate(work, grid, device)))
    fitting = [one for one in found if sum(one[1][0].values()) <= USABLE * device.memory]
    return sorted(fitting, key=lambda one: -one[1][2])


def show_plan(preset: str, config: Any, gpus: int, device_name: str, tokens: float | None,
              price: float | None) -> None:
    """Print a preset's layouts. Raises ConfigError for an unknown device or where nothing fits."""
    if device_name not in DEVICES:
        raise ConfigError(f"device {device_name!r} is unknown; choose one of {', '.join(DEVICES)}")
    device, spec, train = DEVICES[device_name], config.model, config.train
    found = plan(Work(spec, train.batch_size, train.micro_batch, train.sequence_length,
                      config.optim.rule, train.recompute), gpus, device)
    if not found:
        raise ConfigError(f"no layout of {preset} fits {gpus} x {device_name}; use more --gpus, a "
                          "smaller train.micro_batch or another train.batch_tokens")
    count = count_parameters(build_shapes(spec))
    tokens = tokens or (train.steps or 0) * train.batch_tokens or 1e9
    table = Table("layout", title=f"{preset} on {gpus} x {device_name}: {count.total / 1e9:.2f}B "
                  f"parameters, {count.active / 1e9:.2f}B active; {tokens / 1e9:,.0f}B tokens")
    for heading in (*found[0][1][0], "all GB", "sent GB/step", "tokens/s", "days", "dollars"):
        table.add_column(heading, justify="right")
    for sizes, (memory, sent, speed) in found[:8]:
        sums = *memory.values(), sum(memory.values()), sum(sent.values())
        hours = tokens / speed / 3600
        cost = hours * gpus * (device.price if price is None else price)
        table.add_row(describe_sizes(sizes) or "one device", *(f"{one / 1e9:.1f}" for one in sums),
                      f"{speed:,.0f}", f"{hours / 24:.1f}", f"{cost:,.0f}")
    Console(highlight=False, width=140).print(
        table, f"{len(found)} layouts fit; speeds are estimates at {UTILIZATION:.0%} of the data"
        " sheet's rate, with even expert loads", soft_wrap=True)
