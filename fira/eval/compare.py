"""Two models on the same items: paired differences per task and suite."""
from __future__ import annotations

from typing import Any

from rich.table import Table

from fira.eval.statistics import Difference, average, difference

FORMS = {"bits_per_byte": ".4f", "accuracy": ".1%"}


def add_comparison(first: dict[str, Any], second: dict[str, Any]) -> Table:
    """Add to a result of `measure`, as `against`, its difference from a second one, and to that the
    share of items whose score flips; as a table. Raises ValueError, one line, unless the requests
    of both were the same."""
    table = Table("task", title=f"{first['run']} minus {second.get('run')}, with 95% interval",
                  title_justify="left", box=None, caption="* 0 lies outside the interval; needed: "
                  "items to see a difference of one point", caption_justify="left")
    for title in ("n", "bits/byte", "accuracy", "flips", "needed"):
        table.add_column(title, justify="right")
    first["against"] = {"run": second.get("run"), "suites": {}}
    for suite, ours in first["suites"].items():
        theirs = (second.get("suites") or {}).get(suite, {"protocol": {}, "tasks": {}})
        hashes = [str(each["protocol"].get("sha256"))[:12] for each in (ours, theirs)]
        if hashes[0] != hashes[1] or ours["tasks"].keys() != theirs["tasks"].keys():
            raise ValueError(f"suite {suite} has protocol {hashes[0]} and {len(ours['tasks'])} "
                             f"tasks here, but {hashes[1]} and {len(theirs['tasks'])} in the other "
                             "result; measure both with the same --suite, --data and --limit")
        rows = {name: _pair(found, theirs["tasks"][name]) for name, found in ours["tasks"].items()}
        parts = {key: [row[key] for row in rows.values() if row[key]] for key in FORMS}
        flips = sum(row["flips"] for row in rows.values()) / len(rows)
        rows[f"mean of {suite}"] = {key: average(part) if part else None
                                    for key, part in parts.items()} | {"flips": flips}
        for name, row in rows.items():
            one = row["accuracy"]
            table.add_row(name, f"{one.items if one else 0:,}", *(
                _cell(row[key], FORMS[key]) for key in FORMS), f"{row['flips']:.1%}",
                f"{one.needed if one else 0:,}")
        first["against"]["suites"][suite] = {name: {
            key: value._asdict() if isinstance(value, Difference) else value
            for key, value in row.items()} for name, row in rows.items()}
    return table


def _pair(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    groups, differs = ours["groups"], [one != other for one, other in zip(
        ours["correct"], theirs["correct"], strict=True) if None not in (one, other)]
    return {"accuracy": difference(ours["correct"], theirs["correct"], groups),
            "bits_per_byte": difference(ours["item_bits"], theirs["item_bits"], groups, False),
            "flips": sum(differs) / max(len(differs), 1)}


def _cell(one: Difference | None, form: str) -> str:
    if one is None:
        return "-"
    outside = "*" if one.low > 0 or one.high < 0 else ""
    return f"{one.mean:+{form}}{outside} ±{one.half:{form}}"
