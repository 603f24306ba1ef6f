"""A run folder as the conversions read it and write it."""
from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from fira.data.tokenizer import FILES, Tokenizer
from fira.files import new_target, write_json, write_manifest
from fira.model import load_pretrained
from fira.model.files import (
    ADAPTER,
    CONFIG,
    WEIGHTS,
    check_damage,
    find_model,
    knows_chat,
    read_config,
    save_weights,
)


class Loaded(NamedTuple):
    model: Any
    tokenizer: Tokenizer
    folder: Path  # the step folder that was read


def load_run(run: str | Path, read: Callable[[Path], Any] = load_pretrained) -> Loaded:
    """Load the model and tokenizer of a step folder, or of the newest complete step of a run.

    `read` loads the weights; the default refuses int8 and int4 ones. Raises ValueError, one line,
    if there is no model, or if its tokenizer belongs to another one.
    """
    folder = find_whole(run)
    tokenizer = Tokenizer.load(folder)
    model = read(folder)
    if tokenizer.vocab_size > model.spec.vocab_size:
        raise ValueError(f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens but the model "
                         f"only {model.spec.vocab_size}; put back the tokenizer.json it came with")
    if model.end_of_text is None:
        model.end_of_text = tokenizer.end_of_text
    model.chat = knows_chat(folder)
    return Loaded(model, tokenizer, folder)


def find_whole(run: str | Path) -> Path:
    """The step folder that `run` names; its model and tokenizer are there and undamaged.

    Raises ValueError, one line, if there is none.
    """
    folder = find_model(run)
    check_damage(folder, (CONFIG, *FILES, WEIGHTS, ADAPTER))
    read_config(folder / CONFIG)  # refuses a model of another program before its tokenizer is read
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder} has no tokenizer.json; copy it back from the data folder that "
                         "the model was trained on, or use another step")
    return folder


def number_of(step: Path) -> int:
    """The number of a step folder; 0 if it was renamed."""
    found = re.fullmatch(r"step-(\d+)", step.name)
    return int(found[1]) if found else 0


def write_run(run: Path, model: Any, tokenizer: Tokenizer, step: int,
              record: dict[str, Any]) -> None:
    """Write the new run folder `run` with one step in it; `record` goes into its config.json."""
    with new_target(run) as partial:
        folder = partial / f"step-{step:06d}"
        save_weights(model, folder)
        tokenizer.save(folder)
        write_manifest(folder)
        write_json(partial / CONFIG, record)
