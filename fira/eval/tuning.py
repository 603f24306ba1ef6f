"""What a tuning changed: both models on the same held-out rows, tokens, prompts and suites."""
from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from fira.data.chat import prompt_ids
from fira.data.conversations import Row
from fira.data.packs import Packs, Windows, in_order
from fira.data.tokenizer import TURN_END
from fira.eval.answers import ANSWER_TOKENS, generate_answers
from fira.eval.compare import FORMS, add_comparison
from fira.eval.measure import mean, measure
from fira.eval.score import Window, score
from fira.eval.statistics import Z, wilson
from fira.files import write_json
from fira.infer.decode import open_step
from fira.infer.load import load
from fira.infer.request import SamplingParams
from fira.model.generate import window_length
from fira.model.router import routers
from fira.model.usage import read_use
from fira.runlog import TUNING, ProgressLine

PLACES, ROUTED_PLACES = 1 << 16, 1 << 14  # of held-out rows that are scored, and routed
ANSWERED = 100  # held-out prompts
REPEATED = 4  # tokens of a sequence that may occur again in an answer
PROMPTS = ("Who are you?", "What is the capital of France?", "Explain what a cell is.",
           "Give me three tips to sleep better.", "Write two sentences about rain.")
Measures = list[dict[str, Any]]  # values are numbers, [value, low, high], a text or None


def compare_tuning(start: Path, run: Path, held_out: dict[str, Any], device: str, screen: Console,
                   suites: Sequence[str] = (), **options: Any) -> None:
    """Compare the models before and after a tuning, in the file TUNING of the tuned run.

    `held_out`: sequences of rows, by name; "target" is one of them. `options`: of `measure`, for
    the suites. Intervals are of 95%. Raises ValueError, one line, as `measure` does.
    """
    loaded = [load(start, device), load(run, device)]
    models, tokenizer = [one.model for one in loaded], loaded[1].tokenizer
    rows = {name: held_out_rows(sequences) for name, sequences in held_out.items()}
    measures, begun = Measures(), time.monotonic()
    for name, some in rows.items():
        (old_R, sizes_R), (new_R, _) = (count_bits(model, tokenizer, some) for model in models)
        measures.append(measured(f"bits per byte, {name}", *(
            ratio(bits_R, sizes_R) for bits_R in (old_R, new_R, new_R - old_R))))
    routing, routed = compare_routing(models, rows["target"])
    with ProgressLine("answers", screen) as line:
        found, samples = compare_answers(models, tokenizer, rows["target"], lambda share: (
            line.update(share, "of both models", time.monotonic() - begun)))
    tasks = {}
    if suites:
        new, old = (measure(one.folder, suites, (), device=device, screen=screen, as_chat=True,
                            **options) for one in reversed(loaded))
        add_comparison(new, old)
        measures += compare_suites(old, new)
        tasks = new["against"]["suites"]
    write_json(run / TUNING, {
        "before": str(loaded[0].folder), "after": str(loaded[1].folder),
        "measures": [*measures, *found, *routed], "samples": samples, "routing": routing,
        "tasks": tasks})


def held_out_rows(sequences: Any) -> list[Row]:
    """The rows of packs, of pairs the chosen ones, or windows of a prepared text; of about PLACES
    ids together, evenly spread."""
    if isinstance(sequences, Windows):
        count = max(1, min(len(sequences), PLACES // sequences.length))
        tokens, targets, _ = sequences.read(np.arange(count) * len(sequences) // count)
        return [Row(np.append(window[:1], rest), np.arange(len(rest) + 1) > 0)
                for window, rest in zip(tokens, targets, strict=True)]
    packs = sequences if isinstance(sequences, Packs) else sequences.packs
    return spread([group[0] for group in packs.groups], PLACES)


def spread(rows: list[Row], places: int) -> list[Row]:
    return rows[::math.ceil(sum(len(row.ids) for row in rows) / places)]


def count_bits(model: Any, tokenizer: Any, rows: Sequence[Row]) -> np.ndarray:
    """[2, R]: the bits of each row's targets and their bytes. Special tokens stand for no text."""
    sizes, found = np.array([len(text) for text in tokenizer.token_bytes()]), []
    costs = score(model, [[Window(row.ids.tolist(), 0)] for row in rows])
    for row, (costs_P2,) in zip(rows, costs, strict=True):
        bytes_P = sizes[row.ids[1:]] * row.trained[1:]
        found.append((costs_P2[bytes_P > 0, 0].sum() / math.log(2), bytes_P.sum()))
    return np.array(found).T


def bits_per_byte(model: Any, tokenizer: Any, rows: list[Row]) -> float:
    """Of rows of about PLACES ids, evenly spread."""
    return ratio(*count_bits(model, tokenizer, spread(rows, PLACES)))[0]


def ratio(values_R: np.ndarray, sizes_R: np.ndarray) -> list[float]:
    """sum(values) / sum(sizes) over independent rows, and its interval (by linearization)."""
    value, count = values_R.sum() / sizes_R.sum(), len(values_R)
    square = ((values_R - value * sizes_R) ** 2).sum() * count / max(1, count - 1)
    half = Z * math.sqrt(square) / sizes_R.sum()
    return [float(value), float(value - half), float(value + half)]


def compare_routing(models: Sequence[Any], rows: list[Row]) -> tuple[dict[str, Any], Measures]:
    """Per layer the share of tokens that keep their set of experts, loads [2, L, E] and their CV;
    as measures too, with the three experts whose load changed most. Nothing for a dense model."""
    if not routers(models[1]):
        return {}, []
    num_experts, longest = models[1].spec.num_experts, max(len(row.ids) for row in rows) - 1
    packs = Packs(spread(rows, ROUTED_PLACES), longest)
    uses = [read_use(model, in_order(packs, 4), context=True) for model in models]
    old_LNK, new_LNK = (use.experts_LNK.sort(dim=2).values for use in uses)
    kept_L = (old_LNK == new_LNK).all(dim=2).double().mean(dim=1).tolist()
    load_2LE = torch.stack([use.total(torch.ones_like(use.gates_LNK), num_experts)
                            for use in uses]) / old_LNK[0].numel()
    cv_2L = (load_2LE.std(dim=2, correction=0) * num_experts).tolist()
    change_R = (load_2LE[1] - load_2LE[0]).abs().flatten()
    loads = [("load of expert {}.{}".format(*divmod(place, num_experts)),
              *load_2LE.flatten(1)[:, place].tolist())
             for place in change_R.topk(min(3, num_experts)).indices.tolist()]
    by_layer = [" ".join(f"{value:.2f}" for value in values) for values in (kept_L, *cv_2L)]
    return {"tokens": old_LNK.shape[1], "kept": kept_L, "cv": cv_2L, "load": load_2LE.tolist()}, [
        measured("experts kept, by layer", None, by_layer[0]),
        measured("load CV, by layer", *by_layer[1:]),
        *(measured(*each) for each in loads)]


def measured(name: str, before: Any, after: Any, change: Any = None) -> dict[str, Any]:
    return {"measure": name, "before": before, "after": after, "change": change}


def compare_answers(models: Sequence[Any], tokenizer: Any, rows: Sequence[Row],
                    progress: Callable[[float], None]) -> tuple[Measures, list[list[str]]]:
    """How both models answer held-out prompts, if the later one was tuned to chat, and PROMPTS. The
    longest answer is half of what they read, if that is less than ANSWER_TOKENS."""
    chat, window = bool(models[1].chat), min(window_length(model) for model in models)
    longest = min(ANSWER_TOKENS, window // 2)
    prompts = [prompt_ids(tokenizer, [{"role": "user", "content": text}], chat)[-window:]
               for text in PROMPTS]
    prompts += held_out_prompts(rows, window - longest) if chat else []
    ends = (tokenizer.special(TURN_END),) if chat else ()
    described, texts = list[dict[str, Any]](), list[list[str]]()
    for number, model in enumerate(models):
        events, _ = generate_answers(
            model, tokenizer, prompts, SamplingParams(longest, 0.0, stop_ids=ends),
            lambda share, begun=number: progress((begun + share) / 2),  # type: ignore[misc]
            open_step(model, "float32", lambda text: None))
        found = [([token.id for token in tokens[:len(tokens) - (end.reason == "stop")]],
                  end.reason == "stop") for *tokens, end in events]
        texts.append([tokenizer.decode(ids) for ids, _ in found[:len(PROMPTS)]])
        described.append(describe_answers(found[len(PROMPTS):]))
    return ([measured(name, *(one[name] for one in described)) for name in described[0]],
            [list(each) for each in zip(PROMPTS, *texts, strict=True)])


def held_out_prompts(rows: Sequence[Row], longest: int) -> list[list[int]]:
    """The ids before the first answer of ANSWERED rows, evenly spread, where they fit."""
    begins = [(row, int(row.trained.argmax())) for row in rows]
    found = [row.ids[:begin].tolist() for row, begin in begins if 1 < begin <= longest]
    return found[::math.ceil(len(found) / ANSWERED)] if found else []


def describe_answers(answers: Sequence[tuple[list[int], bool]]) -> dict[str, Any]:
    """Of answers and whether they end by themselves: the share that does, their mean length, and
    the share of sequences of REPEATED tokens that stood in the same answer before."""
    if not answers:
        return {}
    pieces = [[tuple(ids[at:at + REPEATED]) for at in range(len(ids) - REPEATED + 1)]
              for ids, _ in answers]
    total, different = (sum(map(len, some)) for some in (pieces, map(set, pieces)))
    stops: list[float | None] = [float(stopped) for _, stopped in answers]
    return {"answers that end": [mean(stops), *wilson(stops)],
            "answer length, tokens": mean([len(ids) for ids, _ in answers]),
            f"repeated {REPEATED}-grams": 1 - different / total if total else 0.0}


def compare_suites(old: dict[str, Any], new: dict[str, Any]) -> Measures:
    """The means over the tasks of each suite, and the differences that `add_comparison` has added
    to `new`."""
    found = []
    for suite, tasks in new["against"]["suites"].items():
        for key in FORMS:
            if one := tasks[f"mean of {suite}"][key]:
                before, after = (mean([task[key] for task in result["suites"][suite]["tasks"]
                                       .values()]) for result in (old, new))
                found.append(measured(f"{suite}, {key.replace('_', ' ')}", before, after,
                                      [one["mean"], one["low"], one["high"]]))
    return found
