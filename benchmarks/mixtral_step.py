"""Training step of a Mixtral-shaped model: FIRA2 against transformers, in one run.

    python benchmarks/mixtral_step.py --top-k 1 2
    python benchmarks/mixtral_step.py --small --json docs/results/mixtral_step.jsonl

Both sides have the same layers, widths, experts, vocabulary and tied embeddings (FIRA2 adds
per-head QK-norm: 2 x 64 weights a layer), the same fused AdamW, the same batches and the same
allocator setting. transformers runs with its defaults: model(input_ids, labels=...).loss. FIRA2
carries its balance and z losses. A step is forward, backward, AdamW; the sides take turns.
"""
from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from record import append
from torch.nn import functional as F

from fira.model.files import build
from fira.model.moe import end_step
from fira.model.spec import FIRA2Spec
from fira.runtime import keep_large_blocks


def main() -> None:
    arguments = parse_arguments()
    if not arguments.default_allocator:
        keep_large_blocks()
    torch.set_num_threads(arguments.threads)
    print(f"{'top-k':>5} {'side':14} {'parameters':>12} {'s/step':>8} {'tokens/s':>9} {'ratio':>6}")
    for top_k in arguments.top_k:
        row = compare(arguments, top_k)
        for side in ("transformers", "fira2"):
            print(f"{top_k:5} {side:14} {row[side]['parameters']:12,} "
                  f"{row[side]['seconds']:8.3f} {row[side]['tokens_per_second']:9.1f} "
                  f"{row['ratio'] if side == 'fira2' else 1:6.2f}", flush=True)
        if arguments.json:
            append(Path(arguments.json), row)


def compare(arguments: argparse.Namespace, top_k: int) -> dict:
    """Median seconds over interleaved steps; `ratio` is FIRA2's tokens/s over transformers'."""
    shape = (arguments.batch, arguments.sequence)
    steps = {"transformers": mixtral_step(arguments, top_k), "fira2": fira2_step(arguments, top_k)}
    generator = torch.Generator().manual_seed(0)
    seconds: dict[str, list[float]] = {side: [] for side in steps}
    for turn in range(arguments.warmup + arguments.steps):
        tokens_BT = torch.randint(arguments.vocab, shape, generator=generator)
        for side in sorted(steps, reverse=turn % 2 == 1):
            start = time.perf_counter()
            steps[side][1](tokens_BT)
            if turn >= arguments.warmup:
                seconds[side].append(time.perf_counter() - start)
    row: dict = {side: {"parameters": steps[side][0], "seconds": statistics.median(times),
                        "all_seconds": [round(x, 4) for x in times],
                        "tokens_per_second": shape[0] * shape[1] / statistics.median(times)}
                 for side, times in seconds.items()}
    pairs = zip(seconds["transformers"], seconds["fira2"], strict=True)
    row["ratio"] = statistics.median(theirs / ours for theirs, ours in pairs)
    return {"benchmark": "mixtral_step", "top_k": top_k, **vars(arguments), **row,
            "peer": f"transformers {transformers.__version__}"}


def mixtral_step(a: argparse.Namespace, top_k: int) -> tuple[int, Callable[[torch.Tensor], None]]:
    config = transformers.MixtralConfig(
        vocab_size=a.vocab, hidden_size=a.width, intermediate_size=a.hidden,
        num_hidden_layers=a.layers, num_attention_heads=a.width // 64,
        num_key_value_heads=a.width // 64, num_local_experts=a.experts, num_experts_per_tok=top_k,
        max_position_embeddings=a.sequence, tie_word_embeddings=True)
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(tokens_BT: torch.Tensor) -> None:
        model(input_ids=tokens_BT, labels=tokens_BT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return sum(p.numel() for p in model.parameters()), step


def fira2_step(a: argparse.Namespace, top_k: int) -> tuple[int, Callable[[torch.Tensor], None]]:
    heads = a.width // 64
    spec = FIRA2Spec(vocab_size=a.vocab, d_model=a.width, d_ff=a.hidden, num_layers=a.layers,
                     n_head=heads, n_kv_head=heads, head_dim=64, num_experts=a.experts, top_k=top_k,
                     context=a.sequence)
    model = build(spec, seed=0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(tokens_BT: torch.Tensor) -> None:
        logits_BTV = model(tokens_BT)
        shifted = logits_BTV[:, :-1].flatten(0, 1)
        F.cross_entropy(shifted, tokens_BT[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        end_step(model)

    return sum(p.numel() for p in model.parameters()), step


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--top-k", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--hidden", type=int, default=3072)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=50304)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each side")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="2 layers, vocabulary 8192, 5 steps")
    parser.add_argument("--default-allocator", action="store_true",
                        help="leave the C allocator as it is")
    parser.add_argument("--json", help="append one line of JSON per top-k to this file")
    arguments = parser.parse_args()
    if arguments.small:
        arguments.layers, arguments.vocab, arguments.steps = 2, 8192, 5
    return arguments


if __name__ == "__main__":
    main()
