"""nanochat's own base training on given documents, scored in bits per byte. Needs a checkout of it
and its dependencies (pip install rustbpe wandb filelock requests).

Its tokenizer, loader, model, Muon and AdamW, and schedules run unchanged, by its own programs
scripts.tok_train and scripts.base_train, with the settings of its runs/runcpu.sh unless others are
given. Chosen in its favour: the tokenizer is its own, trained on the same documents, with the
vocabulary size of the other side (its 2^15 would put most of so small a model's work into the
head); torch.compile is used or not, whichever makes faster steps on this machine; starting,
compiling and reading data are not counted, only its training steps, whose number is set so that
its schedule ends with the time given.

This file is also the program that scores, apart, so that nothing of nanochat is imported here:

    python benchmarks/nanochat_recipe.py FOLDER STEP HELD_OUT.jsonl
"""
from __future__ import annotations

import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

RECIPE = {"depth": "6", "head-dim": "64", "window-pattern": "L", "max-seq-len": "512",
          "device-batch-size": "32", "total-batch-size": "16384"}
QUIET = {"eval-every": "-1", "core-metric-every": "-1", "sample-every": "-1", "run": "dummy",
         "model-tag": "model", "device-type": "cpu"}
STARTING = 3  # first steps, which compile; nanochat itself leaves out ten
PROBED = 5    # steps timed before a run
STEP = re.compile(r"^step (\d+)/\d+ .*? dt: ([\d.]+)ms", re.MULTILINE)


class Pace(NamedTuple):
    seconds: float  # of a step
    compiled: bool


def parse(settings: str) -> dict[str, str]:
    """`depth=4,total-batch-size=4096` over the recipe. Raises ValueError if a part is no pair."""
    given = {}
    for part in filter(None, settings.split(",")):
        name, equals, value = part.partition("=")
        if not (name and equals and value):
            raise ValueError(f"nanochat setting {part!r} must be name=value with a name of "
                             "scripts.base_train, such as depth=4")
        given[name.lstrip("-")] = value
    return {**RECIPE, **given}


def prepare(checkout: Path, place: Path, train: list[str], held_out: list[str],
            vocab_size: int) -> None:
    """A copy of the checkout in `place`, its data and its tokenizer trained on `train`."""
    if (place / "held_out.jsonl").is_file():
        return
    if place.exists():  # a preparation that was interrupted
        shutil.rmtree(place)
    shutil.copytree(checkout, place, ignore=shutil.ignore_patterns(".git"))
    write_shards(place, train, held_out)
    _run(place, "scripts.tok_train", f"--vocab-size={vocab_size}", seed=0)
    (place / "held_out.jsonl").write_text(
        "".join(json.dumps(text) + "\n" for text in held_out), encoding="utf-8")


def write_shards(place: Path, train: list[str], held_out: list[str]) -> None:
    """What its loader reads: parquet files in name order, of which the last is held out."""
    import pyarrow as arrow
    from pyarrow import parquet

    folder = place / "base" / "base_data_climbmix"
    folder.mkdir(parents=True, exist_ok=True)
    for name, texts in (("shard_00000", train), ("shard_00001", held_out)):
        parquet.write_table(arrow.table({"text": texts}), folder / f"{name}.parquet",
                            row_group_size=1024)


def shuffle(place: Path, train: list[str], held_out: list[str], seed: int) -> None:
    """Its loader reads documents in order: the seed deals them anew."""
    order = np.random.default_rng(seed).permutation(len(train))
    write_shards(place, [train[i] for i in order], held_out)


def pace(place: Path, settings: dict[str, str]) -> Pace:
    """The faster of compiled and plain steps, each measured over a few."""
    paces = []
    for compiled in (False, True):
        output = _train(place, settings, STARTING + PROBED, 0, compiled)
        steps = step_seconds(output)[STARTING:]
        paces.append(Pace(statistics.median(steps), compiled))
    return min(paces)


def step_seconds(output: str) -> list[float]:
    """The time of each step, from what training printed."""
    return [float(milliseconds) / 1000 for _, milliseconds in STEP.findall(output)]


def run_nanochat(place: Path, settings: dict[str, str], seconds: float, seed: int,
                 measured: Pace) -> dict[str, Any]:
    """One training of `seconds` and its score."""
    iterations = max(1, round(seconds / measured.seconds))
    began = time.perf_counter()
    steps = step_seconds(_train(place, settings, iterations, seed, measured.compiled))
    whole = time.perf_counter() - began
    assert len(steps) == iterations, (len(steps), iterations)
    counted = steps[STARTING:] or steps
    scored = subprocess.run([sys.executable, str(Path(__file__).resolve()), str(place),
                             str(iterations), str(place / "held_out.jsonl")], cwd=place,
                            env=_environment(place, compiled=False), check=True,
                            stdout=subprocess.PIPE, text=True)
    return {**json.loads(scored.stdout.splitlines()[-1]), "iterations": iterations,
            "seconds": statistics.mean(counted) * iterations, "seconds_in_all": whole,
            "compiled": measured.compiled,
            "tokens": iterations * int(settings["total-batch-size"])}


def _train(place: Path, settings: dict[str, str], iterations: int, seed: int,
           compiled: bool) -> str:
    shutil.rmtree(place / "base" / "base_checkpoints", ignore_errors=True)
    every = {**settings, **QUIET, "num-iterations": str(iterations)}
    flags = [f"--{name}={value}" for name, value in every.items()]
    return _run(place, "scripts.base_train", *flags, seed=seed, compiled=compiled)


def _run(place: Path, module: str, *arguments: str, seed: int, compiled: bool = False) -> str:
    """Run one of nanochat's programs and give back what it printed."""
    seeded = Path(__file__).resolve().with_name("seeded.py")
    done = subprocess.run([sys.executable, str(seeded), str(seed), module, *arguments], cwd=place,
                          env=_environment(place, compiled), capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"nanochat's {module} exited with {done.returncode}; it says: "
                         f"{(done.stderr.strip().splitlines() or ['nothing'])[-1]}")
    return done.stdout


def _environment(place: Path, compiled: bool) -> dict[str, str]:
    """nanochat takes its folder, and torch whether to compile, from the environment only."""
    return {**os.environ, "NANOCHAT_BASE_DIR": str(place.resolve() / "base"), "PYTHONPATH": "",
            "TORCHDYNAMO_DISABLE": "0" if compiled else "1"}


def windows(ids: list[int], bos: int, context: int) -> list[tuple[list[int], int]]:
    """A document cut up to predict every token once: windows and how much of each is known."""
    line, known, found = [bos, *ids], 0, []
    stride = context // 2
    for first in range(0, max(1, len(line) - 1 - (context - stride)), stride):
        found.append((line[first:first + context + 1], known))
        known = context - stride
    return found


def score(model: Any, bos: int, documents: list[list[int]], context: int,
          batch: int = 16) -> float:
    """Nats of all documents, each by itself, after the token that begins one."""
    import torch

    cut = sorted((one for ids in documents for one in windows(ids, bos, context)),
                 key=lambda one: len(one[0]))
    nats = 0.0
    for some in range(0, len(cut), batch):
        group = cut[some:some + batch]
        length = max(3, max(len(line) for line, _ in group))  # nanochat reads at least two tokens
        tokens = torch.full((len(group), length), bos)
        targets = torch.full((len(group), length - 1), -1)  # not scored
        for row, (line, known) in enumerate(group):
            tokens[row, :len(line)] = torch.tensor(line)
            targets[row, known:len(line) - 1] = torch.tensor(line[known + 1:])
        with torch.inference_mode():
            losses = model(tokens[:, :-1].contiguous(), targets, loss_reduction="none")
        nats += float(losses.double().sum())
    return nats


def main() -> None:
    place, step, held_out = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    sys.path[0] = str(place)
    import torch
    from nanochat.checkpoint_manager import build_model

    model, tokenizer, about = build_model(place / "base" / "base_checkpoints" / "model", step,
                                          torch.device("cpu"), "eval")
    texts = [json.loads(line) for line in held_out.read_text(encoding="utf-8").splitlines()]
    documents = [tokenizer.encode(text) for text in texts]
    size = sum(len(text.encode()) for text in texts)
    covered = sum(len(tokenizer.decode_single_token_bytes(one)) for ids in documents for one in ids)
    assert covered == size, (covered, size)
    nats = score(model, tokenizer.get_bos_token_id(), documents,
                 about["model_config"]["sequence_len"])
    print(json.dumps({"bits_per_byte": nats / math.log(2) / size, "bytes": size,
                      "parameters": sum(one.numel() for one in model.parameters()),
                      "vocab_size": tokenizer.get_vocab_size()}))


if __name__ == "__main__":
    main()
