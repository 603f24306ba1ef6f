"""Generating text: FIRA's engine against transformers and llama.cpp, with random, equal weights.

    python benchmarks/decode.py --shape fira2-135m --json docs/results/decode.jsonl
    python benchmarks/decode.py --shape fira-334m --json docs/results/decode.jsonl

One row per side: tokens per second of one greedy answer (between its first token and its last), as
a share of the ceiling (measured read bandwidth over the bytes of the fp32 weights that a token
passes through), and of reading a prompt. Then the engine with many requests at once. All sides run
on the same threads, take turns, and show their median; they compute in fp32 but for the last two,
which are ours as `fira export int8` writes it and llama.cpp's Q8_0. transformers is generate with
its defaults, on what `fira export hf` writes; llama.cpp is xllamacpp's server on an exported GGUF
with its prompt cache off. A side that cannot run is named with the reason.
"""
from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peers import Side, Turn, llama_side, rate, transformers_side
from record import append, machine

from fira.config import load_preset
from fira.convert.quantize import quantize
from fira.infer.decode import find_obstacle
from fira.infer.decode.step import FusedStep
from fira.infer.engine import Engine
from fira.infer.request import Piece, SamplingParams
from fira.model.count import count_parameters
from fira.model.files import build
from fira.model.spec import FIRA2Spec, FIRASpec

SHAPES = {
    "fira-334m": lambda: FIRASpec(**load_preset("fira-334m")["model"] | {"dropout": 0.0}),
    # fine-grained: 134.9M parameters, 47.0M of them (head included) for a token
    "fira2-135m": lambda: FIRA2Spec(
        vocab_size=50304, d_model=512, n_head=8, n_kv_head=8, head_dim=64, num_layers=8, d_ff=256,
        num_experts=32, top_k=4, context=1024),
    # finer, as measured first: 129.8M parameters, 47.2M of them (head included) for a token
    "fira2-130m": lambda: FIRA2Spec(
        vocab_size=50304, d_model=512, n_head=8, n_kv_head=4, head_dim=64, num_layers=12, d_ff=160,
        num_experts=32, top_k=4, context=1024),
    "small": lambda: FIRA2Spec(vocab_size=8192, d_model=128, n_head=4, n_kv_head=2, head_dim=32,
                               num_layers=4, d_ff=64, num_experts=8, top_k=2, context=1024),
}


class Letters:
    """A tokenizer for random weights: every id is one letter."""

    end_of_text = 0

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def token_bytes(self) -> list[bytes]:
        return [b"x"] * self.vocab_size


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    model = build(SHAPES[arguments.shape](), seed=0).eval()
    with tempfile.TemporaryDirectory() as scratch:
        sides, left_out = make_sides(model, arguments, Path(scratch))
        bandwidth = read_bandwidth()
        ceiling = bandwidth / touched_bytes(model)
        rows = compare(sides, model.spec.vocab_size, arguments)
        batches = many(model, arguments)
    result = {"benchmark": "decode", **vars(arguments), "gigabytes_per_second": bandwidth / 1e9,
              "ceiling": ceiling, "sides": rows, "concurrent": batches, "left_out": left_out}
    show(result, model)
    if arguments.json:
        append(Path(arguments.json), result)


def make_sides(model: Any, arguments: argparse.Namespace,
               scratch: Path) -> tuple[dict[str, Side], dict[str, str]]:
    """The sides that can run this shape here, and why the others cannot."""
    sides: dict[str, Side] = {"engine, torch step": engine_side(model)}
    left_out = {}
    makers = {"engine, fused step": fused_side, "transformers": transformers_side,
              "llama.cpp": llama_side, "engine, int8": int8_side,
              "llama.cpp, q8_0": partial(llama_side, kind="q8_0")}
    for name, make in makers.items():
        try:
            sides[name] = make(model, arguments, scratch)
        except (ImportError, ValueError) as error:
            left_out[name] = str(error)
    return sides, left_out


def engine_side(model: Any, decode_step: Any = None) -> Side:
    engine = Engine(model, Letters(model.spec.vocab_size), slots=1, capacity=model.spec.context)
    if decode_step:
        engine.decode_step = decode_step

    def turn(short: list[int], long: list[int], new: int) -> Turn:
        tokens, stamps = answer(engine, short, new)
        _, first = answer(engine, long, 1)
        return Turn(rate(stamps[1:]), len(long) / (first[1] - first[0]), tokens)

    return turn


def answer(engine: Engine, prompt: list[int], new: int) -> tuple[list[int], list[float]]:
    """Tokens, and the times of asking and of each token."""
    params = SamplingParams(max_new_tokens=new, temperature=0, ignore_end=True)
    engine.slots.forget()  # every turn reads its prompt
    tokens, stamps = [], [time.perf_counter()]
    for event in engine.stream(prompt, params):
        if isinstance(event, Piece):
            tokens.append(event.id)
            stamps.append(time.perf_counter())
    return tokens, stamps


def fused_side(model: Any, arguments: argparse.Namespace, scratch: Path) -> Side:
    obstacle = find_obstacle(model)
    if obstacle:
        raise ValueError(obstacle)
    fused = FusedStep(model, threads=arguments.threads)
    return engine_side(model, fused.decode)


def int8_side(model: Any, arguments: argparse.Namespace, scratch: Path) -> Side:
    """As `fira generate` runs an exported int8 run: its prompt, too, is read from int8."""
    return fused_side(quantize(copy.deepcopy(model), "int8"), arguments, scratch)


def compare(sides: dict[str, Side], vocab_size: int,
            arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Medians over turns in changing order; whether all sides chose the engine's tokens."""
    generator = torch.Generator().manual_seed(0)
    turns: dict[str, list[Turn]] = {name: [] for name in sides}
    for repeat in range(arguments.repeats + 1):
        short, long = (torch.randint(4096, (length,), generator=generator).tolist()
                       for length in (16, arguments.prompt))
        for name in sorted(sides, reverse=repeat % 2 == 1):
            turns[name].append(sides[name](short, long, arguments.new))
    reference = [turn.tokens for turn in turns["engine, torch step"]]
    return {name: {"decode": statistics.median(turn.decode for turn in made[1:]),
                   "prefill": statistics.median(turn.prefill for turn in made[1:]),
                   "same_tokens": [turn.tokens for turn in made] == reference}
            for name, made in turns.items()}


def many(model: Any, arguments: argparse.Namespace) -> dict[int, float]:
    """Tokens per second of the engine, prompts of 16 included, with so many requests at once.

    With the fused step where it can run this model.
    """
    fused = None if find_obstacle(model) else FusedStep(model, threads=arguments.threads)
    generator = torch.Generator().manual_seed(1)
    rates: dict[int, list[float]] = {count: [] for count in arguments.concurrent}
    params = SamplingParams(max_new_tokens=arguments.new // 2, temperature=0, ignore_end=True)
    for _ in range(arguments.repeats):
        for count, seen in rates.items():
            engine = Engine(model, Letters(model.spec.vocab_size), slots=count, capacity=256)
            if fused:
                engine.decode_step = fused.decode
            prompts = torch.randint(4096, (count, 16), generator=generator).tolist()
            for prompt in prompts:
                engine.add(prompt, params, lambda event: None)
            start = time.perf_counter()
            engine.close(drain=True)
            seen.append(engine.stats["generated_tokens"] / (time.perf_counter() - start))
    return {count: statistics.median(seen) for count, seen in rates.items()}


def read_bandwidth() -> float:
    """Bytes per second that summing memory reads, the best of several turns."""
    block, best = torch.ones(2**28), 0.0  # 1 GiB: no cache holds it
    for _ in range(8):
        start = time.perf_counter()
        block.sum()
        best = max(best, block.nbytes / (time.perf_counter() - start))
    return best


def touched_bytes(model: Any) -> int:
    """Weights one token passes through; of an untied embedding and positions it reads a row."""
    rows = {row.part: row.active for row in count_parameters(model.spec).rows}
    rows.pop("positions", None)
    if "head" in rows:
        rows.pop("token embedding")
    return sum(rows.values()) * model.token_embedding.weight.element_size()


def show(result: dict[str, Any], model: Any) -> None:
    counted = count_parameters(model.spec)
    print(f"{result['shape']}: {counted.total / 1e6:.1f}M parameters, {counted.active / 1e6:.1f}M "
          f"active; {machine()}, {result['threads']} threads")
    print(f"ceiling {result['ceiling']:.1f} tokens/s: {result['gigabytes_per_second']:.1f} GB/s "
          f"read, {touched_bytes(model) / 1e6:.0f} MB a token")
    print(f"{'':22}{'tokens/s':>9}{'of ceiling':>12}{'prefill':>9}  same tokens")
    for name, row in result["sides"].items():
        print(f"{name:22}{row['decode']:9.1f}{row['decode'] / result['ceiling']:12.2f}"
              f"{row['prefill']:9.0f}  {row['same_tokens']}")
    for count, tokens in result["concurrent"].items():
        print(f"{f'engine, {count} at once':22}{tokens:9.1f}")
    for name, reason in result["left_out"].items():
        print(f"left out: {name}: {reason}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="fira2-135m")
    parser.add_argument("--new", type=int, default=48, help="tokens of an answer")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt to read")
    parser.add_argument("--concurrent", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--repeats", type=int, default=3, help="counted turns of each side")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", help="append the result to this file as one line of JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
