"""A run folder as training leaves it, made up from a seed."""
from __future__ import annotations

import json
import math

import numpy as np
import pytest


@pytest.fixture
def run_folder(tmp_path):
    """A function that writes a run folder of `steps` steps with ten validations; experts=1 is a
    dense model."""
    def write(name="tiny", steps=40, experts=8, layers=4, **about):
        rng, folder = np.random.default_rng(0), tmp_path / name
        folder.mkdir()
        config = {"config": {"model": {"architecture": "fira2", "num_experts": experts}},
                  "preset": None, "versions": {"torch": "2.13.0"}, "commit": "abc1234",
                  "parameters": {"total": 12_345_678, "active": 4_000_000}, **about}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        rows = [{"kind": "event", "step": 0, "text": "training starts"}]
        for step in range(1, steps + 1):
            loss = 2.6 + 6.2 * math.exp(-8 * step / max(steps, 20)) + rng.normal(0, 0.06)
            progress = {"step": step, "tokens": step * 16384, "seconds": step * 0.9}
            rows.append({"kind": "step", "loss": loss, "lr": 0.001, "grad_norm": 1.0, **progress,
                         "tokens_per_second": 18000 + rng.normal(0, 400), "skipped": 0, "dead": 0,
                         "imbalance": None if experts == 1 else 0.2 + math.exp(-step / 9)})
            if step % max(1, steps // 10) == 0:
                rows.append({"kind": "validation", "loss": loss + 0.05, **progress,
                             "bits_per_byte": (loss + 0.05) / 3.1})
                if experts > 1:
                    rows.append(routing_row(step, rng.dirichlet(np.full(experts, 12.0), layers)))
        rows.append({"kind": "sample", "step": steps, "prompt": "The state", "text": " of it"})
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
        return folder
    return write


def routing_row(step, load):
    return {"kind": "routing", "step": step, "load": load.tolist(),
            "cv": (load.std(1) / load.mean(1)).tolist(),
            "max_mean": (load.max(1) / load.mean(1)).tolist(),
            "entropy": [0.9] * len(load), "dead": [0] * len(load)}
