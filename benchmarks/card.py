"""The report card of a comparison: a table and the curves, drawn from finished runs."""
from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from arms import Arm, final, routing, spread
from record import append, machine

from fira.infer.load import load
from fira.report.read import Run, Validation

MOE, DENSE, LARGE = "MoE", "dense, equal active", "dense, equal total"
COLORS = {MOE: "#d9541e", DENSE: "#3b6fb6", LARGE: "#7a8791"}
PALER = ("#e9a27f", "#d9b44a", "#b98ab0")  # the MoE in less time
COLDER = ("#8fb0dc", "#5aa7a0", "#2b4a6f")  # a wider dense model
AXES: dict[str, Callable[[Validation, float], float]] = {
    "tokens": lambda row, flops: row.tokens,
    "training FLOPs": lambda row, flops: row.tokens * flops,
    "seconds": lambda row, flops: row.seconds,
}


def sooner(factor: float) -> str:
    """The MoE with all of its schedule in so much less time."""
    return f"MoE in 1/{factor:g} of the time"


def wider(factor: int) -> str:
    """A dense model so many times as wide as the twin of equal active FLOPs."""
    return f"dense, {factor} times as wide"


def reach(run: Run, goal: float, flops: float) -> dict[str, float | None]:
    """Where the run's validation first falls to `goal`, by each axis; None if it never does."""
    rows = run.validations
    for before, after in zip([None, *rows], rows, strict=False):
        if after.bits_per_byte > goal:
            continue
        found = {}
        for name, axis in AXES.items():
            end = axis(after, flops)
            if before is None:
                found[name] = end
                continue
            start = axis(before, flops)
            part = (before.bits_per_byte - goal) / (before.bits_per_byte - after.bits_per_byte)
            found[name] = start + part * (end - start)
        return found
    return dict.fromkeys(AXES)


def behind(moes: list[Run], denses: list[Run]) -> tuple[float, float | None]:
    """How far the MoE is ever behind, in bits per byte at equal seconds, and until which second.

    The worst of the seeds, from the first tenth of its run (or the first validation) on; None if it
    is never behind. Pairs the runs in their order; between two validations a curve is straight.
    """
    worst, last = -math.inf, None
    for moe, dense in zip(moes, denses, strict=False):
        curves = [([row.seconds for row in run.validations],
                   [row.bits_per_byte for row in run.validations]) for run in (moe, dense)]
        end = min(seconds[-1] for seconds, _ in curves)
        start = max(moe.validations[-1].seconds / 10, *(seconds[0] for seconds, _ in curves))
        for second in np.linspace(start, end, 200):
            mixture, twin = (float(np.interp(second, *curve)) for curve in curves)
            worst = max(worst, mixture - twin)
            if mixture > twin:
                last = max(last or 0.0, float(second))
    return worst, last


def decode_speed(folder: Path, tokens: int = 128) -> float:
    """Greedy tokens/s of one sequence, the best of three."""
    model, tokenizer, _ = load(folder, "cpu")
    tokens = min(tokens, model.spec.context - 1)
    best = 0.0
    for _ in range(3):
        began = time.perf_counter()
        model.generate([tokenizer.end_of_text], max_new_tokens=tokens, temperature=0.0,
                       end_of_text=-1)
        best = max(best, tokens / (time.perf_counter() - began))
    return best


def report(arms: dict[str, Arm], runs: dict[str, list[Run]], out: Path,
           rivals: dict[str, list[dict[str, Any]]], scores: dict[str, list[float]]) -> None:
    """Write card.md, card.png and a line of card.jsonl into `out`.

    `rivals` holds the results of other programs by name; `scores` what the runs of an arm have by
    their rule.
    """
    goal = statistics.mean(final(run) for run in runs[DENSE])
    lines = [f"# {out.name}: mixture of experts against dense", "", f"{machine()}. Bits per byte "
             f"on held-out text, mean ± deviation over seeds. *To reach*: where the validation "
             f"curve falls to {goal:.4f}, the end of the dense twin, median over seeds. "
             "Imbalance: CV of the experts' loads after the first tenth, mean and worst twentieth "
             "of a run; dead: experts without a row in some step after it.", "",
             "| | seeds | parameters, active / total | rate | bits per byte | tokens | seconds "
             "to reach | tokens to reach | training FLOPs to reach | decode tokens/s | imbalance "
             "| dead |", "|---" * 12 + "|"]
    lines += [table_row(name, found, arms[name].flops_per_token, goal)
              for name, found in runs.items() if found]
    lag, last = behind(runs[MOE], runs[DENSE])
    lines += ["", "At equal seconds, from the first tenth of a run or its first validation on, "
              "the MoE is "
              + (f"behind its dense twin by at most {lag:.4f} bits per byte, until second "
                 f"{last:.0f}." if last else "never behind its dense twin.")]
    ratios = {}
    if rivals:
        found, ratios = rival_table(rivals, runs, scores)
        lines += ["", *found]
    (out / "card.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw(arms, runs, goal, out / "card.png")
    print("\n".join(lines))
    append(out / "card.jsonl", {
        "goal": goal,
        "final": {name: [final(run) for run in found] for name, found in runs.items()},
        "curves": {name: [[[row.tokens, round(row.seconds, 1), round(row.bits_per_byte, 4)]
                           for row in run.validations] for run in found]
                   for name, found in runs.items()},
        "behind": lag, "behind_until": last,
        "rivals": rivals, "by_their_rule": scores, "moe_seconds_to_rivals": ratios})


def table_row(name: str, found: list[Run], flops: float, goal: float) -> str:
    reached = [reach(run, goal, flops) for run in found]
    cells = []
    for axis in ("seconds", "tokens", "training FLOPs"):
        values = [one[axis] for one in reached if one[axis] is not None]
        cells.append(f"{statistics.median(values):.3g} ({len(values)} of {len(found)})"
                     if values else "never")
    counts, last = found[0].parameters, found[0].validations[-1]
    return (f"| {name} | {len(found)} | {counts['active'] / 1e6:.1f}M / "
            f"{counts['total'] / 1e6:.1f}M | {found[0].settings['optim.lr']:g} | "
            f"{spread([final(run) for run in found])} | {last.tokens / 1e6:.2f}M | "
            f"{' | '.join(cells)} | {decode_speed(found[0].path):.0f} | {routing(found)} |")


def rival_table(rivals: dict[str, list[dict[str, Any]]], runs: dict[str, list[Run]],
                scores: dict[str, list[float]]) -> tuple[list[str], dict[str, Any]]:
    """The rows of other programs, and the seconds the MoE takes to each one's end, as written."""
    lines = ["Other programs on the same text for the same time, and the arms, all by the rule of "
             "`fira eval`: each document alone, windows that advance by half, every byte once. "
             "*To reach*: seconds of the MoE's training until it has what the program ends with, "
             "median over its seeds, and the program's seconds over them. Training validates "
             "without the overlap of windows, so its curve lies higher: *at most* takes it as it "
             "is, *about* moves it down by the difference at its end.", "",
             "| | seeds | parameters | vocabulary | bits per byte | tokens | seconds | to reach, "
             "at most | to reach, about | ratio, at least | ratio, about |", "|---" * 11 + "|"]
    for name, found in runs.items():
        if found:
            first, last = found[0], found[0].validations[-1]
            lines.append(f"| {name} | {len(found)} | {first.parameters['total'] / 1e6:.1f}M | "
                         f"{first.settings['model.vocab_size']} | {spread(scores[name])} | "
                         f"{last.tokens / 1e6:.2f}M | {last.seconds:.0f} | | | | |")
    moes = runs[MOE]
    reached = {}
    for name, results in rivals.items():
        goal = statistics.mean(one["bits_per_byte"] for one in results)
        shifts = [final(run) - score for run, score in zip(moes, scores[MOE], strict=True)]
        reached[name] = {"at most": seconds_to(moes, goal, [0.0] * len(moes)),
                         "about": seconds_to(moes, goal, shifts)}
        lines.append(rival_row(name, results, list(reached[name].values())))
    return lines, reached


def rival_row(name: str, results: list[dict[str, Any]], times: list[float | None]) -> str:
    first, seconds = results[0], statistics.mean(one["seconds"] for one in results)
    cells = [", ".join(filter(None, (name, first["asked"].get("settings")))), str(len(results)),
             f"{first['parameters'] / 1e6:.1f}M", str(first["vocab_size"]),
             spread([one["bits_per_byte"] for one in results]), f"{first['tokens'] / 1e6:.2f}M",
             f"{seconds:.0f}",
             *("never" if one is None else f"{one:.0f}" for one in times),
             *("" if one is None else f"{seconds / one:.2f}" for one in times)]
    return f"| {' | '.join(cells)} |"


def seconds_to(moes: list[Run], goal: float, shifts: list[float]) -> float | None:
    """Median seconds until each run's curve, moved down by its shift, falls to `goal`.

    None if most never do: a run that does not counts as endless.
    """
    found = [reach(run, goal + shift, 0)["seconds"]
             for run, shift in zip(moes, shifts, strict=True)]
    middle = statistics.median(math.inf if one is None else one for one in found)
    return middle if math.isfinite(middle) else None


def draw(arms: dict[str, Arm], runs: dict[str, list[Run]], goal: float, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), dpi=130, layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    paler, colder = iter(PALER * len(runs)), iter(COLDER * len(runs))
    colors = {name: COLORS.get(name) or next(paler if name.startswith(MOE) else colder)
              for name in runs}
    for panel, (label, axis) in zip(panels, AXES.items(), strict=True):
        for name, found in runs.items():
            flops = arms[name].flops_per_token
            for number, run in enumerate(found):
                panel.plot([axis(row, flops) for row in run.validations],
                           [row.bits_per_byte for row in run.validations], color=colors[name],
                           linewidth=1.4, label=name if number == 0 else None)
        panel.axhline(goal, color="#999999", linewidth=0.8, linestyle=":")
        panel.set_xlabel(label)
        panel.set_ylim(top=goal * 1.35)
        panel.grid(alpha=0.2)
    panels[0].set_ylabel("bits per byte, held out")
    panels[0].legend(frameon=False)
    figure.savefig(path)
