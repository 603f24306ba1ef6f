"""nanoGPT and nanochat on the text of a comparison: several seeds each, every result kept.

Both train for the same seconds as the arms and are scored on the same held-out documents, by the
rule of `fira eval`: each document alone, windows that advance by half, every byte once.
"""
from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nanochat_recipe
import nanogpt
import numpy as np

from fira.data.shards import Shards
from fira.data.text import Item
from fira.data.tokenizer import Tokenizer
from fira.eval.bits_per_byte import score
from fira.infer.load import load
from fira.report.read import Run


@dataclass(frozen=True)
class Text:
    """A prepared folder as documents: what rivals train on and everyone is scored on."""

    data: Path
    validation_tokens: int

    def train(self) -> list[str]:
        return documents(self.data, "train")

    def held_out(self) -> list[str]:
        return documents(self.data, "validation", self.validation_tokens)


def documents(data: Path, split: str, limit: int | None = None) -> list[str]:
    """The text of a prepared folder, document by document."""
    tokenizer, shards = Tokenizer.load(data), Shards.open(data, split)
    ids = np.asarray(shards[:limit or len(shards)])
    ends = np.flatnonzero(ids == tokenizer.end_of_text)
    starts = [0, *(ends[:-1] + 1)] if len(ends) else []
    return [tokenizer.decode(ids[a:b].tolist()) for a, b in zip(starts, ends, strict=True)]


def kept(path: Path, asked: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result in `path` if it answers what is asked, else made and kept there.

    Raises ValueError if it answers something else.
    """
    if path.is_file():
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["asked"] != asked:
            raise ValueError(f"{path} answers {result['asked']}, not {asked}; "
                             "choose another --out, or remove that file")
        return result
    result = {"asked": asked, **make()}
    path.write_text(json.dumps(result) + "\n", encoding="utf-8")
    return result


def run_nanogpt(checkout: Path, text: Text, out: Path, minutes: float, seeds: int) -> None:
    """nanoGPT's CPU recipe with each seed."""
    @functools.cache
    def ready() -> tuple[nanogpt.Prepared, nanogpt.Pace]:
        prepared = nanogpt.prepare(checkout, out / "nanogpt", text.train(), text.held_out())
        return prepared, nanogpt.pace(prepared.place)

    def train(seed: int) -> dict[str, Any]:
        prepared, pace = ready()
        return nanogpt.run_nanogpt(prepared, 60 * minutes, seed, pace)

    for seed in range(1, seeds + 1):
        kept(out / f"nanogpt-seed{seed}.json", {"minutes": minutes, "seed": seed},
             functools.partial(train, seed))


def run_nanochat(checkout: Path, text: Text, out: Path, minutes: float, seeds: int,
                 candidates: list[str], trial_minutes: float) -> None:
    """nanochat with each seed, and with the candidate that wins shorter runs, as arms have it."""
    place = out / "nanochat"

    @functools.cache
    def ready() -> tuple[list[str], list[str]]:
        train, held_out = text.train(), text.held_out()
        nanochat_recipe.prepare(checkout, place, train, held_out,
                                Tokenizer.load(text.data).vocab_size)
        return train, held_out

    @functools.cache
    def pace(settings: str) -> nanochat_recipe.Pace:
        return nanochat_recipe.pace(place, nanochat_recipe.parse(settings))

    def train(settings: str, minutes: float, seed: int) -> dict[str, Any]:
        nanochat_recipe.shuffle(place, *ready(), seed)
        return nanochat_recipe.run_nanochat(place, nanochat_recipe.parse(settings), 60 * minutes,
                                            seed, pace(settings))

    def run(name: str, settings: str, minutes: float, seed: int) -> dict[str, Any]:
        asked = {"settings": settings, "minutes": minutes, "seed": seed}
        return kept(out / f"nanochat-{name}.json", asked,
                    functools.partial(train, settings, minutes, seed))

    best = candidates[0]
    if len(candidates) > 1:
        trials = {settings: run(f"trial{number}", settings, trial_minutes, 0)["bits_per_byte"]
                  for number, settings in enumerate(candidates, 1)}
        best = min(trials, key=lambda settings: trials[settings])
        print(f"nanochat, {trial_minutes:g} minutes each: {trials}")
    for seed in range(1, seeds + 1):
        run(f"seed{seed}", best, minutes, seed)


def finished(out: Path) -> dict[str, list[dict[str, Any]]]:
    """The results kept in `out`, by the program's name."""
    found = {name: [json.loads(path.read_text(encoding="utf-8"))
                    for path in sorted(out.glob(f"{name.lower()}-seed*.json"))]
             for name in ("nanoGPT", "nanochat")}
    return {name: results for name, results in found.items() if results}


def score_runs(runs: list[Run], text: Text) -> list[float]:
    """Bits per byte of finished runs by the rivals' rule, kept beside each run."""
    def measure(run: Run) -> dict[str, Any]:
        model, tokenizer, folder = load(run.path, "cpu")
        result = score(model, tokenizer, [Item(one, True, 0) for one in text.held_out()])
        return {"bits_per_byte": result["bits_per_byte"], "bytes": result["bytes"],
                "step": Path(folder).name}

    return [kept(run.path / "held_out.json", {"tokens": text.validation_tokens},
                 functools.partial(measure, run))["bits_per_byte"] for run in runs]
