"""A chat model's generated answers to the rows of a task: how often they are right, alone and among
several samples, and how long they and the thoughts before them are."""
from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from fira.convert.files import Loaded
from fira.data.chat import prompt_ids
from fira.data.tokenizer import TURN_END
from fira.eval.statistics import mean, wilson
from fira.eval.task import Row
from fira.infer.cache import DecodeStep
from fira.infer.engine import Engine
from fira.infer.request import SamplingParams
from fira.infer.thought import limit_thought
from fira.model.generate import window_length

ANSWER_TOKENS = 256
CACHE = 1 << 25  # keys of all answers that are written at a time, unless these are less than 8


class Asking(NamedTuple):
    """How answers are asked for; see `fira.infer.thought.limit_thought`. Without a temperature one
    sample is greedy and several are drawn at 1."""

    think: str | None = None
    max_thinking_tokens: int | None = None
    samples: int = 1
    temperature: float | None = None


def answer(loaded: Loaded, rows: Sequence[Row], asking: Asking, progress: Callable[[float], None]
           ) -> tuple[dict[str, Any], np.ndarray]:
    """The results of rows of messages, and the rows of every expert, [L, E]. What is scored is the
    answer, without its thought. Raises ValueError for a model that cannot chat, or cannot think."""
    (model, tokenizer, _), (think, most, samples, asked) = loaded, asking
    window, temperature = window_length(model), float(samples > 1) if asked is None else asked
    if not model.chat:
        raise ValueError("the rows are chat messages, but the model was not trained on chat "
                         "turns; use a tuned model, or rows with a context")
    if samples > 1 and not temperature:
        raise ValueError(f"{samples} samples at temperature 0 are all equal; give a temperature "
                         "above 0, or one sample")
    direct, limit = limit_thought(model, think, most, window)
    prompts = [prompt_ids(tokenizer, row.messages, True, direct=direct) for row in rows]
    read = [number for number, ids in enumerate(prompts) if len(ids) <= window]
    params = SamplingParams(ANSWER_TOKENS + (limit or 0), temperature, max_thinking_tokens=limit,
                            stop_ids=(tokenizer.special(TURN_END),))
    events, loads_LE = generate_answers(
        model, tokenizer, [prompts[number] for number in read for _ in range(samples)], params,
        progress)
    texts = ["".join(event.text for event in found if not getattr(event, "thought", False))
             for found in events]
    drawn = {number: texts[place * samples:][:samples] for place, number in enumerate(read)}
    scores = {number: [rows[number].score(text) for text in drawn[number]] for number in read}
    right = [mean(scores.get(number, ())) for number in range(len(rows))]
    passed = {str(k): _rate([pass_at(k, each) for each in scores.values()])
              for k in (*(1 << power for power in range((samples - 1).bit_length())), samples)}
    return {"correct": right, "accuracy_per_byte": None, "item_bits": [None] * len(rows),
            "floors": {}, "cut": [], "unsplit": [], "rows": len(rows),
            "left_out": [number for number in range(len(rows)) if number not in scores],
            "answers": {
                "samples": samples, "temperature": temperature,
                "pass": passed, "pass@k": passed[str(samples)],
                "maj@k": _rate([vote(rows[number], drawn[number]) for number in read]),
                "cut off": [mean([float(found[-1].reason == "length") for found in events])],
                "tokens": [mean([found[-1].thinking_tokens for found in events]), mean([
                    sum(not event.thought for event in found[:-1]) for found in events])]}
            }, loads_LE


def _rate(values: list[float]) -> list[float | None]:
    """The mean, and its 95% interval."""
    return [mean(values), *wilson(values)]


def pass_at(k: int, scores: Sequence[float]) -> float:
    """The chance that one of k of these answers, drawn without return, is right (score 1): the
    estimate without bias of Chen et al. 2021, arXiv 2107.03374, equation 1."""
    wrong = sum(score < 1 for score in scores)
    return 1 - math.comb(wrong, k) / math.comb(len(scores), k)


def vote(row: Row, answers: Sequence[str]) -> float:
    """The score of the commonest answer, white space aside; the mean over those equally common."""
    counts = Counter(" ".join(text.split()) for text in answers)
    first = max(counts.values())
    return float(np.mean([row.score(text) for text, count in counts.items() if count == first]))


def generate_answers(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]],
                     params: SamplingParams, progress: Callable[[float], None],
                     decode_step: DecodeStep | None = None
                     ) -> tuple[list[list[Any]], np.ndarray]:
    """The events of an answer to each prompt, drawn with its number as the seed, and the rows of
    every expert, [L, E]."""
    spec, window = model.spec, window_length(model)
    fit = CACHE // (spec.num_layers * spec.n_kv_head * spec.head_dim * window)
    engine = Engine(model, tokenizer, slots=min(max(8, fit), 64), max_waiting=len(prompts),
                    decode_step=decode_step)
    events: list[list[Any]] = [[] for _ in prompts]
    for number, (ids, heard) in enumerate(zip(prompts, events, strict=True)):
        engine.add(ids, replace(params, seed=number), heard.append)
    while engine.step():
        progress(engine.stats["finished"] / len(prompts))
    engine.close()
    if error := next((found[-1].error for found in events if found[-1].error), None):
        raise ValueError(error)
    return events, np.array(engine.loads)
