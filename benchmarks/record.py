"""What the benchmarks share: an option, timing in turns, memory, and the record of a result.

A record is one line of JSON with command, machine, commit, date, and the versions of FIRA's own
packages and of the peers that it was compared with.
"""
from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fira import runtime
from fira.runtime import machine

PEERS = ("transformers", "trl", "peft", "xllamacpp", "gguf", "openai",
         "schemathesis")  # xllamacpp is llama.cpp


def new_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser described by the first line of a program's docstring, with the option --json."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE",
                        help="append the result to this file as one line of JSON")
    return parser


def time_in_turns(sides: dict[str, Callable[[], object]], repeats: int,
                  warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of `repeats` calls of each side, after `warm_up` calls that are not counted.

    The sides take turns and every round begins with another side, so that a change of the machine's
    speed affects all sides alike.
    """
    names, seconds = list(sides), {name: [] for name in sides}
    for number in range(warm_up + repeats):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            began = time.perf_counter()
            sides[name]()
            seconds[name].append(time.perf_counter() - began)
    return {name: found[warm_up:] for name, found in seconds.items()}


def append(path: Path | None, result: dict[str, Any],
           checkouts: dict[str, Path | None] | None = None) -> None:
    """Add `result` to the records in `path`, if there is one to write to.

    `checkouts` are the folders of other programs that were measured, by name.
    """
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"date": time.strftime("%Y-%m-%d"), "commit": runtime.commit(), "machine": machine(),
              "command": ["python", *map(shorten, sys.argv)],
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


def shorten(word: str) -> str:
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
