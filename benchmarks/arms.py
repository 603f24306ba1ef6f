"""Arms of a comparison: training runs, kept when finished, so that it may stop and go on."""
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
from fira.model.files import build_meta
from fira.model.transformer import count_parameters
from fira.report.read import Run, read_run
from fira.stages.pretrain import configure

DONE = "done.json"
SHARED = Path(__file__).resolve().with_name("shared_expert.py")


@dataclass(frozen=True)
class Arm:
    """One side: a preset with settings. `key` names its folders; `shared` is the width of an expert
    that every token goes to (shared_expert.py)."""

    key: str
    preset: str
    settings: tuple[str, ...]
    shared: int = 0

    def config(self) -> Any:
        return configure(load_preset(self.preset), self.settings)

    def with_settings(self, *settings: str) -> Arm:
        return replace(self, settings=(*self.settings, *settings))

    def at_rates(self, factor: float) -> Arm:
        """With so many times its learning rates; the routers' stays."""
        optim = self.config().optim
        return self.with_settings(*(f"optim.{rate}={value * factor:g}"
                                    for rate in ("lr", "embedding_lr")
                                    if (value := getattr(optim, rate)) is not None))

    @property
    def flops_per_token(self) -> float:
        """On average over a run whose sequences may grow."""
        config = self.config()
        return statistics.mean(
            count_parameters(build_meta(config.model),
                             config.train.length_at(tenth / 10)).flops_per_token
            for tenth in range(10))


def train_arm(arm: Arm, folder: Path, seed: int, threads: int | None = None,
              ranks: int = 1) -> Run:
    """The run of `arm` with `seed` in `folder`: read if finished, else trained or continued.

    With `threads` the run has so many, and what it prints goes into a file beside the folder. Of
    several `ranks` each has one thread and rows of its own of every batch.
    Raises ValueError if the finished run had other settings, and CalledProcessError if one fails.
    """
    command = [arm.preset, *arm.settings, f"train.seed={seed}"]
    asked = [*command, *([f"ranks={ranks}"] if ranks > 1 else []),
             *([f"shared={arm.shared}"] if arm.shared else [])]
    done = folder / DONE
    if done.is_file():
        if (before := json.loads(done.read_text(encoding="utf-8"))) != asked:
            raise ValueError(f"{folder} was run with {before}, not {asked}; "
                             "choose another --out, or remove that folder")
        return read_run(folder)
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    program = [str(SHARED), str(arm.shared)] if arm.shared else ["-m", "fira"]
    call = [sys.executable, *launcher, *program, "train", *command, "--run-folder", str(folder),
            "--resume"]
    if threads is None:
        subprocess.run(call, check=True)
    else:
        with open(f"{folder}.log", "a", encoding="utf-8") as log:
            subprocess.run(call, check=True, stdout=log, stderr=log,
                           env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    done.write_text(json.dumps(asked) + "\n", encoding="utf-8")
    return read_run(folder)


def best_factor(arm: Arm, folder: Path, factors: Iterable[float], minutes: float,
                ranks: int = 1) -> float:
    """The one of `factors` of the arm's learning rates with the lowest final bits per byte.

    Each is tried once, with seed 0: the first over `minutes`, the others over as many steps, so
    that no rate loses by a machine's bad minutes.
    """
    scores, horizon = {}, f"train.minutes={minutes:g}"
    for factor in factors:
        run = train_arm(arm.at_rates(factor).with_settings(horizon),
                        folder / f"rate-{arm.key}-{factor:g}", seed=0, ranks=ranks)
        horizon = f"train.steps={run.steps[-1].step}"
        scores[factor] = final(run)
    best = min(scores, key=lambda factor: scores[factor])
    if len(scores) > 2 and best in (min(scores), max(scores)):
        print(f"{arm.key}: {best:g} times the preset's rates is best, at the edge of "
              f"{sorted(scores)}; widen --factors", file=sys.stderr)
    return best


def final(run: Run) -> float:
    """Bits per byte after the last step."""
    return run.validations[-1].bits_per_byte


def spread(values: list[float]) -> str:
    """mean ± standard deviation over seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4f} ± {deviation:.4f}"


def imbalance(run: Run) -> list[float]:
    """Mean CV of the experts' loads over each twentieth of the run after its first tenth."""
    values = [step.imbalance for step in run.steps if step.imbalance is not None]
    part = max(1, len(values) // 20)
    return [statistics.mean(values[first:first + part])
            for first in range(2 * part, len(values), part)]


def routing(runs: list[Run]) -> str:
    """Two cells after the first tenth: imbalance, mean and worst twentieth of a run; most dead."""
    uneven = [value for run in runs for value in imbalance(run)]
    if not uneven:
        return " | "
    dead = max(step.dead for run in runs for step in run.steps[len(run.steps) // 10:])
    return f"{statistics.mean(uneven):.2f}, {max(uneven):.2f} | {dead}"
