"""Decoding as one compiled function per token: the fast path on a CPU.

Plain torch spends most of a token on dispatching some thirty small operators a layer; the function
in `fira.infer.kernel` reads the weights at the speed of memory. It takes what FIRA and FIRA2 are
made of, in fp32 or as `fira export int8` and `int4` stored it, on a CPU; `find_obstacle` says in
one line why it cannot take a model.
"""
from __future__ import annotations

import importlib.util
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fira import runtime
from fira.convert.quantize import GROUP, Quantized, quantize
from fira.infer.cache import SlotCache
from fira.infer.crew import Crew
from fira.infer.pack import WORK, Packed
from fira.model.files import build_meta
from fira.model.moe import ExpertLinear
from fira.model.transformer import KeyValueCache

PATIENCE = 1.0  # seconds of packing and compiling before we say what takes so long


class FusedStep:
    """One decode step of a model over slots of a key-value cache.

    Weights are shared with the model, fp32 or quantized; `precision` int8 and int4 make a quantized
    copy of fp32 ones. Not for use by two threads at once. The model must not be moved or given new
    parameters.
    """

    def __init__(self, model: Any, precision: str = "float32", threads: int | None = None) -> None:
        from fira.infer.kernel import step

        self.packed = Packed(model, precision)
        self.spec = model.spec
        self.ranks = threads or min(torch.get_num_threads(), runtime.workers())
        self.crew = Crew(step, self.ranks)
        self.counter = np.zeros(1, np.int64)
        self.works = np.zeros(self.ranks, WORK)
        self.rows = 0
        self._reserve(1)

    def step(self, tokens_S: Any, positions_S: Any, slots_S: Any, keys: Sequence[Tensor],
             values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits [S, V] after tokens_S[s], which stands at positions_S[s] in slot slots_S[s],
        and the experts it was sent to, [L, S, K].

        `keys` and `values` hold a cache [slots, G, T, C] for every layer; a token's own are written
        to its position, and all positions before must be filled. Raises ValueError out of range.
        """
        tokens, positions, slots = (np.asarray(x, np.int64) for x in
                                    (tokens_S, positions_S, slots_S))
        self._check(tokens, positions, slots, keys[0])
        self._reserve(len(tokens))
        self._bind(keys, values)
        logits = np.empty((len(tokens), self.spec.vocab_size), np.float32)
        experts = np.empty((self.spec.num_layers, len(tokens) * self.spec.top_k), np.int64)
        self.crew.run(self.packed.shape, self.packed.layers, self.works, tokens, positions, slots,
                      logits, experts, int(self.counter[0]))
        return (torch.from_numpy(logits),
                torch.from_numpy(experts).view(len(experts), len(tokens), -1))

    def __call__(self, tokens_B: Tensor, cache: KeyValueCache) -> Tensor:
        """Logits [B, V] after one more token of every row: a `fira.model.generate.Step`."""
        B, length = len(tokens_B), cache.length
        keys = [layer.keys_BGSC for layer in cache.layers]
        values = [layer.values_BGSC for layer in cache.layers]
        logits_BV, _ = self.step(tokens_B, np.full(B, length), np.arange(B), keys, values)
        for layer in cache.layers:
            layer.length += 1
        return logits_BV

    def decode(self, model: Any, cache: SlotCache, tokens_N: Tensor, positions_N: Tensor,
               slots: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """The engine's `DecodeStep`."""
        logits_NV, experts_LNK = self.step(tokens_N, positions_N, slots, list(cache.keys),
                                           list(cache.values))
        return logits_NV, experts_LNK if self.spec.num_experts > 1 else None

    def _bind(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Point the table at the caches."""
        layout = keys[0].stride()
        assert layout[2:] == (self.spec.head_dim, 1) and keys[0].dtype == torch.float32, layout
        assert all(cache.stride() == layout for cache in (*keys, *values)), layout
        self.packed.shape["slot_stride"], self.packed.shape["group_stride"] = layout[:2]
        self.packed.layers["keys"] = [cache.data_ptr() for cache in keys]
        self.packed.layers["values"] = [cache.data_ptr() for cache in values]

    def _check(self, tokens: np.ndarray, positions: np.ndarray, slots: np.ndarray,
               keys_SGTC: Tensor) -> None:
        """What would read or write outside of memory must not reach compiled code."""
        for name, numbers, limit in (("token", tokens, self.spec.vocab_size),
                                     ("position", positions, min(keys_SGTC.shape[2],
                                                                 self.spec.context)),
                                     ("slot", slots, len(keys_SGTC))):
            if len(numbers) != len(tokens) or min(numbers) < 0 or max(numbers) >= limit:
                raise ValueError(f"{name}s {numbers.tolist()} must be {len(tokens)} numbers of 0 "
                                 f"to {limit - 1}; check what was asked of the step")
        if len(set(slots.tolist())) < len(slots):
            raise ValueError(f"slots {slots.tolist()} repeat; give each sequence its own")

    def _reserve(self, rows: int) -> None:
        """Scratch memory for `rows` tokens: one set for all, and one for each rank."""
        if rows <= self.rows:
            return
        spec, self.rows = self.spec, rows
        kv_heads = getattr(spec, "n_kv_head", spec.n_head)
        common = {"x": spec.d_model, "qkv": (spec.n_head + 2 * kv_heads) * spec.head_dim,
                  "mixed": spec.n_head * spec.head_dim, "hidden": spec.top_k * spec.d_ff}
        own = {"normed": spec.d_model, "weights": spec.top_k, "chosen": spec.top_k,
               "order": spec.top_k, "scores": -(-spec.context // rows),
               "probs": -(-spec.num_experts // rows)}
        self.scratch = [np.zeros(rows * size) for size in common.values()]
        self.works["counter"] = self.counter.ctypes.data
        for name, array in zip(common, self.scratch, strict=True):
            self.works[name] = array.ctypes.data
        for rank in range(self.ranks):
            for name, size in own.items():
                self.scratch.append(np.zeros(rows * size))
                self.works[name][rank] = self.scratch[-1].ctypes.data


def find_obstacle(model: Any, precision: str = "float32") -> str | None:
    """Why the fused step cannot run this model here, in one line; None if it can."""
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed; pip install 'fira-moe[fast]'"
    if sys.platform == "win32":
        return "the fused step needs Linux or macOS"
    kind = getattr(model, "quantization", None)
    if kind and precision != "float32":
        return f"the weights are {kind} already"
    plain = build_meta(model.spec)
    plain, weights = (quantize(plain, kind) if kind else plain).state_dict(), model.state_dict()
    if {name: w.shape for name, w in weights.items()} != {n: w.shape for n, w in plain.items()}:
        return "the model has other weights than its architecture (an adapter perhaps)"
    odd = {f"{w.dtype} on {w.device}".removeprefix("torch.") for w in _numbers(model)
           if w.dtype != torch.float32 or w.device.type != "cpu" or not w.is_contiguous()}
    if odd:
        return f"it runs float32 on cpu, and the model is {', '.join(sorted(odd))}"
    inputs = {m.weight.shape[-1] for m in model.modules()
              if isinstance(m, torch.nn.Linear | ExpertLinear)}
    if precision == "int4" and any(width % GROUP for width in inputs):
        return f"int4 needs widths that {GROUP} divides, and the model has {sorted(inputs)}"
    return None


def _numbers(model: Any) -> Iterator[Tensor]:
    """Every parameter, and the scales that stand for quantized ones."""
    yield from model.parameters()
    yield from (module.scale for module in model.modules() if isinstance(module, Quantized))


def open_step(model: Any, precision: str, say: Callable[[str], object]) -> FusedStep | None:
    """The fused step of a model on a CPU, compiled, or None where plain torch decodes.

    `say` is told in one line why there is none, or what takes so long. Raises ValueError if another
    precision than float32 is asked for and cannot be had.
    """
    obstacle = find_obstacle(model, precision)
    if obstacle and precision != "float32":
        raise ValueError(f"precision={precision} cannot be had: {obstacle}; "
                         "leave --precision out")
    if obstacle:
        if next(model.parameters()).device.type == "cpu":
            say(f"Decoding with plain torch: {obstacle}.")
        return None
    start = time.perf_counter()
    timer = threading.Timer(PATIENCE, say, ["Preparing the decoding step; the first use compiles."])
    timer.start()
    try:
        fused = FusedStep(model, precision)
        cache = model.new_cache(1, 1)
        fused(torch.zeros(1, dtype=torch.int64), cache)
    finally:
        timer.cancel()
    seconds = time.perf_counter() - start
    if seconds > PATIENCE:
        say(f"The decoding step is ready after {seconds:.0f} s.")
    return fused
