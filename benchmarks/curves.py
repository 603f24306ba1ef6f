"""Validation curves of runs side by side, against tokens and against seconds.

    python benchmarks/curves.py "MoE=out/moe" "dense twin=out/dense" --out docs/curves.png

Reads what training logged, of runs from anywhere, finished or not. With --json the curves join
the results, with the machine that they were measured on as it is given by --on.
"""
from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from arms import imbalance
from record import append

from fira.report.read import Run, read_run

COLORS = ("#d9541e", "#3b6fb6", "#7a8791", "#d9b44a")


def draw(runs: dict[str, Run], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=130, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    axes = {"million tokens": lambda row: row.tokens / 1e6, "seconds": lambda row: row.seconds}
    for panel, (label, axis) in zip(panels, axes.items(), strict=True):
        for color, (name, run) in zip(COLORS, runs.items(), strict=False):
            panel.plot([axis(row) for row in run.validations],
                       [row.bits_per_byte for row in run.validations], color=color, marker="o",
                       markersize=3, linewidth=1.4, label=name)
        panel.set_xlabel(label)
        panel.set_xlim(left=0)
        panel.grid(alpha=0.2)
    panels[0].set_ylabel("bits per byte, held out")
    panels[0].legend(frameon=False)
    figure.savefig(path)


def described(run: Run) -> dict[str, object]:
    """What the results keep of a run."""
    last = run.steps[-1]
    return {"settings": run.settings, "parameters": run.parameters, "steps": last.step,
            "tokens": last.tokens, "seconds": last.seconds,
            "tokens_per_second": statistics.median(step.tokens_per_second for step in run.steps),
            "imbalance_by_twentieth": imbalance(run),
            "dead": max(step.dead for step in run.steps[len(run.steps) // 10:]),
            "validations": [[row.tokens, row.seconds, row.bits_per_byte]
                            for row in run.validations]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN")
    parser.add_argument("--out", type=Path, default=Path("curves.png"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--on", default="", help="the machine that trained, if it is not this one")
    options = parser.parse_args()
    pairs = [word.partition("=") for word in options.runs]
    if not all(folder for _, _, folder in pairs) or len(pairs) > len(COLORS):
        parser.error(f"{' '.join(options.runs)}: give NAME=RUN, of at most {len(COLORS)} runs")
    runs = {name: read_run(Path(folder)) for name, _, folder in pairs}
    draw(runs, options.out)
    if options.json:
        append(options.json, {"benchmark": "curves", "trained_on": options.on,
                              "runs": {name: described(run) for name, run in runs.items()}})
    for name, run in runs.items():
        last = run.steps[-1]
        print(f"{name}: {last.tokens / 1e6:.1f}M tokens in {last.seconds:.0f} s; bits per byte "
              + ", ".join(f"{row.bits_per_byte:.3f} ({row.seconds:.0f} s)"
                          for row in run.validations))
        if uneven := imbalance(run):
            print(f"  imbalance after the first tenth {statistics.mean(uneven):.2f}, in the worst "
                  f"twentieth {max(uneven):.2f}")


if __name__ == "__main__":
    main()
