"""An MoE model against dense baselines: the same text, machine and wall-clock time.

    python benchmarks/moe_vs_dense.py tiny --data out/quickstart/data --minutes 5 --seeds 3

Three arms take turns: the preset; the dense baseline of equal active FLOPs, which is the same class
with one expert as wide as the chosen experts together; a dense model of equal total parameters.
Each arm first finds its own learning rates among --factors times the preset's rates, in shorter
runs of equal steps. Finished runs are kept in --out and not repeated, so the same command continues
where it stopped; --report only writes the report of the finished runs.

--shorter 1.5 also trains the MoE with a complete schedule in 1/1.5 of the minutes, to see whether
it ends where the others end after all of them. --wider 2 also trains a dense model twice as wide as
the baseline, to check that the baseline is not weak because it is narrow. --only names the arms to
train now. With --nanogpt and --nanochat these programs train on the same text with their own
recipes (quickstart_quality.py and training_peers.py). Of several --nanochat-settings the best one
of shorter runs is taken:

    --nanochat PATH --nanochat-settings depth=6 --nanochat-settings \\
        depth=4,device-batch-size=4,total-batch-size=2048
"""
from __future__ import annotations

import argparse
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from arms import (
    DONE,
    ROUTING_CELLS,
    Arm,
    final_score,
    find_best_rate,
    mean_and_deviation,
    routing_cells,
    train_arm,
)
from quickstart_quality import run_nanogpt
from record import append, machine
from training_peers import Text, read_results, run_nanochat, score_runs

from fira.report.read import Run, numbers, read_run

MOE, DENSE, LARGE = "MoE", "dense, equal active", "dense, equal total"
COLORS = {MOE: "#d9541e", DENSE: "#3b6fb6", LARGE: "#7a8791"}
LIGHTER = ("#e9a27f", "#d9b44a", "#b98ab0")  # the MoE in less time
DARKER = ("#8fb0dc", "#5aa7a0", "#2b4a6f")  # wider dense models
Result = dict[str, Any]  # of another program


def shorter(factor: float) -> str:
    """Name of the MoE arm with a complete schedule in less time."""
    return f"MoE in 1/{factor:g} of the time"


def wider(factor: int) -> str:
    """Name of a dense arm that is wider than the baseline of equal active FLOPs."""
    return f"dense, {factor} times as wide"


def make_arms(preset: str, settings: list[str], factors: list[float],
              widths: list[int]) -> dict[str, Arm]:
    """Arms by name; one more MoE arm for each of `factors`, one more dense arm for each width."""
    moe = Arm("moe", preset, tuple(settings))
    spec = moe.config().model
    active = spec.top_k * spec.d_ff

    def dense(key: str, d_ff: int) -> Arm:
        return replace(moe.with_settings("model.num_experts=1", "model.top_k=1",
                                         f"model.d_ff={d_ff}"), key=key)

    return {MOE: moe, DENSE: dense("dense-active", active),
            LARGE: dense("dense-total", spec.num_experts * spec.d_ff),
            **{wider(width): dense(f"dense-wider-{width}", width * active) for width in widths},
            **{shorter(factor): replace(moe, key=f"moe-shorter-{factor:g}")
               for factor in factors}}


def train_arms(arms: dict[str, Arm], options: argparse.Namespace) -> None:
    """Finds the rates first, then trains seed by seed, so that slow hours hit all arms alike."""
    minutes_divided = {shorter(factor): factor for factor in options.shorter}
    factors = {}
    for name, arm in arms.items():
        factors[name] = factors[MOE] if name in minutes_divided else 1.0
        if options.factors and name not in minutes_divided and (name == MOE
                                                                or arm.key in options.only):
            factors[name] = find_best_rate(arm, options.out, options.factors, options.rate_minutes,
                                           options.ranks)
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for name, arm in arms.items():
            if arm.key in options.only:
                minutes = f"train.minutes={options.minutes / minutes_divided.get(name, 1):g}"
                train_arm(arm.with_rates(factors[name]).with_settings(minutes),
                          options.out / f"{arm.key}-seed{seed}", seed, ranks=options.ranks)


def find_crossing(run: Run, goal: float, axis: str) -> float | None:
    """The tokens or seconds (`axis`) at which the validation curve first falls to `goal`."""
    where, scores = numbers(run.validations, axis), numbers(run.validations, run.score)
    below = np.flatnonzero(scores <= goal)
    if len(below) == 0:
        return None
    last = below[0]
    if last == 0:
        return float(where[0])
    return float(np.interp(-goal, -scores[last - 1:last + 1], where[last - 1:last + 1]))


def median_seconds_to(runs: list[Run], goal: float, shifts: list[float]) -> float | None:
    """Median seconds until each run's curve, moved down by its shift, falls to `goal`.

    A run that never does counts as infinity; the result is None if the median is infinite.
    """
    found = [find_crossing(run, goal + shift, "seconds")
             for run, shift in zip(runs, shifts, strict=True)]
    middle = statistics.median(math.inf if one is None else one for one in found)
    return middle if math.isfinite(middle) else None


def largest_deficit(moes: list[Run], denses: list[Run]) -> tuple[float, float | None]:
    """The largest difference MoE minus dense in bits per byte at equal seconds, and the last second
    at which the MoE is worse (None if never), over all seeds.

    Seconds count from a tenth of the run or from the first validation. Runs are paired in their
    order; between two validations the curves are straight lines.
    """
    worst, last = -math.inf, None
    for moe, dense in zip(moes, denses, strict=False):
        curves = [(numbers(run.validations, "seconds"), numbers(run.validations, run.score))
                  for run in (moe, dense)]
        start = max(curves[0][0][-1] / 10, curves[0][0][0], curves[1][0][0])
        seconds = np.linspace(start, min(curves[0][0][-1], curves[1][0][-1]), 200)
        difference = np.interp(seconds, *curves[0]) - np.interp(seconds, *curves[1])
        worst = max(worst, float(difference.max()))
        if (difference > 0).any():
            last = max(last or 0.0, float(seconds[difference > 0][-1]))
    return worst, last


def write_report(runs: dict[str, list[Run]], peers: dict[str, list[Result]],
                 scores: dict[str, list[float]], options: argparse.Namespace) -> None:
    """Write report.md, curves.png and a line of records.jsonl into --out.

    `peers` holds the results of other programs; `scores` what the runs have by the peers' rule.
    """
    out = options.out
    goal = statistics.mean(final_score(run) for run in runs[DENSE])
    lines = [f"# {out.name}: MoE against dense", "", f"{machine()}. Bits per byte on held-out "
             "text, mean ± deviation over seeds. *To reach*: where the validation curve falls to "
             f"{goal:.4f}, the mean end of the dense baseline; median over seeds. "
             f"{ROUTING_CELLS}", "",
             "| | seeds | parameters, active / total | rate | bits per byte | tokens | seconds to "
             "reach | tokens to reach | imbalance | dead |", "|---" * 10 + "|"]
    lines += [arm_row(name, found, goal) for name, found in runs.items() if found]
    deficit, last = largest_deficit(runs[MOE], runs[DENSE])
    lines += ["", "At equal seconds, from the first tenth of a run or its first validation on, the "
              "MoE is " + (f"worse than the dense baseline by at most {deficit:.4f} bits per byte, "
                           f"until second {last:.0f}." if last else "never worse.")]
    seconds_to_peers = {}
    if peers:
        table, seconds_to_peers = peer_table(peers, runs, scores)
        lines += ["", *table]
    (out / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw_curves(runs, goal, out / "curves.png")
    print("\n".join(lines))
    curves = {name: [[[row["tokens"], round(row["seconds"], 1), round(row[run.score], 4)]
                      for row in run.validations] for run in found] for name, found in runs.items()}
    append(out / "records.jsonl", {
        "goal": goal, "curves": curves, "behind": deficit, "behind_until": last,
        "final": {name: [final_score(run) for run in found] for name, found in runs.items()},
        "peers": peers, "by_their_rule": scores, "moe_seconds_to_peers": seconds_to_peers},
        {"nanoGPT": options.nanogpt, "nanochat": options.nanochat})


def arm_row(name: str, found: list[Run], goal: float) -> str:
    cells = []
    for axis in ("seconds", "tokens"):
        values = [one for run in found if (one := find_crossing(run, goal, axis)) is not None]
        cells.append(f"{statistics.median(values):.3g} ({len(values)} of {len(found)})"
                     if values else "never")
    counts, last = found[0].parameters, found[0].validations[-1]
    return (f"| {name} | {len(found)} | {counts['active'] / 1e6:.1f}M / "
            f"{counts['total'] / 1e6:.1f}M | {found[0].settings['optim.lr']:g} | "
            f"{mean_and_deviation([final_score(run) for run in found])} | "
            f"{last['tokens'] / 1e6:.2f}M | {' | '.join(cells)} | {routing_cells(found)} |")


def peer_table(peers: dict[str, list[Result]], runs: dict[str, list[Run]],
               scores: dict[str, list[float]]) -> tuple[list[str], dict[str, Any]]:
    """The rows of other programs, and the seconds that the MoE takes to each program's end."""
    lines = ["Other programs on the same text for the same time, and the arms, all by the rule of "
             "`fira eval`: each document alone, windows that advance by half, every byte once. "
             "*To reach*: seconds of training until the MoE has what the program ends with, median "
             "over seeds, and the program's seconds divided by them. Validation during training "
             "uses no overlapping windows, so its curve lies higher: *at most* takes the curve as "
             "it is, *about* moves it down by the difference at its end.", "",
             "| | seeds | parameters | vocabulary | bits per byte | tokens | seconds | to reach, "
             "at most | to reach, about | ratio, at least | ratio, about |", "|---" * 11 + "|"]
    for name, found in runs.items():
        if found:
            first, last = found[0], found[0].validations[-1]
            lines.append(f"| {name} | {len(found)} | {first.parameters['total'] / 1e6:.1f}M | "
                         f"{first.settings['model.vocab_size']} | "
                         f"{mean_and_deviation(scores[name])} | "
                         f"{last['tokens'] / 1e6:.2f}M | {last['seconds']:.0f} | | | | |")
    moes, reached = runs[MOE], {}
    shifts = [final_score(run) - score for run, score in zip(moes, scores[MOE], strict=True)]
    for name, results in peers.items():
        goal = statistics.mean(one["bits_per_byte"] for one in results)
        reached[name] = {"at most": median_seconds_to(moes, goal, [0.0] * len(moes)),
                         "about": median_seconds_to(moes, goal, shifts)}
        lines.append(peer_row(name, results, list(reached[name].values())))
    return lines, reached


def peer_row(name: str, results: list[Result], times: list[float | None]) -> str:
    first, seconds = results[0], statistics.mean(one["seconds"] for one in results)
    cells = [", ".join(filter(None, (name, first["asked"].get("settings")))), str(len(results)),
             f"{first['parameters'] / 1e6:.1f}M", str(first["vocab_size"]),
             mean_and_deviation([one["bits_per_byte"] for one in results]),
             f"{first['tokens'] / 1e6:.2f}M", f"{seconds:.0f}",
             *("never" if one is None else f"{one:.0f}" for one in times),
             *("" if one is None else f"{seconds / one:.2f}" for one in times)]
    return f"| {' | '.join(cells)} |"


def draw_curves(runs: dict[str, list[Run]], goal: float, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), dpi=130, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    lighter, darker = iter(LIGHTER * len(runs)), iter(DARKER * len(runs))
    for name, found in runs.items():
        color = COLORS.get(name) or next(lighter if name.startswith(MOE) else darker)
        for number, run in enumerate(found):
            for panel, axis in zip(panels, ("tokens", "seconds"), strict=True):
                panel.plot(numbers(run.validations, axis), numbers(run.validations, run.score),
                           color=color, linewidth=1.4, label=None if number else name)
    for panel, axis in zip(panels, ("tokens", "seconds"), strict=True):
        panel.axhline(goal, color="#999999", linewidth=0.8, linestyle=":")
        panel.set(xlabel=axis, ylim=(None, goal * 1.35))
        panel.grid(alpha=0.2)
    panels[0].set_ylabel("validation bits per byte")
    panels[0].legend(frameon=False)
    figure.savefig(path)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("preset")
    parser.add_argument("settings", nargs="*", help="section.key=value for every arm")
    parser.add_argument("--data", required=True, help="folder that `fira data` wrote")
    parser.add_argument("--minutes", type=float, default=5.0, help="training time of every run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--shorter", type=float, nargs="*", default=[], metavar="FACTOR",
                        help="also train the MoE for 1/FACTOR of --minutes")
    parser.add_argument("--wider", type=int, nargs="*", default=[], metavar="FACTOR",
                        help="also train a dense model FACTOR times as wide as the baseline")
    parser.add_argument("--only", nargs="*", metavar="ARM", help="train only these arms: moe, "
                        "dense-active, dense-total, dense-wider-FACTOR, moe-shorter-FACTOR")
    parser.add_argument("--ranks", type=int, default=1, help="processes that train each arm, one "
                        "thread each [default: one process with torch's threads]")
    parser.add_argument("--factors", type=float, nargs="*", default=[0.5, 1.0, 2.0],
                        help="multiples of the preset's learning rates to try; none: the preset's")
    parser.add_argument("--rate-minutes", type=float, help="training time of a run that tries a "
                        "rate [default: half of --minutes; shorter ones mislead]")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--nanochat", type=Path, help="a checkout of nanochat")
    parser.add_argument("--nanochat-settings", action="append", metavar="NAME=VALUE,...",
                        help="settings of its base training over its CPU recipe")
    parser.add_argument("--peer-seeds", type=int, default=3, help="seeds of nanoGPT and nanochat")
    parser.add_argument("--out", type=Path, help="[default: out/moe-vs-dense-PRESET]")
    parser.add_argument("--report", action="store_true", help="train nothing")
    options = parser.parse_intermixed_args()
    options.out = options.out or Path("out") / f"moe-vs-dense-{Path(options.preset).stem}"
    options.settings.append(f"data.folder={options.data}")
    options.rate_minutes = options.rate_minutes or options.minutes / 2
    return options


def main() -> None:
    options = parse_arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    arms = make_arms(options.preset, options.settings, options.shorter, options.wider)
    keys = [arm.key for arm in arms.values()]
    if unknown := set(options.only or ()) - set(keys):
        raise SystemExit(f"--only {unknown.pop()!r} is not one of {', '.join(keys)}")
    options.only = options.only or keys
    text = Text(Path(options.data), arms[MOE].config().train.validation_tokens)
    if not options.report:
        train_arms(arms, options)
        if options.nanogpt:
            run_nanogpt(options.nanogpt, text, options.out, options.minutes, options.peer_seeds)
        if options.nanochat:
            run_nanochat(options.nanochat, text, options.out, options.minutes, options.peer_seeds,
                         options.nanochat_settings or [""], options.rate_minutes)
    runs = {name: [read_run(done.parent)
                   for done in sorted(options.out.glob(f"{arm.key}-seed*/{DONE}"))]
            for name, arm in arms.items()}
    if not (runs[MOE] and runs[DENSE]):
        print("no run of the MoE and of the dense baseline is finished yet: nothing to compare")
        return
    scores = {name: score_runs(found, text) for name, found in runs.items()}
    write_report(runs, read_results(options.out), scores, options)


if __name__ == "__main__":
    main()
