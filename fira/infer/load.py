"""A step folder opened for use: the model and the tokenizer it was trained with, together."""
from __future__ import annotations

from pathlib import Path

from fira.convert.files import Loaded, load_run
from fira.convert.quantize import load_model
from fira.runtime import pick_device


def load(run: str | Path, device: str = "auto") -> Loaded:
    """Open a step folder, or the newest complete step of a run folder, plain or quantized.

    Raises ValueError, one line, if there is none, or if its tokenizer is not its model's.
    """
    loaded = load_run(run, load_model)
    return loaded._replace(model=loaded.model.to(pick_device(device)))
