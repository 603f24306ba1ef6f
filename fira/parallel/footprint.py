"""What one rank of a layout holds and sends in a step, from the shapes of the code.

Parameters come from the model on the meta device, activations from what its layers keep for the
backward pass, bytes sent from what the room's own exchanges move. Memory is that of tensors at the
worst moment; benchmarks/plan_memory.py holds it against whole processes.
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

from fira.loss.head import BLOCK_ELSEWHERE
from fira.model.files import build_meta
from fira.parallel.pipeline import SCHEDULES, blocks_of, stages_of
from fira.parallel.replicate import BUCKET

FLOAT = 4  # bytes: weights, gradients, optimizer state and the residual stream are float32
COUNT = 8  # bytes of what is counted, and of sums of it


@dataclass(frozen=True)
class Work:
    """What is trained: sequences a step and a micro-batch, tokens in each, the optimizer's rule."""

    spec: Any
    batch_size: int
    micro_batch: int
    sequence_length: int
    rule: str = "adamw"
    recompute: bool = False

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.micro_batch * self.sequence_length


class Weight(NamedTuple):
    """A parameter that a rank holds, whole or its rows."""

    name: str
    shape: tuple[int, ...]  # with the experts of this rank
    stays: tuple[int, ...]  # the rows of it that stay here when it is not in use

    @property
    def expert(self) -> bool:
        return ".experts." in self.name

    @property
    def in_block(self) -> bool:
        return self.name.startswith("blocks.")

    @property
    def matrix(self) -> bool:
        """Is it Muon's?"""
        return (self.in_block and ".router." not in self.name
                and len(self.shape) >= (3 if self.expert else 2))


class Held(NamedTuple):
    """The parameters of one pipeline rank, its layers, and whether it begins or ends the model."""

    weights: tuple[Weight, ...]
    layers: int
    first: bool
    last: bool

    def here(self, **where: bool) -> int:
        """Elements that stay on this rank, of the weights whose properties are as given."""
        return sum(prod(weight.stays) for weight in self.those(where))

    def whole(self, **where: bool) -> int:
        """Elements that this rank computes with."""
        return sum(prod(weight.shape) for weight in self.those(where))

    def those(self, where: dict[str, bool]) -> list[Weight]:
        return [weight for weight in self.weights
                if all(getattr(weight, key) == value for key, value in where.items())]


@lru_cache(maxsize=8)
def _shapes(spec: Any) -> tuple[Any, list[tuple[str, tuple[int, ...]]]]:
    model = build_meta(spec)
    return model, [(name, tuple(p.shape)) for name, p in model.named_parameters()]


def hold(spec: Any, sizes: dict[str, int], schedule: str, rank: int) -> Held:
    """What the `rank`-th of a pipeline's ranks holds, cut as `keep_stages` and its like cut."""
    return _hold(spec, sizes["pipeline"], sizes["expert"], sizes["shard"], schedule, rank)


@lru_cache(maxsize=512)
def _hold(spec: Any, ranks: int, experts: int, shards: int, schedule: str, rank: int) -> Held:
    model, shapes = _shapes(spec)
    stages = ranks * SCHEDULES[schedule][1] if ranks > 1 else 1
    held = stages_of(rank, ranks, schedule) if ranks > 1 else [0]
    layers = {str(layer) for stage in held for layer in blocks_of(stage, stages, spec.num_layers)}
    first, last = 0 in held, stages - 1 in held
    parts = (model.before if first else ()) + (model.after if last else ())
    weights = []
    for name, shape in shapes:
        part, layer = name.split(".")[:2]
        if layer in layers if part == "blocks" else part in parts:
            rows = shape[0] // (experts if ".experts." in name else 1)
            weights.append(Weight(name, (rows, *shape[1:]), (-(-rows // shards), *shape[1:])))
    return Held(tuple(weights), len(layers), first, last)


def activations_per_token(spec: Any) -> int:
    """Floats that one layer keeps of a token until its backward pass, in float32 on any device.

    Of width D: residual and norms around attention and experts; queries, keys and values as the
    projection made them, normalized, rotated; the attention's output; routed rows before and after
    the experts; what the activation function's gradient needs; the router's logits and choices.
    Small experts on a CPU keep 2 * K * F fewer (batched.BatchedSwiGLU).
    """
    D, K, F, E = spec.d_model, spec.top_k, spec.d_ff, spec.num_experts
    routed = 2 * K * D + (2 * E + 8 * K if E > 1 else -K * D)
    if spec.architecture == "fira2":
        HC, GC = spec.n_head * spec.head_dim, spec.n_kv_head * spec.head_dim
        return 6 * D + 4 * HC + 4 * GC + 4 * K * F + routed + 3 * spec.n_head
    dropped = 2 * D if spec.dropout else 0
    return 8 * D + dropped + 2 * K * F + routed + spec.n_head


def memory(work: Work, sizes: dict[str, int], schedule: str) -> dict[str, float]:
    """Bytes by part on the rank that needs most; their sum is the worst moment of a step."""
    ranks = [memory_of(work, sizes, schedule, rank) for rank in range(sizes["pipeline"])]
    return max(ranks, key=lambda parts: sum(parts.values()))


def memory_of(work: Work, sizes: dict[str, int], schedule: str, rank: int) -> dict[str, float]:
    """Bytes by part on the `rank`-th of a pipeline's ranks.

    `logits` is what the head needs in its forward pass, its own gradient included; `working` what
    the worst other moment needs beyond activations and logits.
    """
    spec, tokens = work.spec, work.tokens
    held = hold(spec, sizes, schedule, rank)
    flying = in_flight(sizes["pipeline"], micro_batches(work, sizes), schedule, rank)
    kept = flying * held.layers * activations_per_token(spec)
    if work.recompute:  # of each block its input and the experts chosen
        kept = flying * held.layers * (spec.d_model + 2 * spec.top_k)
    activations = tokens * (kept + 3 * spec.d_model)
    head = spec.vocab_size * spec.d_model if held.last else 0
    logits = (2 * min(tokens * spec.vocab_size, BLOCK_ELSEWHERE) + flying * head) if head else 0
    working = max(_backward(work, sizes, held, head) - logits,
                  _muon(held) - activations - logits if work.rule == "muon" else 0, 0)
    ends = held.whole(in_block=False) - held.here(in_block=False)  # stay gathered in a step
    here = held.here()
    muon = held.here(matrix=True) if work.rule == "muon" else 0
    return {part: FLOAT * count for part, count in {
        "weights": here + ends, "gradients": here, "optimizer": 2 * here - muon,
        "activations": activations, "logits": logits, "working": working}.items()}


def _backward(work: Work, sizes: dict[str, int], held: Held, head: int) -> int:
    """Elements beside activations while a block runs backward: gradients on their way to where they
    are added, routed rows, and what is computed again."""
    spec = work.spec
    rows = work.tokens * spec.top_k * 2 * (spec.d_model + spec.d_ff)
    if work.recompute:
        rows += work.tokens * activations_per_token(spec)
    if sizes["shard"] == 1:
        largest = max(prod(weight.shape) for weight in held.weights)
        bucket = max(BUCKET, largest) if sizes["data"] * sizes["expert"] > 1 else 0
        return head + rows + max((prod(weight.shape) for weight in held.weights if weight.expert),
                                 default=0) + min(bucket, held.here())
    layer = held.whole(in_block=True) // max(1, held.layers)
    # of a block the weights, the gradients, and the next block's weights or what leaves
    return held.whole(in_block=False) + rows + 3 * layer


def _muon(held: Held) -> int:
    """Elements that orthogonalizing the largest matrices takes: three of their size, two of their
    squares."""
    return max((3 * size + 2 * size * min(weight.shape[-2:]) // max(weight.shape[-2:])
                for weight in held.weights if weight.matrix
                for size in [prod(weight.stays if weight.expert else weight.shape)]), default=0)


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
    """Bytes by reason that a rank sends in a step, of the rank that sends most."""
    ranks = [sent_by(work, sizes, schedule, rank) for rank in range(sizes["pipeline"])]
    return max(ranks, key=lambda sent: sum(sent.values()))


def sent_by(work: Work, sizes: dict[str, int], schedule: str, rank: int) -> dict[str, float]:
    """Bytes by reason that the `rank`-th of a pipeline's ranks sends in a step.

    Sums go as in a ring, of gathering every rank sends its part to each other; loads are balanced.
    """
    spec, held = work.spec, hold(work.spec, sizes, schedule, rank)
    data, shard, expert, pipeline = (sizes[axis] for axis in ("data", "shard", "expert",
                                                              "pipeline"))
    micros, ranks = micro_batches(work, sizes), prod(sizes.values())
    routing = spec.num_layers * 2 * (spec.num_experts + 1) if spec.num_experts > 1 else 0
    sent = {"gradients": FLOAT * (ring(data * expert) * held.here(expert=False)
                                  + ring(data) * held.here(expert=True)),
            "sums": COUNT * ring(ranks) * (routing + 2)}  # loss, gradient norm
    if work.rule == "muon" and shard == 1:  # each rank's share of the orthogonalized matrices
        sent["matrices"] = FLOAT / 2 * (ring(data * expert) * held.here(expert=False, matrix=True)
                                        + ring(data) * held.here(expert=True, matrix=True))
    if shard > 1:  # per micro-batch, gathered forward and backward, gradients scattered
        sent["shards"] = FLOAT * (shard - 1) * micros * 3 * held.here()
    if expert > 1:  # there and back, forward and backward; counts once
        rows = work.tokens * spec.top_k * held.layers * micros
        counts = COUNT * spec.num_experts * held.layers * micros
        sent["experts"] = (FLOAT * 4 * rows * spec.d_model + counts) * (expert - 1) / expert
    if pipeline > 1:
        crossings = 2 * SCHEDULES[schedule][1] - held.first - held.last
        sent["pipeline"] = FLOAT * crossings * micros * work.tokens * spec.d_model
        if (held.first or held.last) and getattr(spec, "tied", False):  # both have the embedding
            sent["gradients"] += FLOAT * ring(2) * spec.vocab_size * spec.d_model
    return sent


def ring(ranks: int) -> float:
    """What a rank sends, over what it sums."""
    return 2 * (ranks - 1) / ranks
