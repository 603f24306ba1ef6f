"""Decoding at batch 1 on a CPU: the compiled step against torch, transformers and llama.cpp.

    python benchmarks/decode_kernel.py --json docs/results/decode_kernel.jsonl

Every side samples (temperature 1, top 40) after a prompt of one token; the sides take turns and the
medians count. `ceiling` is the read bandwidth measured in the same turns over the bytes of fp32
weights that a token passes through. transformers and llama.cpp run Qwen3-MoE of FIRA2's shape, and
for FIRA, which they do not have, GPT-2 of its active shape (biases in attention too, tied head).
llama.cpp is timed by its own clock. Needs the packages transformers, gguf and xllamacpp.
"""
from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from decode_peers import TOP_K, llamacpp_decoder, transformers_decoder
from record import append

from fira.infer.decode.step import FusedStep
from fira.model.files import build
from fira.model.generate import stream
from fira.model.spec import FIRA2Spec, FIRASpec

SUMS = 16  # of 512 MiB each
SHAPES = {
    "fira-334m": FIRASpec(),
    "fira2-135m": FIRA2Spec(vocab_size=50304, d_model=512, n_head=8, n_kv_head=8, num_layers=8,
                            d_ff=256, num_experts=32, top_k=4, context=1024),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=list(SHAPES))
    parser.add_argument("--tokens", type=int, default=96, help="tokens of one turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", help="append one line of JSON per shape to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.shape:
        rates, active = measure(SHAPES[name], arguments)
        print(f"{name}: {active / 1e6:.1f}M weights a token, {arguments.threads} threads")
        for side, rate in rates.items():
            print(f"  {side:16} {rate:7.1f} tokens/s {rate / rates['ceiling']:6.2f} of the ceiling",
                  flush=True)
        if arguments.json:
            append(Path(arguments.json), {"benchmark": "decode_kernel", "shape": name,
                                          "active": active, "threads": arguments.threads,
                                          "tokens_per_second": rates})


def measure(spec: Any, arguments: argparse.Namespace) -> tuple[dict[str, float], int]:
    """Median tokens per second of each side, and the weights that a token passes through."""
    model = build(spec, seed=0).eval()
    active = active_weights(model)
    memory = torch.ones(2**27)  # 512 MiB: no cache holds it
    with tempfile.TemporaryDirectory() as folder:
        sides: dict[str, Callable[[int], float]] = {
            "ceiling": lambda tokens: bandwidth(memory) / (4 * active),
            "torch": timed(ours(model, None)),
            **{f"fused {kind}": timed(ours(model, FusedStep(model, kind)))
               for kind in ("float32", "int8", "int4")},
            "transformers": timed(transformers_decoder(spec)),
            **{f"llama.cpp {kind}": llamacpp_decoder(spec, kind, arguments.threads, Path(folder))
               for kind in ("F32", "Q8_0", "Q4_0")}}
        rates: dict[str, list[float]] = {side: [] for side in sides}
        for decode in sides.values():
            decode(8)
        for turn in range(arguments.turns):
            for side in sorted(sides, reverse=turn % 2 == 1):
                rates[side].append(sides[side](arguments.tokens))
    return {side: statistics.median(values) for side, values in rates.items()}, active


def active_weights(model: torch.nn.Module) -> int:
    """Without embeddings, of which a token reads one row, unless they are the head as well."""
    spec, total = model.spec, 0
    for name, parameter in model.named_parameters():
        if "embedding" not in name or not hasattr(model, "head"):
            share = spec.top_k / spec.num_experts if "experts" in name else 1
            total += round(parameter.numel() * share)
    return total


def ours(model: Any, step: FusedStep | None) -> Callable[[int], None]:
    def decode(tokens: int) -> None:
        for _ in stream(model, [1], tokens, top_k=TOP_K, seed=tokens, step=step):
            pass
    return decode


def timed(decode: Callable[[int], None]) -> Callable[[int], float]:
    def rate(tokens: int) -> float:
        start = time.perf_counter()
        decode(tokens)
        return tokens / (time.perf_counter() - start)
    return rate


def bandwidth(memory: torch.Tensor) -> float:
    """Bytes per second, summing about as long as a turn of the others lasts."""
    start = time.perf_counter()
    for _ in range(SUMS):
        memory.sum()
    return SUMS * memory.nbytes / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
