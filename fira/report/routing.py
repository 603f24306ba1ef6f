"""How evenly a router uses its experts: a table for the terminal, routing.png for the page.

The whole project uses these words: load (an expert's share of a layer's tokens), imbalance or CV
(standard deviation of the loads over their mean, 0 is even), max/mean (the largest load over an
even share), entropy (of the router's probabilities, 1 is uniform), dead (an expert without tokens).
"""
from __future__ import annotations

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from fira.report.plot import GRID, STYLE, TRAINING, VALIDATION
from fira.report.read import Run, numbers
from fira.runlog import Row

PICTURE = "routing.png"
DENSE = "This model is dense (one expert per layer): there is no routing to show."
NONE_YET = "No routing was recorded yet: the first row comes with the first validation."
BARS = "▁▂▃▄▅▆▇█"
NUMBERS_UP_TO, BARS_UP_TO, BARS_PER_LINE = 8, 64, 32  # experts; chosen to fit 80 columns
# Blue to orange for loads below and above an even share; readable on dark and light terminals.
COLORS, EDGES = ("#3b6fb6", "#7ea6d8", "#9aa3ad", "#e8a15c", "#d9541e"), (0.5, 0.8, 1.25, 1.6)


def routing_view(run: Run) -> RenderableType:
    """The newest routing as a table, or one line that says why there is none."""
    if run.routings:
        return routing_table(run.routings[-1])
    experts = run.settings.get("model.num_experts")
    recorded = np.isfinite(numbers(run.steps, "imbalance")).any()
    return Text(DENSE if experts == 1 or (experts is None and not recorded) else NONE_YET)


def routing_table(routing: Row) -> Table:
    """Expert load, CV, max/mean, entropy and dead experts of each layer, within 80 columns."""
    experts = len(routing["load"][0])
    numeric, even = experts <= NUMBERS_UP_TO, f"{100 / experts:.3g}%"
    caption = f"load in % of a layer's tokens; an even share is {even}" if numeric else (
        f"{'quantiles of load' if experts > BARS_UP_TO else 'one bar per expert'}: half height is "
        f"an even share ({even}), full height twice that or more, × is dead")
    table = Table(title=f"Routing at step {routing['step']:,}: {len(routing['load'])} layers of "
                        f"{experts} experts", caption=caption,
                  title_style="bold", caption_style="dim", box=None, padding=(0, 1, 0, 0))
    columns = [f"e{expert}" for expert in range(experts)] if numeric else ["load"]
    for name in ("layer", *columns, "CV", "max/mean", "entropy", "dead"):
        table.add_column(name, justify="left" if name == "load" else "right", no_wrap=True)
    for layer, load in enumerate(routing["load"]):
        cells = [Text(f"{100 * share:.1f}", style=_color(share * experts)) for share in load] \
            if numeric else [_bars(load)]
        table.add_row(str(layer), *cells, *(f"{routing[name][layer]:.2f}" for name in
                                            ("cv", "max_mean", "entropy")),
                      Text(str(dead := routing["dead"][layer]), style="bold red" if dead else ""))
    return table


def draw_routing(run: Run) -> Figure:
    """The newest load of each layer and expert, and the imbalance of each layer over time."""
    last = run.routings[-1]
    height = min(9.0, 2.2 + 0.32 * len(last["load"]))
    with rc_context(STYLE):
        figure = Figure(figsize=(11, height), layout=ConstrainedLayoutEngine(wspace=0.04))
        if len(run.routings) == 1:
            _draw_loads(figure, figure.subplots(), last)
        else:
            wide, narrow = figure.subplots(1, 2, width_ratios=[2, 1])
            _draw_loads(figure, wide, last)
            _draw_history(narrow, run.routings)
    return figure


def _bars(load: list[float]) -> Text:
    experts, bars = len(load), Text()
    if experts > BARS_UP_TO:
        load = sorted(load)
        load = [load[experts * (2 * i + 1) // (2 * BARS_PER_LINE)] for i in range(BARS_PER_LINE)]
    for expert, share in enumerate(load):
        if expert and expert % BARS_PER_LINE == 0:
            bars.append("\n")
        level = min(len(BARS) - 1, int(share * experts * len(BARS) / 2))
        bars.append(*((BARS[level], _color(share * experts)) if share else ("×", "bold red")))
    return bars


def _color(ratio: float) -> str:
    """The color of a load, given as a multiple of the even share."""
    return COLORS[sum(ratio >= edge for edge in EDGES)]


def _draw_loads(figure: Figure, axes: Axes, routing: Row) -> None:
    load = routing["load"]
    layers, experts = len(load), len(load[0])
    ratios = [[share * experts for share in layer] for layer in load]
    top = max(2.0, max(map(max, ratios)))
    scale = LinearSegmentedColormap.from_list("load", [COLORS[0], "white", COLORS[-1]])
    image = axes.imshow(ratios, cmap=scale, norm=TwoSlopeNorm(1.0, vmin=0.0, vmax=top),
                        aspect="auto", interpolation="nearest")
    axes.grid(False)
    axes.set(xlabel="expert", ylabel="layer", title=f"expert load at step {routing['step']:,}")
    axes.xaxis.set_major_locator(MaxNLocator(16, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(12, integer=True))
    bar = figure.colorbar(image, ax=axes, pad=0.015, aspect=40, format="%.3g",
                          ticks=[0, 0.5, 1, (1 + top) / 2, top])
    bar.set_label(f"load / even share ({100 / experts:.3g}%)")
    bar.outline.set_edgecolor(GRID)
    if experts <= 16 and layers <= 24:
        for row, layer in enumerate(load):
            for column, share in enumerate(layer):
                axes.text(column, row, f"{100 * share:.0f}%" if share else "dead", ha="center",
                          va="center", fontsize=8)


def _draw_history(axes: Axes, routings: list[Row]) -> None:
    layers = len(routings[-1]["cv"])
    shades = LinearSegmentedColormap.from_list("depth", [TRAINING, VALIDATION])
    for layer in range(layers):
        axes.plot([row["step"] for row in routings], [row["cv"][layer] for row in routings],
                  linewidth=1.3, color=shades(layer / max(1, layers - 1)), label=f"layer {layer}")
    axes.set(title="imbalance (CV of load; 0 is even)", xlabel="step")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    lines = axes.get_lines()
    axes.legend(handles=[lines[0], lines[-1]][:layers], loc="best")
