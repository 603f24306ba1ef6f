"""training_progress.png: how a run went, on one page.

Figures are plain `Figure` objects (no pyplot, so no global state and no display), and a picture
appears by one rename, so that a viewer never meets half a file.
"""
from __future__ import annotations

import math
import os
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fira.report.read import Run, Step, Validation, read_run

PICTURE = "training_progress.png"
# Hues that stay apart for color-blind readers (Okabe & Ito 2008), lighter ones on dark paper.
LIGHT = {"paper": "#ffffff", "ink": "#1c2024", "quiet": "#6b7280", "grid": "#e5e7eb",
         "train": "#0072b2", "validation": "#d55e00", "other": "#44546a"}
DARK = {"paper": "#15181c", "ink": "#e6e8eb", "quiet": "#9aa3ad", "grid": "#2b3038",
        "train": "#56b4e9", "validation": "#f0a04b", "other": "#aab7c8"}
FEW = 12  # up to here points are shown one by one and nothing is smoothed


def save_progress(folder: str | Path) -> Path:
    """Draw `folder`'s training_progress.png anew; returns its path."""
    run = read_run(folder)
    return save(progress_figure(run), run.path / PICTURE)


def progress_figure(run: Run, dark: bool = False) -> Figure:
    """Loss and bits per byte on top; learning rate, speed and (with experts) imbalance below."""
    colors = DARK if dark else LIGHT
    routed = [row for row in run.steps if row.imbalance is not None]
    with rc_context(style(colors)):
        spaces = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08, wspace=0.03, hspace=0.04,
                                         rect=(0, 0, 1, 0.88))
        figure = Figure(figsize=(11, 6.4), dpi=150, layout=spaces)
        figure.text(0.012, 0.975, run.name, va="top", fontsize=15, fontweight="bold",
                    parse_math=False)
        figure.text(0.012, 0.918, facts(run), va="top", fontsize=9.5, color=colors["quiet"],
                    parse_math=False)
        below = 3 if routed else 2
        grid = figure.add_gridspec(2, 6, height_ratios=[1.6, 1])
        _loss(figure.add_subplot(grid[0, :3]), run, colors)
        _bits(figure.add_subplot(grid[0, 3:]), run, colors)
        width = 6 // below
        panels = [figure.add_subplot(grid[1, width * i:width * (i + 1)]) for i in range(below)]
        _small(panels[0], "learning rate", run.steps, [row.lr for row in run.steps], colors)
        _small(panels[1], "tokens per second", run.steps,
               [row.tokens_per_second for row in run.steps], colors, smoothed=True)
        if routed:
            _small(panels[2], "expert imbalance (CV of load; 0 is even)", routed,
                   [row.imbalance for row in routed], colors, smoothed=True)
    return figure


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        FigureCanvasAgg(figure)
        figure.savefig(partial, format="png", facecolor=figure.get_facecolor())
        os.replace(partial, path)
    except OSError as error:
        raise ValueError(f"cannot write {path} ({error.strerror or error}); make the folder "
                         "writable and free some space") from None
    finally:
        partial.unlink(missing_ok=True)
    return path


def style(colors: dict[str, str]) -> dict[Any, Any]:
    """matplotlib settings shared by every picture of a report."""
    return {"figure.facecolor": colors["paper"], "axes.facecolor": colors["paper"],
            "text.color": colors["ink"], "axes.labelcolor": colors["quiet"],
            "axes.titlecolor": colors["ink"], "axes.edgecolor": colors["grid"],
            "xtick.color": colors["quiet"], "ytick.color": colors["quiet"],
            "xtick.labelsize": 9, "ytick.labelsize": 9, "axes.labelsize": 9.5,
            "axes.titlesize": 10.5, "axes.titlelocation": "left",
            "axes.titlepad": 9, "axes.spines.top": False, "axes.spines.right": False,
            "xtick.major.size": 0, "ytick.major.size": 0, "axes.grid": True,
            "grid.color": colors["grid"], "grid.linewidth": 0.8, "axes.axisbelow": True,
            "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"]}


def smooth(values: Sequence[float]) -> list[float]:
    """Mean over a centered window of about a fortieth of the run, narrower at both ends.

    Centered, so that the line does not lag behind a falling loss. Values that are not finite are
    passed over.
    """
    finite = [math.isfinite(value) for value in values]
    sums = [0.0, *accumulate(value if math.isfinite(value) else 0.0 for value in values)]
    counts = [0, *accumulate(finite)]
    result = []
    for i in range(len(values)):
        half = min(len(values) // 80, i)
        end = min(i + half + 1, len(values))
        count, total = counts[end] - counts[i - half], sums[end] - sums[i - half]
        result.append(total / count if count else math.nan)
    return result


def facts(run: Run) -> str:
    """One line: preset, parameters, how far the run went, its best validation."""
    counts, steps = run.parameters, run.steps
    parts = [f"preset {Path(run.about['preset']).name}"] if run.about.get("preset") else []
    if counts.get("total"):
        parts.append(f"{short(counts['total'])} parameters")
    if counts.get("active", counts.get("total")) != counts.get("total"):
        parts.append(f"{short(counts['active'])} active")
    if steps:
        parts.append(f"{steps[-1].step:,} step{'s' * (steps[-1].step != 1)}")
        parts += [f"{short(steps[-1].tokens)} tokens", duration(steps[-1].seconds)]
    if run.best:
        parts.append(f"best validation {run.best.bits_per_byte:.4f} bits per byte")
    return "  ·  ".join(parts) or "no steps yet"


def short(number: float) -> str:
    """A count in at most four figures: 950, 12.3k, 4.1M, 2B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """A length of time in its two largest units: 45 s, 4 min 50 s, 3 h 20 min, 2 d 4 h."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")]
    first = next((i for i, (count, _) in enumerate(parts) if count), len(parts) - 1)
    return " ".join(f"{count} {unit}" for count, unit in parts[first:first + 2] if count) or "0 s"


def _loss(axes: Axes, run: Run, colors: dict[str, str]) -> None:
    """Loss in nats per token against tokens seen."""
    axes.set_title("loss (nats per token)")
    tokens = [row.tokens for row in run.steps]
    losses = [row.loss for row in run.steps]
    marker = _marker(run.steps)
    if len(losses) > FEW:
        axes.plot(tokens, losses, color=colors["train"], alpha=0.25, linewidth=0.8)
    axes.plot(tokens, smooth(losses), color=colors["train"], linewidth=1.8, label="training",
              **marker)
    axes.plot([row.tokens for row in run.validations], [row.loss for row in run.validations],
              color=colors["validation"], linewidth=1.6, label="validation",
              **_dots(run.validations))
    _frame_loss(axes, losses, [row.loss for row in run.validations])
    _tokens_axis(axes)
    if len(run.steps) == 1:
        _around(axes, tokens[0], losses[0])
    if run.steps or run.validations:
        axes.legend(frameon=False, fontsize=9.5, loc="upper right", labelcolor=colors["ink"])
    else:
        _empty(axes, "no steps yet", colors)


def _bits(axes: Axes, run: Run, colors: dict[str, str]) -> None:
    """Validation bits per byte against wall clock: the number that compares across tokenizers."""
    axes.set_title("validation bits per byte")
    rows = run.validations
    longest = max([row.seconds for row in rows], default=0.0)
    units = ((3600, "hours", 5400), (60, "minutes", 90), (1, "seconds", -1))
    size, unit = next((size, unit) for size, unit, above in units if longest > above)
    axes.set_xlabel(f"training time ({unit})")
    axes.plot([row.seconds / size for row in rows], [row.bits_per_byte for row in rows],
              color=colors["validation"], linewidth=1.8, **_dots(rows))
    axes.margins(y=0.16)
    if len(rows) == 1:
        _around(axes, rows[0].seconds / size, rows[0].bits_per_byte)
    elif rows:
        axes.set_xlim(left=0, right=longest / size * 1.06 or 1)
    if run.best is None:
        _empty(axes, "no validation yet", colors)
        return
    best = run.best
    axes.annotate(f"{best.bits_per_byte:.3f}", (best.seconds / size, best.bits_per_byte),
                  xytext=(0, -8), textcoords="offset points", ha="center", va="top", fontsize=10,
                  fontweight="bold", color=colors["validation"])


def _small(axes: Axes, title: str, steps: Sequence[Step], values: Sequence[float | None],
           colors: dict[str, str], smoothed: bool = False) -> None:
    axes.set_title(title)
    tokens = [row.tokens for row in steps]
    numbers = [math.nan if value is None else value for value in values]
    if smoothed and len(numbers) > FEW:
        axes.plot(tokens, numbers, color=colors["other"], alpha=0.25, linewidth=0.7)
        numbers = smooth(numbers)
    axes.plot(tokens, numbers, color=colors["other"], linewidth=1.5, **_marker(steps))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    if len(steps) == 1:
        _around(axes, tokens[0], numbers[0])
    finite = [number for number in numbers if math.isfinite(number)]
    if finite:
        axes.set_ylim(bottom=0, top=max(finite) * 1.15 or 1)
    _tokens_axis(axes)
    if not finite:
        _empty(axes, "nothing yet", colors)


def _frame_loss(axes: Axes, losses: Sequence[float], validation: Sequence[float]) -> None:
    """Room for every value, unless a spike would flatten the curve: then the spike is cut off."""
    finite = [value for value in [*losses, *validation] if math.isfinite(value)]
    if len(finite) < 2 or min(finite) == max(finite):
        return
    low, high = min(finite), max(finite)
    start = max(value for value in finite[:max(3, len(finite) // 50)])
    if high > 1.5 * start:
        high = 1.5 * start
    room = 0.06 * (high - low)
    axes.set_ylim(low - room, high + room)


def _tokens_axis(axes: Axes) -> None:
    axes.set_xlabel("tokens")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def _marker(rows: Sequence[Step]) -> dict[str, Any]:
    return {"marker": "o", "markersize": 4.5} if len(rows) <= FEW else {}


def _dots(rows: Sequence[Validation]) -> dict[str, Any]:
    return {"marker": "o", "markersize": 4.5 if len(rows) <= 40 else 0}


def _around(axes: Axes, x: float, y: float) -> None:
    """A single point in the middle of readable limits, not of microscopic ones."""
    if math.isfinite(x) and math.isfinite(y):
        axes.set_xlim(0, 2 * x or 1)
        axes.set_ylim(0, 2 * y or 1)


def _empty(axes: Axes, text: str, colors: dict[str, str]) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center",
              color=colors["quiet"], fontsize=11)
