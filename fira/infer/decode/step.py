"""`FusedStep`: a model's decode step as one call of the compiled function in `kernel.py`.

The compiled function finds the weights by a table of addresses in torch's memory; nothing is
copied. Each matrix has its own precision. Activations are float32. A part that a model does not
have (a bias, a rotation, a gate, a router) has address 0.
"""
from __future__ import annotations

import collections
import copy
import itertools
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fira import runtime
from fira.convert.quantize import Quantized, quantize
from fira.infer.cache import Part, SlotCache
from fira.infer.decode.kernel import decode_step
from fira.infer.decode.product import FLOAT32, INT4, INT8, MOST_ROWS
from fira.model import build_meta
from fira.model.transformer import count_parameters

PARTS = {  # the matrices and norms of a layer, and where they are in a block
    "attention_norm": "attention_norm", "qkv": "attention.qkv",
    "query_norm": "attention.query_norm", "key_norm": "attention.key_norm",
    "output": "attention.output", "moe_norm": "moe_norm", "router": "moe.router",
    "gate": "moe.experts.gate", "up": "moe.experts.up", "down": "moe.experts.down"}
MATRIX = np.dtype([(name, np.int64) for name in ("weight", "scale", "bias", "precision", "rows")])
LAYER = np.dtype([(name, MATRIX) for name in PARTS]
                 + [(name, np.int64) for name in (
                     "selection_bias", "renormalize", "keys", "values")])
MODEL = np.dtype([(name, np.int64) for name in (
    "heads", "kv_heads", "head_width", "cosines", "sines", "slot_stride", "group_stride",
    "half_cache")] + [
    ("norm", MATRIX), ("head", MATRIX), ("epsilon", np.float64)])
# The step reads a prompt of 64 tokens in 0.46 (d_model=128) to 0.71 (fira-334m) of the time that
# the model's own forward takes on one thread in float32, and in 0.44 to 0.61 in int8.
PROMPT_TOKENS = 64
# Bytes of float32 weights that stay in the processor's cache: for one token they are read there in
# 0.6 of the time if a block has four rows, and from memory in 0.8 if it has one. int8 weights are
# never read slower in four rows.
IN_CACHE = 2**25
# Parameters times tokens of a step that one thread computes alone: in `fira serve` with the
# quickstart's model it then has 1.27 (one client) and 1.04 (four) of the rate of two threads.
ALONE = 2**23
Scratch = collections.namedtuple(
    "Scratch", "x qkv mixed hidden gates tokens ones normed scores buffer probs weights chosen "
    "order owners factors starts")


def new_scratch(spec: Any, S: int, ranks: int) -> Scratch:
    """Activations of S tokens; a pair is a token and one of its K experts.

    The first seven are shared by the threads (ranks); each rank has its own part of the others.
    """
    H, G, C, pairs = spec.n_head, spec.n_kv_head, spec.head_dim, S * spec.top_k
    floats, integers = partial(np.empty, dtype=np.float32), partial(np.empty, dtype=np.int64)
    return Scratch(
        x=floats((S, spec.d_model)),  # the residual stream
        qkv=floats((S, (H + 2 * G) * C)),
        mixed=floats((S, H * C)),
        hidden=floats((pairs, spec.d_ff)),
        gates=floats((pairs, spec.d_ff)),
        tokens=np.arange(S),
        ones=np.ones(pairs, np.float32),
        normed=floats((ranks, S, spec.d_model)),
        scores=floats((ranks, spec.context)),  # of one attention head
        buffer=floats((ranks, C)),  # a key or a value
        probs=floats((ranks, S, spec.num_experts)),
        weights=floats((ranks, pairs)),
        chosen=integers((ranks, pairs)),  # the expert of each pair, token by token
        order=integers((ranks, pairs)),  # the pairs sorted by expert,
        owners=integers((ranks, pairs)),  # their tokens
        factors=floats((ranks, pairs)),  # and their weights
        starts=integers((ranks, spec.num_experts + 1)))  # where an expert's pairs start in `order`


class FusedStep:
    """One decode step of a model over slots of a key-value cache.

    In float32 the step reads the model's own weights; with `precision` int8 or int4 it reads
    quantized copies of them, 1.0 or 0.6 bytes per weight. Not for use by two threads at once.
    `prompt_tokens` is the number of prompt tokens that it may read at once in the model's place.
    """

    def __init__(self, model: Any, precision: str = "float32", threads: int | None = None) -> None:
        self.model, self.spec, self.precision = model, model.spec, precision
        self.prompt_tokens = PROMPT_TOKENS if precision == "float32" else 0  # as exact as the model
        self.threads = Threads(decode_step, threads or min(torch.get_num_threads(),
                                                           runtime.workers()))
        self.barriers = np.zeros(2, np.int64)
        self.active = count_parameters(build_meta(self.spec)).active
        self.scratch = new_scratch(self.spec, 1, self.threads.count)
        self.refresh()

    def refresh(self) -> None:
        """Read the model's weights anew, after they were changed or replaced.

        float32 weights changed in place are seen without it; quantized copies are not.
        """
        self.table = AddressTable(self.model, self.precision)

    def __call__(self, model: Any, cache: SlotCache, tokens_N: Tensor,
                 parts: Sequence[Part]) -> tuple[Tensor, Tensor | None]:
        """The engine's `DecodeStep`; all earlier positions of the slots must be filled."""
        slots, starts, sizes = np.array(parts, np.int64).T
        ends = sizes.cumsum()
        positions = np.arange(len(tokens_N)) + np.repeat(starts + sizes - ends, sizes)
        self._check(tokens_N.numpy(), positions, slots, cache)
        if len(positions) != len(self.scratch.x):
            self.scratch = new_scratch(self.spec, len(positions), self.threads.count)
        self.scratch.x[:] = self._embed(tokens_N, torch.from_numpy(positions))
        self._bind(cache)
        logits = np.empty((len(parts), self.spec.vocab_size), np.float32)
        experts = np.empty((self.spec.num_layers, len(positions), self.spec.top_k), np.int64)
        many = len(positions) * self.active > ALONE
        run = self.threads.run if many else partial(decode_step, 0, 1)
        barrier = self.barriers[many:many + 1]  # it counts calls, so each number of threads has one
        run(self.table.model, self.table.layers, self.scratch, barrier, positions,
            np.repeat(slots, sizes), ends - 1, logits, experts)
        return (torch.from_numpy(logits),
                torch.from_numpy(experts) if self.spec.num_experts > 1 else None)

    def _embed(self, tokens_N: Tensor, positions_N: Tensor) -> np.ndarray:
        """What the first block reads, [N, D]. Compiled, it would save 4% of the smallest step."""
        x_ND = self.model.token_embedding(tokens_N)
        if hasattr(self.model, "position_embedding"):
            x_ND = x_ND + self.model.position_embedding(positions_N)
        return x_ND.detach().numpy()

    def _bind(self, cache: SlotCache) -> None:
        """Enter the addresses of the cache's rows into the table."""
        layer_stride, *strides = cache.keys.stride()[:3]
        offsets = cache.keys.itemsize * layer_stride * np.arange(self.spec.num_layers)
        self.table.model["slot_stride"], self.table.model["group_stride"] = strides
        self.table.model["half_cache"] = cache.keys.dtype == torch.float16
        self.table.layers["keys"] = cache.keys.data_ptr() + offsets
        self.table.layers["values"] = cache.values.data_ptr() + offsets

    def _check(self, tokens: np.ndarray, positions: np.ndarray, slots: np.ndarray,
               cache: SlotCache) -> None:
        """Stop before compiled code would read or write outside of its memory."""
        for rows in (cache.keys, cache.values):
            assert rows.dtype in (torch.float32, torch.float16), rows.dtype
            assert rows.is_contiguous(), rows.shape
        assert len(tokens) == len(positions), (tokens, positions)
        _, num_slots, _, capacity, _ = cache.keys.shape
        for numbers, limit in ((tokens, self.spec.vocab_size), (slots, num_slots),
                               (positions, min(capacity, self.spec.context))):
            assert 0 <= min(numbers) and max(numbers) < limit, (numbers, limit)
        assert len(set(slots.tolist())) == len(slots), slots


class AddressTable:
    """`model`, one record of type MODEL, and `layers`, records of type LAYER.

    `tensors` are all that the table points at; holding them keeps their memory alive.
    """

    def __init__(self, model: Any, precision: str = "float32") -> None:
        """With precision int8 or int4, a float32 model's matrices are quantized as copies."""
        self.tensors: list[Tensor] = []
        spec, size = model.spec, sum(weight.nbytes for weight in model.parameters())
        self.rows = MOST_ROWS if size < IN_CACHE else 1  # of a block with one token, in float32
        if precision != "float32":
            kept = itertools.chain(model.parameters(), model.buffers())
            shared = {id(tensor): tensor for tensor in kept}  # those that stay float32
            model = quantize(copy.deepcopy(model, shared), precision)
        self.layers = np.array([(
            *(self._matrix(_find(block, path)) for path in PARTS.values()),
            self._address(_find(block, "moe.router.selection_bias_E")),
            bool(_find(block, "moe.router.renormalize")), 0, 0)
            for block in model.blocks], LAYER)
        self.model = np.array([(
            spec.n_head, spec.n_kv_head, spec.head_dim, self._address(_find(model, "rotary.cos")),
            self._address(_find(model, "rotary.sin")), 0, 0, 0, self._matrix(model.norm),
            self._matrix(getattr(model, "head", model.token_embedding)), model.norm.eps)], MODEL)

    def _address(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        assert tensor.is_contiguous(), tensor.shape
        self.tensors.append(tensor.detach())
        return tensor.data_ptr()

    def _matrix(self, module: Any) -> tuple[int, int, int, int, int]:
        """The record of a weight [..., out, in] or a norm; zeros if the model does not have it."""
        bias = self._address(getattr(module, "bias", None))
        if isinstance(module, Quantized):
            return (self._address(module.numbers), self._address(module.scale), bias,
                    {"int8": INT8, "int4": INT4}[module.kind], MOST_ROWS)
        weight = getattr(module, "weight", None)
        return self._address(weight), 0, bias, FLOAT32, self.rows


def _find(module: Any, path: str) -> Any:
    """The part of a module at a path of attributes; None if there is none."""
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


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
