"""A step folder opened for use: the model and the tokenizer it was trained with, together."""
from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from fira.checkpoint import find_damage
from fira.convert.quantize import load_model
from fira.data.tokenizer import Tokenizer
from fira.files import MANIFEST
from fira.model.files import CONFIG, WEIGHTS, find_model, read_config
from fira.runtime import pick_device


class Loaded(NamedTuple):
    model: Any
    tokenizer: Tokenizer
    folder: Path  # the step folder that was read


def load(run: str | Path, device: str = "auto") -> Loaded:
    """Open a step folder, or the newest complete step of a run folder.

    Raises ValueError, one line, if there is none, or if its tokenizer is not its model's.
    """
    folder = find_whole(run)
    tokenizer = Tokenizer.load(folder)
    model = load_model(folder)
    if tokenizer.vocab_size > model.spec.vocab_size:
        raise ValueError(f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens but the model "
                         f"only {model.spec.vocab_size}; put back the tokenizer.json it came with")
    if model.end_of_text is None:
        model.end_of_text = tokenizer.end_of_text
    return Loaded(model.to(pick_device(device)), tokenizer, folder)


def find_whole(run: str | Path) -> Path:
    """The step folder that `run` names, its weights undamaged and its tokenizer there."""
    folder = find_model(run)
    fault = find_damage(folder, (WEIGHTS,)) if (folder / MANIFEST).exists() else None
    if fault:
        raise ValueError(f"{folder} is damaged: {fault}; use another step of the run")
    read_config(folder / CONFIG)  # a folder from elsewhere is told before its tokenizer is missed
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder} has no tokenizer.json; copy it back from the data folder that "
                         "the model was trained on, or use another step")
    return folder
