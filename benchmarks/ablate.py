"""What each choice is worth: rows of settings, three seeds, at equal tokens and equal wall clock.

    python benchmarks/ablate.py --data DATA --steps 600 --seeds 3 --jobs 2
    python benchmarks/ablate.py --data DATA --group balance --group optimizer

Every group changes one thing of the preset. *Equal wall clock* gives a row as many steps as the
base's time buys at the row's own cost of a step, all costs being measured in turns first
(step_cost.py): seconds of different runs do not compare on a shared machine. Each run has
--threads threads, --jobs run at once. A finished run is kept in --out and not run again, so the
same command goes on where it stopped; the table is written anew after each row.
The row with a shared expert is of shared_expert.py: FIRA2 itself keeps Qwen3-MoE's mathematics.
"""
from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from arms import Arm, final, routing, spread, train_arm
from record import machine
from step_cost import step_seconds

from fira.config import flatten, load_preset
from fira.report.read import Run
from fira.stages.pretrain import PretrainConfig, configure

SHARED = "shared_expert="  # its width: of the arm, not of the preset
RATES = ("optim.lr=", "optim.router_lr=", "optim.embedding_lr=")  # a step costs the same at any
SAME_COST = 0.05  # a step within this of the base's: one run serves both comparisons


def groups(preset: str, settings: list[str]) -> dict[str, dict[str, tuple[str, ...]]]:
    """Rows of settings, by group; the row without settings is the preset."""
    config = configure(load_preset(preset), settings)
    spec, optim = config.model, config.optim
    active = spec.top_k * spec.d_ff
    long = ("train.sequence_length=512", "train.micro_batch=4")
    fira = "model=" + json.dumps({
        "architecture": "fira", "vocab_size": spec.vocab_size, "d_model": spec.d_model,
        "n_head": spec.n_head, "num_layers": spec.num_layers, "d_ff": 4 * spec.d_model,
        "num_experts": 4, "top_k": 1, "context": spec.context, "dropout": 0.0})
    shapes = [(4, active, 1), (8, active // 2, 2), (16, active // 4, 4), (32, active // 4, 4),
              (64, active // 4, 4), (32, active // 8, 8)]
    return {
        "FIRA, chosen of 4": {"top-1": (fira,),
                              "top-1, handover": (fira, "model.balance=handover",
                                                  "model.balance_weight=0.1"),
                              "top-2": (fira, "model.top_k=2"),
                              "top-2, half as wide": (fira, "model.top_k=2",
                                                      f"model.d_ff={2 * spec.d_model}")},
        "FIRA2, experts of equal active work": {
            "dense": ("model.num_experts=1", "model.top_k=1", f"model.d_ff={active}"),
            **{f"{experts} of {width}, top-{k}": differing(spec, num_experts=experts, d_ff=width,
                                                          top_k=k)
               for experts, width, k in shapes}},
        "shared expert": {"none": (), f"one of {spec.d_ff}, top-{spec.top_k - 1}": (
            f"model.top_k={spec.top_k - 1}", f"{SHARED}{spec.d_ff}")},
        "balance": {f"{name}, {weight:g}" if name in ("loss", "handover") else name:
                    differing(spec, balance=name, balance_weight=weight)
                    for name, weight in (("handover", 0.1), ("loss", 0.1), ("loss", 0.01),
                                         ("bias", 0.1), ("quantile", 0.1), ("none", 0.1))},
        "optimizer": {"Muon": (), "AdamW, lr 3e-3": ("optim.rule=adamw", "optim.lr=3e-3"),
                      "AdamW, lr 6e-3": ("optim.rule=adamw", "optim.lr=6e-3")},
        "router's learning rate": {f"{rate:g}": () if rate == 5e-3 else (f"optim.router_lr={rate}",)
                                   for rate in (1e-3, 5e-3, 2e-2)},
        "experts take turns with Muon": {f"{turns}": () if turns == optim.turns else
                                         (f"optim.turns={turns}",) for turns in (1, 2, 4, 8)},
        "head": {"the embedding's": (), "its own": ("model.tied=false",),
                 "its own, embedding's rate times 4": ("model.tied=false",
                                                       f"optim.embedding_lr={4 * optim.lr:g}")},
        "copying": copying(config),
        "sequences": {"128": (), "128, 32 at first": ("train.first_length=32",),
                      "512": long, "512, 64 at first": (*long, "train.first_length=64")},
    }


def copying(config: PretrainConfig) -> dict[str, tuple[str, ...]]:
    """With a head of its own: what lets attention learn to copy, both, each and neither."""
    rows, now = {}, flatten(config)
    for name, back, follows in (("neither", False, 0.0), ("looks back", True, 0.0),
                                ("head follows", False, 0.25), ("both", True, 0.25)):
        wanted = {"model.tied": False, "model.look_back": back, "optim.head_follows": follows}
        rows[name] = tuple(f"{key}={json.dumps(value)}" for key, value in wanted.items()
                           if now[key] != value)
    return rows


def differing(spec: object, **values: object) -> tuple[str, ...]:
    """Settings for the values that are not the preset's own."""
    return tuple(f"model.{key}={value}" for key, value in values.items()
                 if getattr(spec, key) != value)


class Asked(NamedTuple):
    """One run. Rows of several groups may ask for the same."""

    key: str
    steps: int
    seed: int


@dataclass(frozen=True)
class Row:
    """One choice: its arm, a step's cost over the base's, and the steps of both comparisons."""

    name: str
    arm: Arm
    cost: float
    token_steps: int
    clock_steps: int

    def asked(self, seeds: int) -> list[Asked]:
        return [Asked(self.arm.key, steps, seed) for seed in range(1, seeds + 1)
                for steps in sorted({self.token_steps, self.clock_steps})]


def make_rows(options: argparse.Namespace) -> dict[str, list[Row]]:
    """Every group's rows with their measured costs."""
    table = groups(options.preset, options.settings)
    if unknown := set(options.group or ()) - table.keys():
        raise SystemExit(f"--group {unknown.pop()!r} is not one of {', '.join(table)}")
    chosen = {group: table[group] for group in options.group or table}
    costs = step_costs({work(settings) for rows in chosen.values() for settings in rows.values()},
                       options)
    rows: dict[str, list[Row]] = {}
    for group, members in chosen.items():
        for name, settings in members.items():
            cost = costs[key(work(settings))] / costs[key(())]
            clock = options.steps if abs(cost - 1) < SAME_COST else round(options.steps / cost)
            rows.setdefault(group, []).append(
                Row(name, make_arm(settings, options), cost, options.steps, clock))
    return rows


def work(settings: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the settings that a step's cost depends on."""
    return tuple(one for one in settings if not one.startswith(RATES))


def step_costs(choices: set[tuple[str, ...]], options: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step by key; what --out/costs.json lacks is measured in turns with the base."""
    kept = options.out / "costs.json"
    costs = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    missing = [make_arm(settings, options) for settings in sorted(choices - {()})
               if key(settings) not in costs]
    if missing or not costs:
        found = step_seconds([make_arm((), options), *missing], options.threads)
        scale = costs.get(key(()), found[key(())]) / found[key(())]
        costs |= {name: seconds * scale for name, seconds in found.items()}
        kept.write_text(json.dumps(costs) + "\n", encoding="utf-8")
    return costs


def make_arm(settings: tuple[str, ...], options: argparse.Namespace) -> Arm:
    shared = sum(int(one.removeprefix(SHARED)) for one in settings if one.startswith(SHARED))
    own = (one for one in settings if not one.startswith(SHARED))
    return Arm(key(settings), options.preset, (*own, *options.settings), shared)


def key(settings: Iterable[str]) -> str:
    """A folder's name that says the settings; rows of several groups share their runs."""
    text = "-".join(setting.partition("=")[0].rpartition(".")[2] + setting.partition("=")[2]
                    if len(setting) < 40 else "fira" for setting in settings)
    return "".join(c if c.isalnum() or c in "-." else "_" for c in text) or "base"


def start_runs(rows: Iterable[Row], pool: ThreadPoolExecutor,
               options: argparse.Namespace) -> dict[Asked, Future[Run]]:
    """Every run of the rows once, in their order."""
    runs: dict[Asked, Future[Run]] = {}
    for row in rows:
        for asked in row.asked(options.seeds):
            if asked not in runs:
                arm = row.arm.with_settings(f"data.folder={options.data}",
                                            f"train.steps={asked.steps}")
                runs[asked] = pool.submit(
                    train_arm, arm, options.out / f"{asked.key}-{asked.steps}-seed{asked.seed}",
                    asked.seed, threads=options.threads)
    return runs


def heading(options: argparse.Namespace) -> list[str]:
    name = " ".join([options.preset, *options.settings])
    return ["# Ablations", "", f"`{name}` unless a row says otherwise, "
            f"{Path(options.data).name}, {options.seeds} seeds, {options.threads} thread a run, on "
            f"{machine()}. Bits per byte on held-out text, mean ± deviation over seeds. Equal "
            f"tokens: {options.steps} steps. Equal wall clock: as many steps as the base's time "
            "buys at the row's cost of a step, which is over the base's. Imbalance: CV of the "
            "experts' loads after the first tenth, mean and worst twentieth of a run; dead: "
            "experts without a row in some step after it. Made by `python benchmarks/ablate.py`.",
            ""]


def table_row(row: Row, tokens: list[Run], clock: list[Run]) -> str:
    runs = list({run.path: run for run in tokens + clock}.values())
    cells = [spread([final(run) for run in side]) for side in (tokens, clock)]
    return f"| {row.name} | {row.cost:.2f} | {' | '.join(cells)} | {routing(runs)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="folder that `fira data` wrote")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--group", action="append", help="default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600, help="of the equal tokens")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    parser.add_argument("--out", type=Path, default=Path("out/ablate"))
    parser.add_argument("--table", type=Path, default=Path("docs/results/ablations.md"))
    parser.add_argument("settings", nargs="*", help="section.key=value, for every row")
    options = parser.parse_intermixed_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = make_rows(options)
    lines = heading(options)
    options.table.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = start_runs((row for members in rows.values() for row in members), pool, options)
        for group, members in rows.items():
            lines += [f"## {group}", "", "| | cost | equal tokens | equal wall clock | imbalance "
                      "| dead |", "|---|---|---|---|---|---|"]
            for row in members:
                tokens, clock = ([runs[row.arm.key, steps, seed].result()
                                  for seed in range(1, options.seeds + 1)]
                                 for steps in (row.token_steps, row.clock_steps))
                lines.append(table_row(row, tokens, clock))
                options.table.write_text("\n".join(lines) + "\n", encoding="utf-8")
                print(lines[-1], flush=True)
            lines.append("")


if __name__ == "__main__":
    main()
