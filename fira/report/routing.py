"""How evenly a router uses its experts: a table for the terminal, routing.png for the page.

The whole project uses these words: load (an expert's share of a layer's tokens), imbalance or CV
(standard deviation of the loads over their mean, 0 is even), max/mean (the largest load over an
even share), entropy (of the router's probabilities, 1 is uniform), dead (an expert without tokens).
"""
from __future__ import annotations

from matplotlib import rc_context
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import RenderableType
from rich.table import Table

from fira.report.plot import GRID, STYLE, TRAINING, VALIDATION
from fira.report.read import Run
from fira.runlog import Row

PICTURE = "routing.png"
DENSE = "This model is dense (one expert per layer): there is no routing to show."
NONE_YET = "No routing was recorded yet: the first row comes with the first validation."
BARS, MOST_BARS = "▁▂▃▄▅▆▇█", 32  # chosen to fit 80 columns
CAPTION = ("Load: a bar per expert, the least used one first{sampled}. Half height is an even "
           "share ({even:.3g}% of the tokens), full height twice that or more, × a dead expert.")


def routing_view(run: Run) -> RenderableType:
    """The newest routing as a table, or one line that says why there is none."""
    if run.routings:
        return routing_table(run.routings[-1])
    model = (run.about.get("config") or {}).get("model") or {}
    return DENSE if model.get("num_experts") == 1 else NONE_YET


def routing_table(routing: Row) -> Table:
    """Expert load, CV, max/mean, entropy and dead experts of each layer, within 80 columns."""
    experts = len(routing["load"][0])
    sampled = f" ({MOST_BARS} of {experts} shown)" if experts > MOST_BARS else ""
    table = Table(title=f"Routing at step {routing['step']:,}: {len(routing['load'])} layers of "
                        f"{experts} experts", title_style="bold", title_justify="left",
                  caption=CAPTION.format(sampled=sampled, even=100 / experts),
                  caption_style="dim", caption_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in ("layer", "load", "CV", "max/mean", "entropy", "dead"):
        table.add_column(name, justify="left" if name == "load" else "right", no_wrap=True)
    for layer, load in enumerate(routing["load"]):
        figures = (f"{routing[name][layer]:.2f}" for name in ("cv", "max_mean", "entropy"))
        table.add_row(str(layer), _bars(load), *figures, str(routing["dead"][layer]))
    return table


def draw_routing(run: Run) -> Figure:
    """The newest load of each layer and expert as a multiple of an even share."""
    load, step = run.routings[-1]["load"], run.routings[-1]["step"]
    layers, experts = len(load), len(load[0])
    ratios = [[share * experts for share in layer] for layer in load]
    top = max(2.0, max(map(max, ratios)))
    with rc_context(STYLE):
        figure = Figure(figsize=(11, min(9.0, 2.2 + 0.32 * layers)), layout="constrained")
        axes = figure.subplots()
        colors = LinearSegmentedColormap.from_list("load", [TRAINING, "white", VALIDATION])
        image = axes.imshow(ratios, colors, TwoSlopeNorm(1.0, vmin=0.0, vmax=top), aspect="auto",
                            interpolation="nearest")
        axes.grid(False)
        axes.set(xlabel="expert", ylabel="layer", title=f"expert load at step {step:,}")
        axes.xaxis.set_major_locator(MaxNLocator(16, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(12, integer=True))
        bar = figure.colorbar(image, ax=axes, pad=0.015, aspect=40, format="%.3g",
                              ticks=[0, 0.5, 1, (1 + top) / 2, top])
        bar.set_label(f"multiple of an even share ({100 / experts:.3g}%)")
        bar.outline.set_edgecolor(GRID)
    if experts <= 16 and layers <= 24:
        for row, layer in enumerate(load):
            for column, share in enumerate(layer):
                axes.text(column, row, f"{100 * share:.0f}%" if share else "dead", ha="center",
                          va="center", fontsize=8)
    return figure


def _bars(load: list[float]) -> str:
    """A bar for each expert, or for experts at equal distances in the order of their loads."""
    experts, ordered = len(load), sorted(load)
    count = min(experts, MOST_BARS)
    chosen = [ordered[i * (experts - 1) // (count - 1)] for i in range(count)]
    levels = [min(len(BARS) - 1, int(share * experts * len(BARS) / 2)) for share in chosen]
    return "".join(BARS[level] if share else "×"
                   for level, share in zip(levels, chosen, strict=True))
