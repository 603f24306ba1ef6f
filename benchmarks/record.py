"""How every benchmark writes its result: one JSON line with machine, commit, versions and date."""
from __future__ import annotations

import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

from fira import runtime


def machine() -> str:
    """Processor and cores, in words."""
    name = platform.processor() or platform.machine()
    path = Path("/proc/cpuinfo")
    if path.exists():
        name = next((line.partition(":")[2].strip() for line in path.read_text().splitlines()
                     if line.startswith("model name")), name)
    return f"{name}, {runtime.workers()} cores"


def _short(word: str) -> str:
    """A word of the command without the folders that only this machine has."""
    return Path(word).name if Path(word).is_absolute() else word


def append(path: Path, result: dict[str, Any]) -> None:
    """Add `result` to the records in `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"date": time.strftime("%Y-%m-%d"), "commit": runtime.commit(), "machine": machine(),
              "command": ["python", *map(_short, sys.argv)], "versions": runtime.versions(),
              **result}
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
