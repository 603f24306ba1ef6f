"""Lines of Python per room against the budget in docs/design.md: python tests/lines.py"""
from __future__ import annotations

import re
import sys
from pathlib import Path


def count(root: Path) -> dict[str, int]:
    """Lines per room of fira/, of the library, the tests and the benchmarks."""
    rooms: dict[str, int] = {}
    for path in sorted((root / "fira").rglob("*.py")):
        parts = path.relative_to(root / "fira").parts
        room = parts[0] if len(parts) > 1 else "single files"
        if room != "presets":
            rooms[room] = rooms.get(room, 0) + _lines(path)
    rooms["library"] = sum(rooms.values())
    for folder in ("tests", "benchmarks"):
        rooms[folder] = sum(map(_lines, (root / folder).rglob("*.py")))
    return rooms


def budget(root: Path) -> dict[str, int]:
    """The table of docs/design.md whose rows are `| room | lines |`."""
    page = (root / "docs" / "design.md").read_text(encoding="utf-8")
    table = page.partition("| room | at most, in lines |")[2].partition("\n\n")[0]
    return {name.strip(" `"): int(number.replace(",", ""))
            for name, number in re.findall(r"^\| ([^|]+) \| ([\d,]+) \|$", table, re.MULTILINE)}


def _lines(path: Path) -> int:
    return path.read_text(encoding="utf-8").count("\n")


def main() -> None:
    root = Path(__file__).resolve().parents[1]
    counted, limits = count(root), budget(root)
    for room, used in counted.items():
        print(f"{room:16} {used:7,} of {limits[room]:,}{'   TOO MANY' * (used > limits[room])}")
    sys.exit(any(used > limits[room] for room, used in counted.items()))


if __name__ == "__main__":
    main()
