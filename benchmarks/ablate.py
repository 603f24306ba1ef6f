"""What settings gain: rows of settings with several seeds, at equal tokens and at equal time.

    python benchmarks/ablate.py tiny --data DATA --row "top-8" model.top_k=8 model.d_ff=32 \\
        --row "AdamW" optim.rule=adamw optim.lr=3e-3 --set train.validation_tokens=131072

The first row is always the preset. At equal wall-clock time a row gets as many steps as the time of
the preset's run buys at the row's own seconds per step. All seconds per step are measured first, in
turns, because the seconds of separate runs on a shared machine do not compare. Finished runs are
kept in --out and not repeated, so the same command continues where it stopped. docs/results/
ablations.md has the results so far.
"""
from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from arms import (
    ROUTING_CELLS,
    Arm,
    final_score,
    mean_and_deviation,
    routing_cells,
    train_arm,
)
from record import append, machine, new_parser, time_in_turns
from train_step import training_step

from fira.model import build_meta
from fira.parallel.layout import Layout
from fira.parallel.mesh import Mesh
from fira.report.read import Run
from fira.runtime import keep_large_blocks

RATES = ("optim.lr=", "optim.router_lr=", "optim.embedding_lr=")  # do not change a step's time
SAME_COST = 0.05  # if a step's time differs less from the preset's, one run serves both comparisons


class RunKey(NamedTuple):
    """One run; both comparisons of a row may need the same."""

    arm: str
    steps: int
    seed: int


@dataclass(frozen=True)
class Row:
    """One choice of settings. `cost` is the time of its step divided by the preset's."""

    name: str
    arm: Arm
    cost: float
    token_steps: int
    clock_steps: int

    def runs(self, steps: int, seeds: int) -> list[RunKey]:
        return [RunKey(self.arm.key, steps, seed) for seed in range(1, seeds + 1)]


def make_rows(options: argparse.Namespace) -> list[Row]:
    choices = {"preset": (), **{name: tuple(settings) for name, *settings in options.row}}
    costs = measure_costs(choices, options)
    rows = []
    for name, settings in choices.items():
        clock = options.steps if abs(costs[name] - 1) < SAME_COST else \
            round(options.steps / costs[name])
        rows.append(Row(name, make_arm(settings, options), costs[name], options.steps, clock))
    return rows


def make_arm(settings: tuple[str, ...], options: argparse.Namespace) -> Arm:
    """The arm's key, which names the folders of its runs, consists of the settings."""
    text = "-".join(setting.rpartition(".")[2].replace("=", "") for setting in settings)
    key = "".join(c if c.isalnum() or c in "-." else "_" for c in text) or "preset"
    return Arm(key, options.preset, (*options.set, *settings))


def measure_costs(choices: dict[str, tuple[str, ...]],
                  options: argparse.Namespace) -> dict[str, float]:
    """The time of each row's step divided by the preset's, measured in turns, kept in --out."""
    file = options.out / "costs.json"
    kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    arms = {name: make_arm(tuple(one for one in settings if not one.startswith(RATES)), options)
            for name, settings in choices.items()}
    missing = {arm.key: arm for arm in arms.values() if arm.key not in kept}
    if missing:
        preset = make_arm((), options)
        seconds = step_seconds(list({preset.key: preset, **missing}.values()), options.threads)
        kept |= {key: seconds[key] / seconds[preset.key] for key in missing}
        file.write_text(json.dumps(kept) + "\n", encoding="utf-8")
    return {name: kept[arm.key] for name, arm in arms.items()}


def step_seconds(arms: list[Arm], threads: int, repeats: int = 11) -> dict[str, float]:
    """The shortest time of a step of each arm, by key: other programs disturb it least."""
    keep_large_blocks()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    seconds = time_in_turns({arm.key: random_step(arm) for arm in arms}, repeats, warm_up=2)
    torch.set_num_threads(before)
    return {key: min(found) for key, found in seconds.items()}


def random_step(arm: Arm) -> Callable[[], None]:
    """A training step of the arm on random tokens."""
    config = arm.config()
    step = training_step(Layout(Mesh(), build_meta(config.model), seed=1), config.optim)
    ids = torch.randint(0, config.model.vocab_size,
                        (config.train.batch_size, config.train.sequence_length + 1))
    return functools.partial(step, ids.split(config.train.micro_batch))


def start_runs(rows: list[Row], pool: ThreadPoolExecutor,
               options: argparse.Namespace) -> dict[RunKey, Future[Run]]:
    runs: dict[RunKey, Future[Run]] = {}
    for row in rows:
        for key in (*row.runs(row.token_steps, options.seeds),
                    *row.runs(row.clock_steps, options.seeds)):
            if key not in runs:
                arm = row.arm.with_settings(f"data.folder={options.data}",
                                            f"train.steps={key.steps}")
                folder = options.out / f"{key.arm}-{key.steps}-seed{key.seed}"
                runs[key] = pool.submit(train_arm, arm, folder, key.seed, threads=options.threads)
    return runs


def heading(options: argparse.Namespace) -> str:
    return (f"`{' '.join([options.preset, *options.set])}` unless a row says otherwise, "
            f"{Path(options.data).name}, {options.seeds} seeds, {options.threads} threads per run, "
            f"{machine()}. Validation bits per byte, mean ± deviation over seeds. Cost: the time "
            f"of a step divided by the preset's. Equal tokens: {options.steps} steps. "
            f"{ROUTING_CELLS}\n\n"
            "| | cost | equal tokens | equal time | imbalance | dead |\n|---|---|---|---|---|---|")


def parse_arguments() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("preset")
    parser.add_argument("--data", required=True, help="folder that `fira data` wrote")
    parser.add_argument("--row", action="append", nargs="+", default=[], metavar="WORD",
                        help="name of a row and its settings, section.key=value")
    parser.add_argument("--set", nargs="*", default=[], metavar="SETTING",
                        help="section.key=value for every row")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600, help="steps at equal tokens")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time")
    parser.add_argument("--out", type=Path, default=Path("out/ablate"))
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    rows, results = make_rows(options), {}
    print(heading(options))
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = start_runs(rows, pool, options)
        for row in rows:
            tokens, clock = ([runs[key].result() for key in row.runs(steps, options.seeds)]
                             for steps in (row.token_steps, row.clock_steps))
            scores = [[final_score(run) for run in side] for side in (tokens, clock)]
            both = list({run.path: run for run in tokens + clock}.values())
            print(f"| {row.name} | {row.cost:.2f} | {' | '.join(map(mean_and_deviation, scores))} "
                  f"| {routing_cells(both)} |", flush=True)
            results[row.name] = {"settings": row.arm.settings, "cost": row.cost,
                                 "equal_tokens": scores[0], "equal_time": scores[1]}
    append(options.json, {"benchmark": "ablate", "rows": results, "steps": options.steps})


if __name__ == "__main__":
    main()
