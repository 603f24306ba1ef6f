"""The two architectures, on one device: how to build and load them.

Shape legend of the whole project (activations carry their shape as a suffix, `weights_NK`):
B batch, T time, N=B*T tokens, D width, H heads, G key-value heads, C head width, V vocabulary,
E experts, K chosen experts, F expert hidden width, R=N*K routed rows, L layers.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fira.model import initialize
from fira.model.files import read_model
from fira.model.fira import FIRA
from fira.model.fira2 import FIRA2

CLASSES: dict[str, type[FIRA] | type[FIRA2]] = {"fira": FIRA, "fira2": FIRA2}


def build(spec: Any, seed: int | None = None, device: str | torch.device = "cpu") -> Any:
    """A new model of `spec`; equal seeds give equal weights. Without one, torch's global state."""
    model = build_meta(spec).to_empty(device=device)
    initialize.initialize(model, seed)
    return model


def build_meta(spec: Any) -> Any:
    """The model's shapes without memory."""
    with torch.device("meta"):
        return CLASSES[spec.architecture](**spec.model_dump())


def load_pretrained(folder: str | Path) -> Any:
    """The model in a step folder, or in the newest step of a run folder; see `read_model`."""
    return read_model(folder, CLASSES)
