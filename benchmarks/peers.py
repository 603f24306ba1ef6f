"""The peers of the decoding benchmark: transformers and llama.cpp with a model's weights."""
from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fira.convert.hf import write_model
from fira.data.text import texts
from fira.data.tokenizer import Tokenizer, train_tokenizer


class Turn(NamedTuple):
    """What one side did once."""

    decode: float  # tokens/s of the answer
    prefill: float  # tokens/s of the prompt
    tokens: list[int]


Side = Callable[[list[int], list[int], int], Turn]  # short prompt, long prompt, new tokens


def transformers_side(model: Any, arguments: argparse.Namespace, scratch: Path) -> Side:
    import transformers

    theirs = exported(model, transformers, scratch)

    class Clock(transformers.generation.streamers.BaseStreamer):
        """The time of every token; the first call brings the prompt."""

        def __init__(self) -> None:
            self.stamps: list[float] = []

        def put(self, value: Any) -> None:
            self.stamps.append(time.perf_counter())

        def end(self) -> None:
            pass

    @torch.inference_mode()
    def turn(short: list[int], long: list[int], new: int) -> Turn:
        clock = Clock()
        ids = torch.tensor([short])
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                              min_new_tokens=new, max_new_tokens=new, streamer=clock)
        start = time.perf_counter()
        theirs(input_ids=torch.tensor([long]), use_cache=True, logits_to_keep=1)
        return Turn(rate(clock.stamps[1:]), len(long) / (time.perf_counter() - start),
                    out[0, len(short):].tolist())

    return turn


def exported(model: Any, transformers: Any, scratch: Path) -> Any:
    """transformers' class for a model, with its weights; for a FIRA the one that export brings."""
    folder = scratch / "hf"
    write_model(model, small_tokenizer(), folder)
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=model.spec.architecture == "fira").eval()


@functools.cache
def small_tokenizer() -> Tokenizer:
    """An exported model must have one; the benchmark sends ids."""
    return train_tokenizer(texts(["sotu"]), 1000)


def llama_side(model: Any, arguments: argparse.Namespace, scratch: Path,
               kind: str = "f32") -> Side:
    import xllamacpp

    from fira.convert.gguf import write_model as write_gguf

    file = scratch / f"{kind}.gguf"
    write_gguf(model, small_tokenizer(), file, kind)
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(file), model.spec.context, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = arguments.threads
    server = xllamacpp.Server(params)

    def ask(prompt: list[int], new: int, **options: Any) -> Any:
        reply = server.handle_completions({
            "prompt": prompt, "n_predict": new, "temperature": 0, "ignore_eos": True,
            "cache_prompt": False, **options})
        if "timings" not in reply:
            raise RuntimeError(f"llama.cpp answered {reply}")
        return reply

    def turn(short: list[int], long: list[int], new: int) -> Turn:
        timings = ask(short, new)["timings"]  # the first token comes with the prompt
        decode = 1e3 * (new - 1) / timings["predicted_ms"]
        prefill = ask(long, 1)["timings"]["prompt_per_second"]
        chosen = ask(short, new, n_probs=1)["choices"][0]["logprobs"]["content"]  # not timed
        return Turn(decode, prefill, [one["id"] for one in chosen])

    return turn


def rate(stamps: list[float]) -> float:
    return (len(stamps) - 1) / (stamps[-1] - stamps[0])
