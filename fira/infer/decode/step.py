"""`FusedStep`: a model's decode step as one call of the compiled function in `kernel.py`."""
from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fira import runtime
from fira.infer.cache import SlotCache
from fira.infer.decode.kernel import decode_step
from fira.infer.decode.pack import AddressTable
from fira.model.transformer import KeyValueCache


class Scratch(NamedTuple):
    """Activations of S tokens; a pair is a token and one of its K experts.

    The first four are shared by the threads (ranks); each rank has its own part of the others.
    """

    x: np.ndarray  # [S, D], the residual stream
    qkv: np.ndarray  # [S, (H + 2G) C]
    mixed: np.ndarray  # [S, H C]
    hidden: np.ndarray  # [S K, F]
    normed: np.ndarray  # [ranks, S, D]
    scores: np.ndarray  # [ranks, context], of one attention head
    probs: np.ndarray  # [ranks, E], of one token
    weights: np.ndarray  # [ranks, S K]
    chosen: np.ndarray  # [ranks, S K], the expert of each pair, token by token
    order: np.ndarray  # [ranks, S K], the pairs sorted by expert
    starts: np.ndarray  # [ranks, E + 1], where the pairs of each expert start in `order`


def new_scratch(spec: Any, S: int, ranks: int) -> Scratch:
    D, H, G, C = spec.d_model, spec.n_head, spec.n_kv_head, spec.head_dim
    E, pairs = spec.num_experts, S * spec.top_k
    shared = [(S, D), (S, (H + 2 * G) * C), (S, H * C), (pairs, spec.d_ff)]
    own = [(S, D), (spec.context,), (E,), (pairs,), (pairs,), (pairs,), (E + 1,)]
    shapes = shared + [(ranks, *shape) for shape in own]
    integers = ("chosen", "order", "starts")
    return Scratch(*(np.empty(shape, np.int64 if name in integers else np.float32)
                     for name, shape in zip(Scratch._fields, shapes, strict=True)))


class FusedStep:
    """One decode step of a model over slots of a key-value cache.

    In float32 the step reads the model's own weights; with `precision` int8 or int4 it reads
    quantized copies of them, 1.0 or 0.6 bytes per weight. Not for use by two threads at once.
    """

    def __init__(self, model: Any, precision: str = "float32", threads: int | None = None) -> None:
        self.model, self.spec, self.precision = model, model.spec, precision
        self.threads = Threads(decode_step, threads or min(torch.get_num_threads(),
                                                           runtime.workers()))
        self.barrier = np.zeros(1, np.int64)
        self.scratch = new_scratch(self.spec, 1, self.threads.count)
        self.refresh()

    def refresh(self) -> None:
        """Read the model's weights anew, after they were changed or replaced.

        float32 weights changed in place are seen without it; quantized copies are not.
        """
        self.table = AddressTable(self.model, self.precision)

    def step(self, tokens_S: Any, positions_S: Any, slots_S: Any, keys: Sequence[Tensor],
             values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits [S, V] after the tokens, and the experts chosen for them, [L, S, K].

        tokens_S[s] stands at positions_S[s] of slot slots_S[s]. `keys` and `values` hold one cache
        [slots, G, T, C] per layer; the step writes the new tokens' rows, and all earlier positions
        must be filled. Raises ValueError for a number out of range.
        """
        tokens, positions, slots = (np.asarray(x, np.int64) for x in
                                    (tokens_S, positions_S, slots_S))
        self._check(tokens, positions, slots, keys[0])
        if len(tokens) != len(self.scratch.x):
            self.scratch = new_scratch(self.spec, len(tokens), self.threads.count)
        self.scratch.x[:] = self._embed(tokens, positions)
        self._bind(keys, values)
        logits = np.empty((len(tokens), self.spec.vocab_size), np.float32)
        experts = np.empty((self.spec.num_layers, len(tokens), self.spec.top_k), np.int64)
        self.threads.run(self.table.model, self.table.layers, self.scratch, self.barrier,
                         positions, slots, logits, experts)
        return torch.from_numpy(logits), torch.from_numpy(experts)

    def __call__(self, tokens_B: Tensor, cache: KeyValueCache) -> Tensor:
        """Logits [B, V] after one more token of every row: a `fira.model.generate.Step`."""
        B = len(tokens_B)
        logits_BV, _ = self.step(tokens_B, np.full(B, cache.length), np.arange(B),
                                 [layer.keys_BGSC for layer in cache.layers],
                                 [layer.values_BGSC for layer in cache.layers])
        for layer in cache.layers:
            layer.length += 1
        return logits_BV

    @property
    def decode(self) -> EngineStep:
        """The engine's `DecodeStep`."""
        return EngineStep(self)

    def _embed(self, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """What the first block reads, [S, D]. Compiled, it would save 4% of a very small step."""
        x_SD = self.model.token_embedding(torch.from_numpy(tokens))
        if hasattr(self.model, "position_embedding"):
            x_SD = x_SD + self.model.position_embedding(torch.from_numpy(positions))
        return x_SD.detach().numpy()

    def _bind(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Enter the caches into the table."""
        strides = keys[0].stride()
        assert strides[2:] == (self.spec.head_dim, 1) and keys[0].dtype == torch.float32, strides
        assert all(cache.stride() == strides for cache in (*keys, *values)), strides
        self.table.model["slot_stride"], self.table.model["group_stride"] = strides[:2]
        self.table.layers["keys"] = [cache.data_ptr() for cache in keys]
        self.table.layers["values"] = [cache.data_ptr() for cache in values]

    def _check(self, tokens: np.ndarray, positions: np.ndarray, slots: np.ndarray,
               keys_SGTC: Tensor) -> None:
        """Refuse numbers with which compiled code would read or write outside of its memory."""
        capacity = min(keys_SGTC.shape[2], self.spec.context)
        for name, numbers, limit in (("token", tokens, self.spec.vocab_size),
                                     ("position", positions, capacity),
                                     ("slot", slots, len(keys_SGTC))):
            if len(numbers) != len(tokens) or min(numbers) < 0 or max(numbers) >= limit:
                raise ValueError(f"{name}s {numbers.tolist()} must be {len(tokens)} numbers from 0 "
                                 f"to {limit - 1}; check the call of the step")
        if len(set(slots.tolist())) < len(slots):
            raise ValueError(f"slots {slots.tolist()} repeat; give each sequence its own")


class EngineStep(NamedTuple):
    """A `FusedStep` as the engine calls it (`fira.infer.cache.DecodeStep`)."""

    fused: FusedStep

    def __call__(self, model: Any, cache: SlotCache, tokens_N: Tensor, positions_N: Tensor,
                 slots: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        logits_NV, experts_LNK = self.fused.step(tokens_N, positions_N, slots, list(cache.keys),
                                                 list(cache.values))
        return logits_NV, experts_LNK if self.fused.spec.num_experts > 1 else None

    def refresh(self) -> None:
        self.fused.refresh()


class Threads:
    """`run(*arguments)` calls function(rank, count, *arguments) on `count` threads at once.

    The caller is rank 0; the other threads wait on a lock between calls. With a ThreadPoolExecutor
    in its place a step of a small model (d_model=128, 4 layers) took 6 to 20% longer.
    `function` must release the GIL and end with a barrier, so that no call outlives `run`.
    """

    def __init__(self, function: Callable[..., None], count: int) -> None:
        self.function, self.count = function, count
        self._arguments: list[Any] = [()]  # those of the next call; None ends the threads
        self._locks = [threading.Lock() for _ in range(count - 1)]
        for rank, lock in enumerate(self._locks, start=1):
            lock.acquire()
            threading.Thread(target=_serve, args=(function, rank, count, lock, self._arguments),
                             name=f"decode-{rank}", daemon=True).start()
        weakref.finalize(self, _start, self._locks, self._arguments, None)

    def run(self, *arguments: Any) -> None:
        _start(self._locks, self._arguments, arguments)
        self.function(0, self.count, *arguments)


def _start(locks: list[Any], shared: list[Any], arguments: tuple[Any, ...] | None) -> None:
    shared[0] = arguments
    for lock in locks:
        lock.release()


def _serve(function: Callable[..., None], rank: int, count: int, lock: Any,
           shared: list[Any]) -> None:
    while lock.acquire() and shared[0] is not None:
        function(rank, count, *shared[0])
