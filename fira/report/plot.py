"""training_progress.png: loss, validation score, learning rate, speed and metrics of a run.

Figures are plain `Figure` objects, without pyplot, so that there is no global state and no display.
"""
from __future__ import annotations

import math
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fira.files import new_target
from fira.report.read import Run, numbers, read_run

PICTURE = "training_progress.png"
BASE_KEYS = {"kind", "step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "seconds",
             "imbalance", "dead", "skipped", "epochs"}  # of a step row; other numbers are metrics
# Colors that color-blind readers can tell apart (Okabe & Ito 2008).
INK, QUIET, GRID = "#1c2024", "#626b77", "#e5e7eb"
TRAINING, VALIDATION, OTHER = "#0072b2", "#d55e00", "#44546a"
STYLE: dict[Any, Any] = {
    "text.color": INK, "axes.labelcolor": QUIET, "axes.edgecolor": GRID, "xtick.color": QUIET,
    "ytick.color": QUIET, "grid.color": GRID, "xtick.labelsize": 9, "ytick.labelsize": 9,
    "axes.labelsize": 9.5, "axes.titlesize": 10.5, "axes.titlelocation": "left",
    "axes.titlepad": 9, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "xtick.major.size": 0, "ytick.major.size": 0,
    "figure.titlesize": 11, "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.08, "legend.frameon": False, "legend.fontsize": 9.5}
FEW = 40  # a curve of up to this many points has markers and is not smoothed


def save_progress(folder: str | Path) -> Path:
    """Draw training_progress.png of the run in `folder`; returns its path."""
    run = read_run(folder)
    return write(run.path / PICTURE, draw_progress(run))


def write(path: Path, content: Figure | str) -> Path:
    """Replace the file `path` by a picture or a text. Raises ValueError, one line, if it cannot."""
    with new_target(path, replace=True) as partial:
        if isinstance(content, str):
            partial.write_text(content, encoding="utf-8", errors="replace")
        else:
            content.savefig(partial, format="png", dpi=150)
    return path


def summary(run: Run) -> list[tuple[str, str]]:
    """The figures that describe a run, as (label, value), the most important first."""
    facts: dict[str, Any] = {}
    if best := run.best:
        facts[f"best {words(run.score)}"] = f"{best[run.score]:.4f}"
        facts["at step"] = f"{best['step']:,}"
    if run.steps:
        last, losses = run.steps[-1], numbers(run.steps, "loss")
        losses = losses[np.isfinite(losses)]
        recent = losses[-1 - len(losses) // 50:]  # the loss of one batch is too noisy
        facts |= {"steps": f"{last['step']:,}", "tokens": short(last["tokens"]),
                  "training time": str(timedelta(seconds=round(last["seconds"]))),
                  "training loss (nats)": f"{recent.mean():.4f}" if len(recent) else "",
                  "tokens per second": short(last["tokens"] / (last["seconds"] or math.nan)),
                  "skipped steps": last.get("skipped")}
    if parameters := run.about.get("parameters"):
        facts["parameters"] = short(parameters["total"])
        facts["active per token"] = short(parameters["active"])
    if run.routings:
        cv, dead = run.routings[-1]["cv"], run.routings[-1]["dead"]
        facts["expert imbalance (CV)"] = f"{sum(cv) / len(cv):.2f}"
        facts["dead experts"] = str(sum(dead))
    facts |= {name: run.about.get(name) for name in ("preset", "commit")}
    return [(label, str(value)) for label, value in facts.items() if value]


def draw_progress(run: Run) -> Figure:
    """Loss and validation score in the first row, below a small panel for every other number."""
    panels = {"lr": "learning rate", "tokens_per_second": "tokens per second"}
    if np.isfinite(numbers(run.steps, "imbalance")).any():
        panels["imbalance"] = "expert imbalance (CV of load; 0 is even)"
    panels |= {name: words(name) for row in run.steps for name, value in row.items()
               if name.split('/')[0] not in BASE_KEYS and isinstance(value, int | float)}
    columns = min(3, len(panels))
    rows, width = math.ceil(len(panels) / columns), 6 // columns
    title = f"{run.name}\n" + "  ·  ".join(" ".join(fact) for fact in summary(run)[:5])
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 4.25 + 2.15 * rows), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", linespacing=1.6, parse_math=False)
        grid = figure.add_gridspec(1 + rows, 6, height_ratios=[1.6] + [1] * rows)
        _draw_loss(figure.add_subplot(grid[0, :3]), run)
        _draw_score(figure.add_subplot(grid[0, 3:]), run)
        for number, (key, title) in enumerate(panels.items()):
            row, left = 1 + number // columns, number % columns * width
            _draw_metric(figure.add_subplot(grid[row, left:left + width]), run, key, title)
    return figure


def smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a window of about 1/40 of the values, centered so that the line does not lag behind
    a falling loss."""
    window = np.ones(2 * (len(values) // 80) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def words(name: str) -> str:
    """A metric's name as text: bits_per_byte becomes "bits per byte"."""
    return name.replace("_", " ")


def short(number: float) -> str:
    """A number in three figures and a unit: 950, 12.3k, 4.1M, 2B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def _draw_loss(axes: Axes, run: Run) -> None:
    """Loss of training and validation against tokens."""
    axes.set_title("loss (nats)")
    finite = _draw_lines(axes, run, "loss", TRAINING)
    if len(set(finite)) > 1:  # show every value, but cut off a spike that would flatten the curve
        low, start = min(finite), max(finite[:max(3, len(finite) // 50)])
        high = min(max(finite), 1.5 * start)
        axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
    if axes.get_lines():
        axes.legend(loc="best")


def _draw_score(axes: Axes, run: Run) -> None:
    """Validation score against wall-clock time."""
    direction = "lower" if run.lower_is_better else "higher"
    axes.set_title(f"validation {words(run.score)} ({direction} is better)", parse_math=False)
    if run.best is None:
        _say(axes, "no validation yet")
        return
    seconds = numbers(run.validations, "seconds")
    size, unit = (3600, "hours") if max(seconds) > 5400 else (60, "minutes")
    axes.set_xlabel(f"training time ({unit})")
    axes.plot(seconds / size, numbers(run.validations, run.score), color=VALIDATION,
              label="target", **_markers(seconds))
    general = numbers(run.validations, f"{run.score}/general")
    if np.isfinite(general).any():
        axes.plot(seconds / size, general, color=OTHER, label="general text", **_markers(seconds))
        axes.legend(loc="best")
    axes.set_xlim(left=0)


def _draw_metric(axes: Axes, run: Run, key: str, title: str) -> None:
    """One number of the step rows against tokens."""
    axes.set_title(title, parse_math=False)
    finite = _draw_lines(axes, run, key, OTHER, smoothed=key != "lr")  # a schedule has no noise
    if len(finite):
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        if min(finite) >= 0:
            axes.set_ylim(0, max(finite) * 1.15 or 1)


def _draw_lines(axes: Axes, run: Run, key: str, color: str, smoothed: bool = True) -> np.ndarray:
    """One number of the steps against tokens, each value pale, their moving average strong, and of
    the evaluations, if they have it. Returns all its finite values."""
    values, validation = numbers(run.steps, key), numbers(run.validations, key)
    finite = np.isfinite(values)
    if not finite.any():
        _say(axes, "no steps yet")
        return values[finite]
    values, tokens = values[finite], numbers(run.steps, "tokens")[finite]
    drawn = np.concatenate([values, validation[np.isfinite(validation)]])
    if smoothed and len(values) > FEW:
        axes.plot(tokens, values, color=color, alpha=0.25, linewidth=0.8)
        values = smooth(values)
    axes.plot(tokens, values, color=color, label="training", **_markers(values))
    if len(drawn) > len(values):
        axes.plot(numbers(run.validations, "tokens"), validation, color=VALIDATION,
                  label="validation", **_markers(validation))
    axes.set_xlabel("tokens")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    return drawn


def _markers(values: np.ndarray) -> dict[str, Any]:
    return {"marker": "o", "markersize": 4.5} if len(values) <= FEW else {}


def _say(axes: Axes, text: str) -> None:
    axes.set(xticks=[], yticks=[])
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=QUIET)
