"""What comparisons with other training programs share, and nanochat's own training as a peer.

A peer trains on the same text for the same seconds as FIRA's side. It is scored on the same
held-out documents by the rule of `fira eval`: each document alone, windows that advance by half,
every byte once. Results are kept in files, so that a comparison that was stopped continues.

nanochat needs a checkout and its packages (pip install rustbpe wandb filelock requests). Its own
tokenizer, loader, model, optimizers and schedule run unchanged, with the settings of its
runs/runcpu.sh unless others are given. Three choices favor it: its tokenizer has the vocabulary
size of FIRA's side, because its default of 2^15 would make the head most of so small a model's
work; torch.compile is used only if it makes steps faster; only its training steps count as time,
not starting, compiling and reading data.

This file is also the program that scores a nanochat model, in a process of its own:

    python benchmarks/training_peers.py FOLDER STEP
"""
from __future__ import annotations

import functools
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fira.data.batches import Shards
from fira.data.text import Item
from fira.data.tokenizer import Tokenizer
from fira.eval.bits_per_byte import score
from fira.infer.load import load
from fira.report.read import Run

NANOCHAT = {"depth": "6", "head-dim": "64", "window-pattern": "L", "max-seq-len": "512",
            "device-batch-size": "32", "total-batch-size": "16384"}
QUIET = {"eval-every": "-1", "core-metric-every": "-1", "sample-every": "-1", "run": "dummy",
         "model-tag": "model", "device-type": "cpu"}
WARM_UP = 3  # nanochat's first steps, which compile
STEP = re.compile(r"^step \d+/\d+ .*? dt: ([\d.]+)ms", re.MULTILINE)
# Both programs fix their seed in the source; this one seeds torch with the first argument instead.
SEEDED = """
import runpy, sys, torch
seed, seeding = int(sys.argv[1]), torch.manual_seed
torch.manual_seed = lambda _: seeding(seed)
sys.argv = sys.argv[2:]
if sys.argv[0].endswith(".py"):
    runpy.run_path(sys.argv[0], run_name="__main__")
else:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
Result = dict[str, Any]


@dataclass(frozen=True)
class Text:
    """The documents of a folder that `fira data` wrote, and how many tokens of those held out."""

    data: Path
    validation_tokens: int | None = None  # all

    def train(self) -> list[str]:
        return self._documents("train", None)

    def held_out(self) -> list[str]:
        return self._documents("validation", self.validation_tokens)

    def _documents(self, split: str, limit: int | None) -> list[str]:
        tokenizer, shards = Tokenizer.load(self.data), Shards(self.data, split)
        ids = np.asarray(shards[:limit or len(shards)])
        ends = np.flatnonzero(ids == tokenizer.end_of_text)
        starts = [0, *(ends[:-1] + 1)] if len(ends) else []
        return [tokenizer.decode(ids[a:b].tolist()) for a, b in zip(starts, ends, strict=True)]


def keep_result(path: Path, wanted: dict[str, Any], make: Callable[[], Result]) -> Result:
    """The result in `path` if it was made with the settings `wanted`, else a new one, kept there.

    Raises ValueError if it was made with other settings.
    """
    if path.is_file():
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["asked"] != wanted:
            raise ValueError(f"{path} was made with {result['asked']}, not {wanted}; "
                             "choose another --out, or remove that file")
        return result
    result = {"asked": wanted, **make()}
    path.write_text(json.dumps(result) + "\n", encoding="utf-8")
    return result


def read_results(out: Path) -> dict[str, list[Result]]:
    """The results kept in `out`, by the program's name."""
    found = {name: [json.loads(path.read_text(encoding="utf-8"))
                    for path in sorted(out.glob(f"{name.lower()}-seed*.json"))]
             for name in ("nanoGPT", "nanochat")}
    return {name: results for name, results in found.items() if results}


def score_runs(runs: list[Run], text: Text) -> list[float]:
    """Bits per byte of FIRA's runs by the peers' rule, kept beside each run."""
    return [keep_result(run.path / "held_out.json", {"tokens": text.validation_tokens},
                        functools.partial(score_run, run, text))["bits_per_byte"] for run in runs]


def score_run(run: Run, text: Text) -> Result:
    """Bits per byte of a FIRA run on the held-out text, as `fira eval` measures them."""
    model, tokenizer, folder = load(run.path, "cpu")
    result = score(model, tokenizer, map(Item, text.held_out()))
    return {"bits_per_byte": result["bits_per_byte"], "bytes": result["bytes"],
            "step": folder.name}


def sum_losses(losses: Callable[[Tensor, Tensor], Tensor], start: int, documents: list[list[int]],
               context: int, batch: int = 16) -> float:
    """Loss in nats of all tokens of the documents, each document after the token `start`.

    `losses(tokens, targets)` gives the loss of every target, 0 where a target is -1.
    """
    found = sorted((one for ids in documents for one in windows(ids, start, context)),
                   key=lambda one: len(one[0]))
    nats = 0.0
    for first in range(0, len(found), batch):
        group = found[first:first + batch]
        length = max(3, max(len(line) for line, _ in group))  # nanochat needs two tokens or more
        tokens = torch.full((len(group), length), start)
        targets = torch.full((len(group), length - 1), -1)
        for row, (line, known) in enumerate(group):
            tokens[row, :len(line)] = torch.tensor(line)
            targets[row, known:len(line) - 1] = torch.tensor(line[known + 1:])
        with torch.inference_mode():
            nats += float(losses(tokens[:, :-1].contiguous(), targets).double().sum())
    return nats


def windows(ids: list[int], start: int, context: int) -> list[tuple[list[int], int]]:
    """Windows in which every token is predicted once, each with how many targets to leave out."""
    line, known, found = [start, *ids], 0, []
    stride = context // 2
    for first in range(0, max(1, len(line) - 1 - (context - stride)), stride):
        found.append((line[first:first + context + 1], known))
        known = context - stride
    return found


class Pace(NamedTuple):
    seconds: float  # per step
    compiled: bool


def run_nanochat(checkout: Path, text: Text, out: Path, minutes: float, seeds: int,
                 candidates: list[str], trial_minutes: float) -> None:
    """Train and score nanochat with each seed that has no result in `out` yet, with the candidate
    settings that win shorter runs."""
    place = out / "nanochat"

    @functools.cache
    def documents() -> list[str]:
        train = text.train()
        prepare_nanochat(checkout, place, train, text.held_out(),
                         Tokenizer.load(text.data).vocab_size)
        return train

    @functools.cache
    def pace(settings: str) -> Pace:
        return measure_nanochat(place, parse_settings(settings))

    def run(name: str, settings: str, minutes: float, seed: int) -> Result:
        def train() -> Result:
            order = np.random.default_rng(seed).permutation(len(documents()))
            write_shard(place, "shard_00000", [documents()[i] for i in order])
            return train_nanochat(place, parse_settings(settings), 60 * minutes, seed,
                                  pace(settings))

        wanted = {"settings": settings, "minutes": minutes, "seed": seed}
        return keep_result(out / f"nanochat-{name}.json", wanted, train)

    best = candidates[0]
    if len(candidates) > 1:
        trials = {settings: run(f"trial{number}", settings, trial_minutes, 0)["bits_per_byte"]
                  for number, settings in enumerate(candidates, 1)}
        best = min(trials, key=lambda settings: trials[settings])
        print(f"nanochat, {trial_minutes:g} minutes each: {trials}")
    for seed in range(1, seeds + 1):
        run(f"seed{seed}", best, minutes, seed)


def parse_settings(settings: str) -> dict[str, str]:
    """`depth=4,total-batch-size=4096` over the recipe. Raises ValueError for any other form."""
    given = {}
    for part in filter(None, settings.split(",")):
        name, equals, value = part.partition("=")
        if not (name and equals and value):
            raise ValueError(f"nanochat setting {part!r} must be name=value with a name of "
                             "scripts.base_train, such as depth=4")
        given[name.lstrip("-")] = value
    return {**NANOCHAT, **given}


def prepare_nanochat(checkout: Path, place: Path, train: list[str], held_out: list[str],
                     vocab_size: int) -> None:
    """Make a copy of the checkout in `place`, its data, and its tokenizer trained on `train`."""
    if (place / "held_out.json").is_file():
        return
    shutil.rmtree(place, ignore_errors=True)  # a preparation that was interrupted
    shutil.copytree(checkout, place, ignore=shutil.ignore_patterns(".git"))
    write_shard(place, "shard_00000", train)
    write_shard(place, "shard_00001", held_out)  # its loader holds the last file out
    run_seeded(place, 0, "scripts.tok_train", f"--vocab-size={vocab_size}")
    (place / "held_out.json").write_text(json.dumps(held_out), encoding="utf-8")


def write_shard(place: Path, name: str, texts: list[str]) -> None:
    import pyarrow as arrow
    from pyarrow import parquet

    folder = place / "base" / "base_data_climbmix"
    folder.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.table({"text": texts}), folder / f"{name}.parquet",
                        row_group_size=1024)


def measure_nanochat(place: Path, settings: dict[str, str]) -> Pace:
    """The faster one of compiled and plain steps, each the median of five."""
    paces = []
    for compiled in (False, True):
        steps = train_steps(place, settings, WARM_UP + 5, 0, compiled)[WARM_UP:]
        paces.append(Pace(statistics.median(steps), compiled))
    return min(paces)


def train_nanochat(place: Path, settings: dict[str, str], seconds: float, seed: int,
                   pace: Pace) -> Result:
    """Train for about `seconds` of steps, with a schedule that ends then, and score."""
    iterations = max(1, round(seconds / pace.seconds))
    began = time.perf_counter()
    steps = train_steps(place, settings, iterations, seed, pace.compiled)
    whole = time.perf_counter() - began
    assert len(steps) == iterations, (len(steps), iterations)
    root = str(Path(__file__).resolve().parents[1])
    scored = subprocess.run([sys.executable, str(Path(__file__).resolve()), str(place),
                             str(iterations)], cwd=place, check=True, stdout=subprocess.PIPE,
                            text=True, env=_environment(place) | {"PYTHONPATH": root})
    return {**json.loads(scored.stdout.splitlines()[-1]), "iterations": iterations,
            "seconds": statistics.mean(steps[WARM_UP:] or steps) * iterations,
            "seconds_in_all": whole, "compiled": pace.compiled,
            "tokens": iterations * int(settings["total-batch-size"])}


def train_steps(place: Path, settings: dict[str, str], iterations: int, seed: int,
                compiled: bool) -> list[float]:
    """Train nanochat; the seconds of each step, from its output."""
    shutil.rmtree(place / "base" / "base_checkpoints", ignore_errors=True)
    every = {**settings, **QUIET, "num-iterations": str(iterations)}
    output = run_seeded(place, seed, "scripts.base_train",
                        *(f"--{name}={value}" for name, value in every.items()), compiled=compiled)
    return read_step_seconds(output)


def read_step_seconds(output: str) -> list[float]:
    return [float(milliseconds) / 1000 for milliseconds in STEP.findall(output)]


def run_seeded(place: Path, seed: int, program: str, *arguments: str,
               compiled: bool = False) -> str:
    """Run a Python program of another project in `place` with a seed; returns its output."""
    done = subprocess.run([sys.executable, "-c", SEEDED, str(seed), program, *arguments], cwd=place,
                          env=_environment(place, compiled), capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{program} in {place} exited with {done.returncode}: "
                         f"{(done.stderr.strip().splitlines() or ['no output'])[-1]}")
    return done.stdout


def _environment(place: Path, compiled: bool = False) -> dict[str, str]:
    """nanochat reads its folder, and torch whether to compile, only from the environment."""
    return {**os.environ, "NANOCHAT_BASE_DIR": str(place.resolve() / "base"), "PYTHONPATH": "",
            "TORCHDYNAMO_DISABLE": "0" if compiled else "1"}


def main() -> None:
    place, step = Path(sys.argv[1]), int(sys.argv[2])
    sys.path.insert(0, str(place))
    from nanochat.checkpoint_manager import build_model

    model, tokenizer, about = build_model(place / "base" / "base_checkpoints" / "model", step,
                                          torch.device("cpu"), "eval")
    texts = json.loads((place / "held_out.json").read_text(encoding="utf-8"))
    documents = [tokenizer.encode(text) for text in texts]
    size = sum(len(text.encode()) for text in texts)
    covered = sum(len(tokenizer.decode_single_token_bytes(one)) for ids in documents for one in ids)
    assert covered == size, (covered, size)
    nats = sum_losses(functools.partial(model, loss_reduction="none"),
                      tokenizer.get_bos_token_id(), documents,
                      about["model_config"]["sequence_len"])
    print(json.dumps({"bits_per_byte": nats / math.log(2) / size, "bytes": size,
                      "parameters": sum(one.numel() for one in model.parameters()),
                      "vocab_size": tokenizer.get_vocab_size()}))


if __name__ == "__main__":
    main()
