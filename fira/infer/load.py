"""A step folder opened for use: the model and the tokenizer it was trained with, together."""
from __future__ import annotations

from functools import partial
from pathlib import Path

from fira.convert.files import Loaded, find_whole, load_run
from fira.convert.quantize import load_model
from fira.runtime import pick_device


def load(run: str | Path, device: str = "auto", adapter: str | Path | None = None) -> Loaded:
    """Open a step folder, or the newest complete step of a run folder, plain or quantized.

    The weights are mapped (`fira.model.files.read_tensors`). With `adapter`, a run or step folder
    that holds one, it is applied to the weights of `run`. Raises ValueError, one line, if there is
    none, if its tokenizer is not its model's, or if the adapter was trained on other weights.
    """
    base = find_whole(run) if adapter else None
    loaded = load_run(adapter or run, partial(load_model, base=base, mapped=True))
    return loaded._replace(model=loaded.model.to(pick_device(device)))
