"""What a run would need on N devices, before anybody rents them: memory, bytes, time, dollars.

Memory is that of tensors at the worst moment of a step. Speeds are estimates: sheet figures of the
device times a measured utilization. A grid is the number of ranks along each of AXES.
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
from fira.model.files import build_meta
from fira.model.transformer import count_parameters
from fira.parallel.layout import BUCKET
from fira.parallel.mesh import AXES, check_fit, describe_sizes
from fira.parallel.pipeline import layers_of

FLOAT = 4  # bytes of weights, gradients, optimizer state and activations
RESERVE = 0.9  # of a device's memory may be planned; the rest is the allocator's and CUDA's
UTILIZATION = 0.28  # of the sheet's bf16 rate: NeMo AutoModel, Qwen3-30B-A3B on H100
Grid = tuple[int, int, int, int]
build_shapes = lru_cache(maxsize=8)(build_meta)


class Device(NamedTuple):
    """Bytes, bf16 FLOP/s, bytes/s within and beyond a machine of `per_machine`, dollars per hour
    (a typical list price of rented ones in 2025; --price replaces it)."""

    memory: float
    flops: float
    near: float
    far: float
    per_machine: int
    price: float


DEVICES = {
    "h100-80g": Device(80e9, 989e12, 450e9, 50e9, 8, 2.5),
    "a100-80g": Device(80e9, 312e12, 300e9, 25e9, 8, 1.5),
    "a100-40g": Device(40e9, 312e12, 300e9, 25e9, 8, 1.2),
    "l40s-48g": Device(48e9, 362e12, 25e9, 12e9, 8, 1.0),
    "rtx4090-24g": Device(24e9, 165e12, 25e9, 3e9, 8, 0.5),
}


class Work(NamedTuple):
    """What is trained; micro-batches and sequences per step are those of all ranks together."""

    spec: Any
    batch_size: int  # sequences per step
    micro_batch: int  # sequences per forward and backward pass of a rank
    sequence_length: int
    rule: str = "adamw"
    recompute: bool = False


@lru_cache(maxsize=1024)
def count_elements(spec: Any, grid: Grid, stage: int) -> Counter[str]:
    """A pipeline stage's layers and elements of parameters on a rank, before rows are sharded: all,
    of them in experts, in blocks, and updated by Muon; the largest stack of experts."""
    model, found = build_shapes(spec), Counter[str]()
    layers = layers_of(stage, grid[0], spec.num_layers)
    found["layers"] = len(layers)
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
    """Floats that one layer keeps of a token until its backward pass: residual and norms; queries,
    keys and values as projected, normalized, rotated; the attention's output; routed rows around
    the experts and their activation function; the router's logits and choices."""
    D, K, F, E = spec.d_model, spec.top_k, spec.d_ff, spec.num_experts
    routed = 2 * K * D + (2 * E + 8 * K if E > 1 else -K * D)
    if spec.architecture == "fira2":
        HC, GC = spec.n_head * spec.head_dim, spec.n_kv_head * spec.head_dim
        return 6 * D + 4 * HC + 4 * GC + 4 * K * F + routed + 3 * spec.n_head
    dropped = 2 * D if spec.dropout else 0
    return 8 * D + dropped + 2 * K * F + routed + spec.n_head


def memory_of(work: Work, grid: Grid, stage: int) -> dict[str, float]:
    """Bytes by part on a rank of a pipeline stage. `working` is needed for a while only: by the
    head (logits, their gradient, its own) or by a block's backward pass (routed rows, gradients
    under way, gathered weights)."""
    (pipeline, data, expert, shard), spec = grid, work.spec
    found, tokens = count_elements(spec, grid, stage), work.micro_batch * work.sequence_length
    kept, ends = found["all"] / shard, found["all"] - found["blocks"]
    layers, per_layer = found["layers"], activations_per_token(spec)
    flying = min(work.batch_size // prod(grid[1:]) // work.micro_batch, pipeline - stage)
    backward = tokens * spec.top_k * 2 * (spec.d_model + spec.d_ff)
    if work.recompute:  # of each block its input and the experts chosen
        backward, per_layer = backward + tokens * per_layer, spec.d_model + 2 * spec.top_k
    activations = tokens * (flying * layers * per_layer + 3 * spec.d_model)
    head = spec.vocab_size * spec.d_model if stage == pipeline - 1 else 0
    logits = (2 * min(tokens * spec.vocab_size, BLOCK_ELSEWHERE) + flying * head) if head else 0
    if shard > 1:  # of a block weights and gradients, and the next block's weights
        backward += ends + 3 * found["blocks"] // layers
    else:
        backward += head + found["stack"] + (min(BUCKET, kept) if data * expert > 1 else 0)
    muon = found["muon"] / shard if work.rule == "muon" else 0
    return {part: FLOAT * count for part, count in {
        "weights": kept + (ends if shard > 1 else 0), "gradients": kept,
        "optimizer": 2 * kept - muon, "activations": activations,
        "working": max(logits, backward)}.items()}


def sent_by(work: Work, grid: Grid, stage: int) -> dict[str, float]:
    """Bytes by reason that a rank of a pipeline stage sends in a step, without sums of counts. Sums
    go as in a ring, to gather every rank sends its part to each other; loads are balanced."""
    (pipeline, data, expert, shard), spec = grid, work.spec
    found, ranks = count_elements(spec, grid, stage), data * expert * shard
    micros = work.batch_size // ranks // work.micro_batch
    tokens = work.batch_size // ranks * work.sequence_length
    ends, dense = found["all"] - found["blocks"], found["all"] - found["experts"]
    dense_sum = 2 * (data * expert - 1) / (data * expert) * dense
    sent = {"gradients": FLOAT * (dense_sum + 2 * (data - 1) / data * found["experts"]) / shard}
    if shard > 1:  # per micro-batch: blocks gathered twice, ends once, gradients scattered
        sent["shards"] = FLOAT * (shard - 1) * micros * (3 * found["all"] - ends) / shard
    if expert > 1:  # rows there and back, forward and backward; counts of 8 bytes once
        rows = FLOAT * 4 * tokens * spec.top_k * spec.d_model + 8 * spec.num_experts * micros
        sent["experts"] = rows * found["layers"] * (expert - 1) / expert
    if pipeline > 1:
        neighbors = 2 - (stage == 0) - (stage == pipeline - 1)
        sent["pipeline"] = FLOAT * neighbors * tokens * spec.d_model
        if neighbors < 2 and getattr(spec, "tied", False):  # both ends have the embedding
            sent["gradients"] += FLOAT * spec.vocab_size * spec.d_model
    return sent


Estimate = tuple[dict[str, float], dict[str, float], float]


def estimate(work: Work, grid: Grid, device: Device) -> Estimate:
    """Bytes that a device holds by part and sends by reason, at most, and tokens per second."""
    memory, sent = (max((of(work, grid, stage) for stage in range(grid[0])),
                        key=lambda parts: sum(parts.values())) for of in (memory_of, sent_by))
    tokens = work.batch_size * work.sequence_length
    micros = work.batch_size // prod(grid[1:]) // work.micro_batch
    flops = count_parameters(build_shapes(work.spec), work.sequence_length).flops_per_token * tokens
    busy = micros / (micros + grid[0] - 1)  # the rest of the time stages wait for others
    compute = flops / prod(grid) / (device.flops * UTILIZATION) / busy
    spans = {"shards": grid[3], "experts": grid[2] * grid[3], "gradients": prod(grid[1:]),
             "pipeline": device.per_machine + 1}
    times = {reason: count / (device.near if spans[reason] <= device.per_machine else device.far)
             for reason, count in sent.items()}
    waiting = times.pop("experts", 0.0)  # nothing hides an exchange; the others overlap
    return memory, sent, tokens / (max(compute, sum(times.values())) + waiting)


def plan(work: Work, gpus: int, device: Device) -> list[tuple[dict[str, int], Estimate]]:
    """Every layout that fits into the memory of `gpus` devices, the fastest first."""
    found, divisors = [], [size for size in range(1, gpus + 1) if gpus % size == 0]
    for pipeline, expert, shard in product(divisors, repeat=3):
        grid = pipeline, gpus // (pipeline * expert * shard), expert, shard
        sizes = dict(zip(AXES, grid, strict=True))
        if prod(grid) == gpus:
            with contextlib.suppress(ConfigError):  # what cannot be divided so
                check_fit(sizes, work.spec, *work[1:4])
                found.append((sizes, estimate(work, grid, device)))
    fitting = [one for one in found if sum(one[1][0].values()) <= RESERVE * device.memory]
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
        gigabytes = [size / 1e9 for size in (*memory.values(), sum(memory.values()),
                                             sum(sent.values()))]
        hours = tokens / speed / 3600
        cost = hours * gpus * (device.price if price is None else price)
        table.add_row(describe_sizes(sizes) or "one device", *(f"{size:.1f}" for size in gigabytes),
                      f"{speed:,.0f}", f"{hours / 24:.1f}", f"{cost:,.0f}")
    Console(highlight=False, width=140).print(
        table, f"{len(found)} layouts fit; speeds are estimates at {UTILIZATION:.0%} of the sheet's"
        " rate, balanced loads", soft_wrap=True)
