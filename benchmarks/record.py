"""Writes the result of a benchmark as one JSON line: command, machine, commit, versions and date.

The versions are those of FIRA's own packages and of the peers that benchmarks compare with.
"""
from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from fira import runtime

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
PEERS = ("transformers", "xllamacpp", "gguf", "openai", "schemathesis")  # xllamacpp is llama.cpp


def machine() -> str:
    """Processor, number of cores and GPU, in words."""
    name = platform.processor() or platform.machine()
    path = Path("/proc/cpuinfo")
    if path.exists():
        name = next((line.partition(":")[2].strip() for line in path.read_text().splitlines()
                     if line.startswith("model name")), name)
    torch = sys.modules.get("torch")
    gpu = f", {torch.cuda.get_device_name()}" if torch and torch.cuda.is_available() else ""
    return f"{name}, {runtime.workers()} cores{gpu}"


def append(path: Path, result: dict[str, Any], checkouts: dict[str, Path | None] | None = None,
           ) -> None:
    """Add `result` to the records in `path`. `checkouts` are other programs measured, by name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"date": time.strftime("%Y-%m-%d"), "commit": runtime.commit(), "machine": machine(),
              "command": ["python", *map(_shorten, sys.argv)],
              "versions": runtime.versions() | peer_versions(checkouts or {}), **result}
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def peer_versions(checkouts: dict[str, Path | None]) -> dict[str, str]:
    """The version of each installed peer, and the commit of each checkout."""
    versions = {}
    for name in PEERS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    for name, folder in checkouts.items():
        if folder:
            done = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"],
                                  capture_output=True, text=True)
            versions[name] = done.stdout.strip() or "unknown: not a git checkout"
    return versions


def _shorten(word: str) -> str:
    """A word of the command without folders that exist only on this machine."""
    return Path(word).name if Path(word).is_absolute() else word


def reset_peak(device: Any) -> None:
    """Start a new measurement of the peak of memory."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark of this process


def peak_memory(device: Any) -> int:
    """Bytes at the peak since `reset_peak`: allocated on CUDA, resident on a CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
