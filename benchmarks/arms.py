"""Arms of a comparison: training runs that are kept when finished, so that a comparison that was
stopped continues where it stopped."""
from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fira.config import load_preset
from fira.report.read import Run, numbers, read_run
from fira.stages.config import configure
from fira.stages.pretrain import PRETRAIN

DONE = "done.json"
ROUTING_CELLS = ("Imbalance: CV of expert load after the first tenth, mean and worst twentieth of "
                 "a run; dead: the most experts without a token in one step of that part.")


@dataclass(frozen=True)
class Arm:
    """One side of a comparison: a preset with settings. `key` names the folders of its runs."""

    key: str
    preset: str
    settings: tuple[str, ...]

    def config(self) -> Any:
        return configure(PRETRAIN, load_preset(self.preset), self.settings)

    def with_settings(self, *settings: str) -> Arm:
        return replace(self, settings=(*self.settings, *settings))

    def with_rates(self, factor: float) -> Arm:
        """The same arm with its learning rates times `factor`, except the routers' rate."""
        optim = self.config().optim
        return self.with_settings(*(f"optim.{rate}={value * factor:g}"
                                    for rate in ("lr", "embedding_lr")
                                    if (value := getattr(optim, rate, None)) is not None))


def train_arm(arm: Arm, folder: Path, seed: int, threads: int | None = None,
              ranks: int = 1) -> Run:
    """The run of `arm` with `seed` in `folder`: read if it is finished, else trained or continued.

    With `threads` the run uses that many, and its output goes into a file beside the folder. With
    several `ranks` each is a process with one thread that takes its own rows of every batch.
    Raises ValueError if the finished run had other settings, and CalledProcessError if one fails.
    """
    command = [arm.preset, *arm.settings, f"train.seed={seed}"]
    wanted = [*command, *([f"ranks={ranks}"] if ranks > 1 else [])]
    done = folder / DONE
    if done.is_file():
        if (before := json.loads(done.read_text(encoding="utf-8"))) != wanted:
            raise ValueError(f"{folder} was run with {before}, not {wanted}; "
                             "choose another --out, or remove that folder")
        return read_run(folder)
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    call = [sys.executable, *launcher, "-m", "fira", "train", *command, "--run-folder",
            str(folder), "--resume"]
    if threads is None:
        subprocess.run(call, check=True)
    else:
        with open(f"{folder}.log", "a", encoding="utf-8") as log:
            subprocess.run(call, check=True, stdout=log, stderr=log,
                           env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    done.write_text(json.dumps(wanted) + "\n", encoding="utf-8")
    return read_run(folder)


def find_best_rate(arm: Arm, folder: Path, factors: Iterable[float], minutes: float,
                   ranks: int = 1) -> float:
    """The one of `factors` of the arm's learning rates with the lowest final bits per byte.

    Each is tried once, with seed 0: the first for `minutes`, the others for as many steps as the
    first one made, so that a temporarily slow machine does not decide.
    """
    scores, length = {}, f"train.minutes={minutes:g}"
    for factor in factors:
        run = train_arm(arm.with_rates(factor).with_settings(length),
                        folder / f"rate-{arm.key}-{factor:g}", seed=0, ranks=ranks)
        length = f"train.steps={run.steps[-1]['step']}"
        scores[factor] = final_score(run)
    best = min(scores, key=lambda factor: scores[factor])
    if len(scores) > 2 and best in (min(scores), max(scores)):
        print(f"{arm.key}: {best:g} times the preset's rates is best, at the edge of "
              f"{sorted(scores)}; widen --factors", file=sys.stderr)
    return best


def final_score(run: Run) -> float:
    """Validation bits per byte after the last step."""
    return run.validations[-1][run.score]


def mean_and_deviation(values: list[float]) -> str:
    """mean ± standard deviation over seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4f} ± {deviation:.4f}"


def routing_cells(runs: list[Run]) -> str:
    """The two cells that ROUTING_CELLS explains; empty for dense models."""
    imbalances, dead = [], 0
    for run in runs:
        rows = [row for row in run.steps if row.get("imbalance") is not None]
        part = max(1, len(rows) // 20)
        later = rows[2 * part:]
        imbalances += [float(numbers(later[first:first + part], "imbalance").mean())
                       for first in range(0, len(later), part)]
        dead = max([dead, *(row["dead"] for row in later)])
    if not imbalances:
        return " | "
    return f"{statistics.mean(imbalances):.2f}, {max(imbalances):.2f} | {dead}"
