"""The reasoning card of `fira reason`, from reason.json: as tables, and as a picture."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fira.files import read_json
from fira.report.plot import GRID, OTHER, QUIET, STYLE, TRAINING, VALIDATION
from fira.runlog import REASON

PICTURE = "reasoning.png"
GREEN = "#009e73"  # of the palette of the others
LINES = {  # model and form: label, color, style
    ("think", "think"): ("thinks", TRAINING, "-"),
    ("think", "direct"): ("answers at once", OTHER, "-"),
    ("student", "think"): ("student", VALIDATION, "-"),
    ("gold-student", "think"): ("student of the few traces", VALIDATION, ":"),
    ("rl", "think"): ("after RL", GREEN, "-"),
    ("more", "think"): ("after more tuning", GREEN, ":")}
CAPTION = ("Percent of questions of the test split, by the number of steps that they need; up to "
           "{depth} are trained on. Chance: the commonest answer. Swapped: after the thought about "
           "another question. Steps: thoughts without a wrong step. pass@k: one of k samples is "
           "right; maj@k: the commonest answer of k is. Cut: thoughts closed at their limit, or "
           "answers without an end. Tokens: of thought and answer. ±: half of a 95% interval.")


def read_card(folder: Path) -> dict[str, Any]:
    """The card in a folder or in the one above it; empty if neither has a finished one."""
    for path in (folder / REASON, folder.resolve().parent / REASON):
        if path.is_file() and (card := read_json(path, "run fira reason again")).get("goals"):
            return card
    return {}


def card_view(card: dict[str, Any]) -> RenderableType:
    """The goals, what the model that thinks does at each depth, and all models."""
    goals, models = (_table(*columns) for columns in (
        ("Goals", "", "goal", "result"), ("With thoughts", "task", *card["models"])))
    for one in card["goals"]:
        goals.add_row("met" if one["met"] else "not met", one["goal"], one["result"])
    think = card["models"]["think"]
    k, most = next(one["sampled"]["k"] for one in think["tasks"].values())
    depths = _table("The model that thinks", "task", "chance", "at once", "thinks", "±", "swapped",
                    "steps", "pass@1", f"pass@{k}", f"maj@{most}", "cut", "tokens")
    depths.caption, depths.caption_justify = CAPTION.format(depth=card["depth"]), "left"
    for name, one in think["tasks"].items():
        own, drawn = one["think"], one["sampled"]
        depths.add_row(name, *map(_percent, (
            one["floors"]["majority"], one["direct"]["accuracy"], own["accuracy"],
            np.ptp(own["interval"]) / 2, one["swapped"]["accuracy"], own["steps_right"],
            drawn["pass@1"][0], drawn["pass@k"][0], drawn["maj@k"][0], own["cut"])),
            "+".join(f"{count:.0f}" for count in own["tokens"]))
        models.add_row(name, *(_percent(model["tasks"][name]["think"]["accuracy"])
                               for model in card["models"].values()))
    models.add_row("active", *(f"{one['active']:,}" for one in card["models"].values()))
    moved = think["experts"]["moved"] if think["experts"] else []
    return Group(goals, "", depths, "", models, Text(
        "\nExperts: thoughts give this percentage of tokens to other experts than answers do, by "
        f"layer: {', '.join(map(_percent, moved)) or '-, the model is dense'}"))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_style="bold", title_justify="left", box=None,
                  padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(name, justify="left" if name in ("", "goal", "result", "task")
                         else "right", no_wrap=name == "task")
    return table


def _percent(share: float) -> str:
    return f"{100 * share:.0f}"


def draw_card(card: dict[str, Any]) -> Figure:
    """A panel for each task: what each model gets right by depth, with 95% intervals."""
    rows, models = -(-len(card["tasks"]) // 2), card["models"]
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 0.8 + 3.1 * rows), layout="constrained")
        for axes, task in zip(figure.subplots(rows, 2, squeeze=False, sharey=True).flat,
                              [*card["tasks"], ""], strict=False):
            names = [name for name in models["think"]["tasks"] if name.startswith(f"{task}:")]
            depths = np.array([int(name.partition(":")[2]) for name in names])
            if not names:
                axes.set_axis_off()
                continue
            axes.set(title=task, xlabel="depth (steps)", ylim=(-0.03, 1.03))
            for number, ((model, form), (label, color, style)) in enumerate(LINES.items()):
                found = [models[model]["tasks"][name][form] for name in names if model in models]
                if found:
                    places = depths + 0.05 * (number - 2.5)  # beside each other
                    axes.plot(places, [one["accuracy"] for one in found], style, color=color,
                              label=label, marker="o", markersize=4)
                    axes.vlines(places, *zip(*(one["interval"] for one in found), strict=True),
                                color=color, alpha=0.4, linewidth=1)
            axes.plot(depths, [models["think"]["tasks"][name]["floors"]["majority"]
                               for name in names], "--", color=QUIET, linewidth=1, label="chance")
            if depths[-1] > card["depth"]:
                axes.axvspan(card["depth"] + 0.5, depths[-1] + 0.5, color=GRID, alpha=0.5,
                             linewidth=0, label="not trained on")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper left",
                      ncols=4)
    return figure
