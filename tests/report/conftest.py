"""A run folder as training leaves it, made up from a seed."""
from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest


def make_run(folder: Path, steps: int = 40, experts: int = 8, layers: int = 4, seed: int = 0,
             **about: Any) -> Path:
    """Write a run of `steps` steps, a validation every tenth of it; experts=1 is dense."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    config = {"config": {"model": {"architecture": "fira2", "num_experts": experts},
                         "optim": {"lr": 0.002}, "train": {"steps": steps}},
              "preset": None, "argv": ["fira", "train", "tiny"], "versions": {"torch": "2.13.0"},
              "commit": "abc1234",
              "parameters": {"total": 12_345_678, "active": 4_000_000}, **about}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    rows: list[dict[str, Any]] = [{"kind": "event", "step": 0, "text": "training starts"}]
    every = max(1, steps // 10)
    for step in range(1, steps + 1):
        loss = 2.6 + 6.2 * math.exp(-8 * step / max(steps, 20)) + rng.normal(0, 0.06)
        tokens, seconds = step * 16384, step * 0.9 + rng.normal(0, 0.01)
        rows.append({"kind": "step", "step": step, "loss": loss, "grad_norm": 1.0,
                     "lr": 0.001 * min(1, 20 * step / steps) * (1 + math.cos(3.1 * step / steps)),
                     "tokens": tokens, "tokens_per_second": 18000 + rng.normal(0, 400),
                     "seconds": seconds, "skipped": 0, "dead": 0,
                     "imbalance": None if experts == 1 else 0.2 + math.exp(-step / 9)})
        if step % every == 0:
            rows.append({"kind": "validation", "step": step, "loss": loss + 0.05, "tokens": tokens,
                         "bits_per_byte": (loss + 0.05) / 3.1, "seconds": seconds})
            if experts > 1:
                rows.append(routing_row(step, layers, experts, rng))
    rows.append({"kind": "sample", "step": steps, "prompt": "The state", "text": " of the Union"})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    return folder


def routing_row(step: int, layers: int, experts: int, rng: np.random.Generator) -> dict[str, Any]:
    load = rng.dirichlet(np.full(experts, 12.0), size=layers)
    return {"kind": "routing", "step": step, "load": load.tolist(),
            "cv": (load.std(1) / load.mean(1)).tolist(),
            "max_mean": (load.max(1) / load.mean(1)).tolist(),
            "entropy": [0.9] * layers, "dead": [0] * layers}


@pytest.fixture
def run_folder(tmp_path: Path) -> Callable[..., Path]:
    """A function making run folders under a temporary folder: run_folder(name, **options)."""
    return lambda name="tiny", **options: make_run(tmp_path / name, **options)
