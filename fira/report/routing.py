"""How evenly the router uses its experts: a table for the terminal, a heat map for the page.

The words are the project's own everywhere: load (an expert's share of a layer's tokens), CV
(standard deviation of the loads over their mean, 0 is even), max/mean (the busiest expert against
an even share), entropy (of the router's probabilities, 1 is undecided), dead (without a token).
"""
from __future__ import annotations

import math
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from fira.report.plot import DARK, LIGHT, save, short, style
from fira.report.read import Routing, Run, read_run

PICTURE = "routing.png"
DENSE = "This model is dense (one expert per layer): there is no routing to show."
NONE_YET = "No routing was recorded yet: the first row comes with the first validation."
BARS = "▁▂▃▄▅▆▇█"
NUMBERS_UP_TO, BARS_UP_TO, BARS_PER_LINE = 8, 64, 32  # experts; chosen to fit 80 columns
# Cool to warm over a share of 0, even, twice even and more; readable on dark and light terminals.
HEAT = ("#3b6fb6", "#7ea6d8", "#9aa3ad", "#e8a15c", "#d9541e")


def routing_view(run: Run) -> RenderableType:
    """The newest routing as a table, or one line saying why there is none."""
    if run.routings:
        return routing_table(run.routings[-1])
    return Text(DENSE if is_dense(run) else NONE_YET)


def is_dense(run: Run) -> bool:
    """Whether the run says that it has one expert per layer, or has steps without any imbalance."""
    model = (run.about.get("config") or {}).get("model") or {}
    if "num_experts" in model:
        return bool(model["num_experts"] == 1)
    return not run.routings and all(step.imbalance is None for step in run.steps)


def routing_table(routing: Routing) -> Table:
    """Load per layer and expert with CV, max/mean, entropy and dead experts, within 80 columns.

    Up to 8 experts stand as percentages, up to 64 as bars (half height is an even share, full
    height twice that or more), beyond as the spread of their loads.
    """
    experts = len(routing.load[0]) if routing.load else 0
    table = Table(title=f"Routing at step {routing.step:,}: {len(routing.load)} layers of "
                        f"{experts} experts", caption=_caption(experts),
                  title_style="bold", caption_style="dim", box=None, padding=(0, 1, 0, 0))
    table.add_column("layer", justify="right")
    for name in _load_columns(experts):
        table.add_column(name, justify="left" if experts > NUMBERS_UP_TO else "right", no_wrap=True)
    for name in ("CV", "max/mean", "entropy", "dead"):
        table.add_column(name, justify="right", no_wrap=True)
    for layer, load in enumerate(routing.load):
        dead = routing.dead[layer]
        table.add_row(str(layer), *_load_cells(load), f"{routing.cv[layer]:.2f}",
                      f"{routing.max_mean[layer]:.2f}", f"{routing.entropy[layer]:.2f}",
                      Text(str(dead), style="bold red" if dead else ""))
    return table


def save_routing(folder: str | Path) -> Path | None:
    """Draw routing.png anew; None, and no picture, for a run that recorded no routing."""
    run = read_run(folder)
    return save(routing_figure(run), run.path / PICTURE) if run.routings else None


def routing_figure(run: Run, dark: bool = False) -> Figure:
    """The newest load per layer and expert, and how each layer's imbalance went over time."""
    colors, last = DARK if dark else LIGHT, run.routings[-1]
    layers, experts = len(last.load), len(last.load[0])
    with rc_context(style(colors)):
        figure = Figure(figsize=(11, min(9.0, 2.2 + 0.32 * layers)), dpi=150,
                        layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08, wspace=0.04))
        wide, narrow = figure.subplots(1, 2, width_ratios=[2, 1]) if len(run.routings) > 1 else \
            (figure.subplots(), None)
        _heat_map(figure, wide, last.load, colors)
        wide.set_title(f"load at step {last.step:,} (color 1: an even share, {100 / experts:.3g}%)")
        if narrow is not None:
            _history(narrow, run.routings, colors)
    return figure


def heat(ratio: float) -> str:
    """The color of a load, given as a multiple of the even share."""
    if not math.isfinite(ratio):
        return HEAT[2]
    return HEAT[min(len(HEAT) - 1, sum(ratio >= edge for edge in (0.5, 0.8, 1.25, 1.6)))]


def _caption(experts: int) -> str:
    if experts <= NUMBERS_UP_TO:
        return f"load in % of a layer's tokens; an even share is {100 / max(experts, 1):.4g}%"
    if experts <= BARS_UP_TO:
        return (f"one bar per expert: half height is an even share ({100 / experts:.3g}%), "
                "full is twice that or more, × is dead")
    return f"load in % of a layer's tokens; an even share is {100 / experts:.3g}%"


def _load_columns(experts: int) -> list[str]:
    if experts <= NUMBERS_UP_TO:
        return [f"e{expert}" for expert in range(experts)]
    return ["load"] if experts <= BARS_UP_TO else ["min", "10%", "median", "90%", "max"]


def _load_cells(load: list[float]) -> list[Text]:
    even = 1 / len(load)
    if len(load) <= NUMBERS_UP_TO:
        return [Text(f"{100 * share:.1f}", style=heat(share / even)) for share in load]
    if len(load) > BARS_UP_TO:
        ordered = sorted(load)
        spread = [ordered[round(part * (len(load) - 1))] for part in (0, 0.1, 0.5, 0.9, 1)]
        return [Text(f"{100 * share:.2f}", style=heat(share / even)) for share in spread]
    bars = Text()
    for expert, share in enumerate(load):
        if expert and expert % BARS_PER_LINE == 0:
            bars.append("\n")
        level = min(len(BARS) - 1, int(share / even * len(BARS) / 2))
        bars.append(*((BARS[level], heat(share / even)) if share else ("×", "bold red")))
    return [bars]


def _heat_map(figure: Figure, axes: Axes, load: list[list[float]], colors: dict[str, str]) -> None:
    layers, experts = len(load), len(load[0])
    ratios = [[share * experts for share in layer] for layer in load]
    top = max(2.0, max(map(max, ratios)))
    scale = LinearSegmentedColormap.from_list("load", [HEAT[0], colors["paper"], HEAT[4]])
    norm = TwoSlopeNorm(1.0, vmin=0.0, vmax=top)
    image = axes.imshow(ratios, cmap=scale, norm=norm, aspect="auto", interpolation="nearest")
    axes.grid(False)
    axes.set(xlabel="expert", ylabel="layer")
    axes.xaxis.set_major_locator(MaxNLocator(16, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(12, integer=True))
    bar = figure.colorbar(image, ax=axes, pad=0.015, aspect=40,
                          ticks=[0, 0.5, 1, (1 + top) / 2, top],
                          format=lambda value, _: short(value))
    bar.outline.set_visible(False)
    if experts <= 16 and layers <= 24:
        for row, layer in enumerate(load):
            for column, share in enumerate(layer):
                axes.text(column, row, f"{100 * share:.0f}%" if share else "dead", ha="center",
                          va="center", fontsize=8, color=colors["ink"])


def _history(axes: Axes, routings: list[Routing], colors: dict[str, str]) -> None:
    layers = len(routings[-1].cv)
    shades = LinearSegmentedColormap.from_list("depth", [colors["train"], colors["validation"]])
    for layer in range(layers):
        axes.plot([row.step for row in routings], [row.cv[layer] for row in routings],
                  linewidth=1.3, color=shades(layer / max(1, layers - 1)), label=f"layer {layer}")
    axes.set_title("imbalance (CV of load)")
    axes.set_xlabel("step")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    lines = axes.get_lines()
    ends = lines if layers <= 2 else [lines[0], lines[-1]]
    axes.legend(handles=ends, frameon=False, fontsize=9, loc="best", labelcolor=colors["ink"])
