"""Results of `fira eval` on tasks, as tables; those of a run are in its files eval*.json."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from fira.files import MANIFEST, read_json

AGAIN = "copy the file again, or use another step"
CELLS: dict[str, Callable[[dict[str, Any]], str]] = {
    "n": lambda task: f"{task['n']:,}",
    "bits/byte": lambda task: _bits(task["bits_per_byte"]),
    "right": lambda task: _percent(task["accuracy"]),
    "95%": lambda task: _percent(*task["interval"]),
    "per byte": lambda task: _percent(task["accuracy_per_byte"]),
    "centred": lambda task: _percent(task["centred"]),
    "floors": lambda task: _percent(*task["floors"].values()),
    "": lambda task: "at chance" * task["at_chance"],
    "experts": lambda task: " ".join(
        f"{one['layer']}.{one['expert']} x{one['ratio']:.1f}"
        for one in (task["experts"] or {"over_used": []})["over_used"])}
ON_SCREEN = ("n", "bits/byte", "right", "95%", "per byte", "floors", "", "experts")
ON_PAGE = ("n", "bits/byte", "right", "95%", "centred", "floors", "")
MEANS = ("bits_per_byte", "accuracy", "centred")

SPECIAL_ROWS = {  # what is said of rows that are not read as they are: the list of their numbers
    "have a continuation longer than the model reads and are left out": "left_out",
    "are longer than the model reads and lose the beginning of their context": "cut",
    "have a token across the border, which counts as the continuation's": "unsplit"}


class Results(NamedTuple):
    """Suites measured with the weights of one step; `others` are files on other weights."""

    suites: list[tuple[str, str, dict[str, Any]]]  # file, name, content
    others: list[str]

    @property
    def not_shown(self) -> str:
        """Says which files are of other weights; "" if none is."""
        return (f"{', '.join(self.others)}: of other weights than the newest step's, not shown; "
                "measure again with fira eval --json" if self.others else "")


def newest_step(folder: Path) -> Path:
    """The newest complete step of a run; `folder` itself if it has none."""
    steps = [path.parent for path in folder.glob(f"step-*/{MANIFEST}")]
    return max(steps, key=lambda path: (len(path.name), path.name), default=folder)


def read_results(run: Path, step: Path) -> Results:
    """What the files eval*.json of a run say of the weights in its folder `step`.

    Raises ValueError, one line, for a file that `fira eval --json` did not write.
    """
    manifest, found = step / MANIFEST, Results([], [])
    files = read_json(manifest, AGAIN).get("files") or {} if manifest.is_file() else {}
    weights = {file.get("sha256") for file in files.values()}
    for path in sorted(run.glob("eval*.json")):
        content = read_json(path, "measure again with fira eval --json, or move it away")
        if "suites" not in content:  # of a text
            continue
        if content.get("model_sha256") not in weights:
            found.others.append(path.name)
            continue
        try:
            for name, suite in content["suites"].items():
                suite_table(name, suite)
                found.suites.append((path.name, name, suite))
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{path} has a suite that cannot be shown ({error!r}); measure again "
                             "with fira eval --json, or move it away") from error
    return found


def suite_table(name: str, suite: dict[str, Any], columns: tuple[str, ...] = ON_PAGE) -> Table:
    """The tasks of a suite and, as its title, the means; rates in percent."""
    bits, accuracy, centred = suite_means(suite)
    usual = {task["experts"].get("relative_to", "the text of training")
             for task in suite["tasks"].values() if task["experts"] and "experts" in columns}
    notes = [*(f"without {one}" for one in suite.get("missing", ())),
             *(f"experts: load relative to that on {text}" for text in sorted(usual))]
    table = Table("task", title=f"{name}: {_bits(bits)} bits per byte, accuracy "
                  f"{_percent(accuracy)}, centred {_percent(centred)}", title_justify="left",
                  caption="\n".join(notes), caption_justify="left", box=None, padding=(0, 1, 0, 0))
    for title in columns:
        table.add_column(title, justify="right")
    for label, task in suite["tasks"].items():
        table.add_row(label.partition("/")[2] or label, *(CELLS[key](task) for key in columns))
    return table


def results_view(results: Results) -> Table:
    """A row for each suite, for a terminal."""
    table = Table("suite", title="Results on tasks", title_style="bold", title_justify="left",
                  box=None, padding=(0, 2, 0, 0), caption=results.not_shown,
                  caption_justify="left")
    for title in ("tasks", "rows", "bits/byte", "right", "centred", "at chance"):
        table.add_column(title, justify="right")
    for _, name, suite in results.suites:
        tasks, (bits, accuracy, centred) = list(suite["tasks"].values()), suite_means(suite)
        table.add_row(name, str(len(tasks)), f"{sum(task['n'] for task in tasks):,}", _bits(bits),
                      _percent(accuracy), _percent(centred),
                      str(sum(task["at_chance"] for task in tasks)))
    return table


def suite_means(suite: dict[str, Any]) -> tuple[float | None, ...]:
    """Means over tasks of bits per byte, accuracy and centred accuracy; None without a value."""
    columns = ([task[key] for task in suite["tasks"].values() if task[key] is not None]
               for key in MEANS)
    return tuple(sum(values) / len(values) if values else None for values in columns)


def show(result: dict[str, Any], *more: Table) -> None:
    """Print the table of each suite with the rows that were not read whole, and more tables."""
    screen = Console(highlight=False)
    screen.width = max(screen.width, 120)
    for suite, content in result["suites"].items():
        screen.print(suite_table(suite, content, ON_SCREEN))
        for name, task in content["tasks"].items():
            for reason, key in SPECIAL_ROWS.items():
                if rows := task.get(key):
                    numbers = ", ".join(str(row + 1) for row in rows[:3])
                    screen.print(f"{name}: {len(rows):,} of {task['rows']:,} rows {reason}: "
                                 f"{numbers}{', ...' * (len(rows) > 3)}", style="yellow")
    screen.print(*more, sep="\n")


def _percent(*values: float | None) -> str:
    return " ".join("-" if value is None else f"{100 * value:.1f}" for value in values)


def _bits(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
