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
    """Processor, cores and GPU, in words."""
    name = platform.processor() or platform.machine()
    path = Path("/proc/cpuinfo")
    if path.exists():
        name = next((line.partition(":")[2].strip() for line in path.read_text().splitlines()
                     if line.startswith("model name")), name)
    return f"{name}, {runtime.workers()} cores{_graphics()}"


def _graphics() -> str:
    """The name of a GPU, where the benchmark uses one."""
    torch = sys.modules.get("torch")
    return f", {torch.cuda.get_device_name()}" if torch and torch.cuda.is_available() else ""


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


def reset_peak(device: Any) -> None:
    """Forget the highest use of memory so far."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark of this process


def peak_memory(device: Any) -> int:
    """Bytes at the highest use since `reset_peak`: allocated on CUDA, resident on a CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
