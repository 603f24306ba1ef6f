"""A tuned run drawn back towards the run it was tuned from.

    BASE + share (RUN - BASE)        of every weight

What a model forgets grows with about the square of the share and what it learned more slowly than
the share shrinks, so the mean forgets less than a shorter tuning that learned as much (Wortsman et
al. 2022, 2109.01903). Any two runs of one shape that come from the same base can be averaged.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fira.config import ConfigError
from fira.convert.files import Loaded, load_run, number_of, write_run
from fira.convert.quantize import dequantized, load_model
from fira.data.tokenizer import END_OF_TEXT, Tokenizer
from fira.files import check_new, read_json
from fira.model.adapter import merge
from fira.model.files import CONFIG, find_model


def average_run(run: Path, folder: Path, share: float, base: Path | None, screen: Console) -> None:
    """Write the newest step of `run`, with the share `share` of what differs from `base`, as the
    new run `folder`, whole and in float32. Without `base` it is what `run` was trained from.

    Raises ValueError, one line, if there is no such run, or one of another shape or tokenizer.
    """
    check_new(folder)
    tuned, (source, theirs, start) = load_whole(run), load_whole(base or find_start(run))
    if tuned.tokenizer.hash != theirs.hash:
        raise ConfigError(f"{tuned.folder} and {start} have different tokenizers "
                          f"({tuned.tokenizer.hash[:12]}, {theirs.hash[:12]}); give another --base")
    write_run(folder, average(tuned.model, source, share, tuned.tokenizer), tuned.tokenizer,
              number_of(tuned.folder), {"stage": "export", "preset": "merge",
                                        "from": str(start.resolve()), "share": share,
                                        "merged_from": str(tuned.folder.resolve())})
    screen.print(f"wrote {folder}, {share:g} of the way from {start} to {tuned.folder}",
                 soft_wrap=True)


def load_whole(run: Path) -> Loaded:
    """The model of a run in float32, with its adapter merged."""
    return load_run(run, lambda step: merge(dequantized(load_model(step, merged=False)).float()))


def find_start(run: Path) -> Path:
    """What a run was trained from, by its record. Raises ValueError, one line."""
    found = read_json(find_model(run).parent / CONFIG, "give --base RUN").get("from")
    if not found or not Path(found).exists():
        raise ConfigError(f"{run} was trained from {found or 'new weights'}"
                          f"{', which is gone' if found else ''}; give --base RUN")
    return Path(found)


@torch.no_grad()
def average(tuned: Any, base: Any, share: float, tokenizer: Tokenizer) -> Any:
    """Draw `tuned` towards `base` in place; returns it. Tokens of conversations keep their rows if
    the base was never trained on any: its own mean nothing. Raises ConfigError."""
    old, new = base.state_dict(), tuned.state_dict()
    for name in old.keys() | new.keys():
        shapes = [tuple(each[name].shape) if name in each else "none" for each in (old, new)]
        if shapes[0] != shapes[1]:
            raise ConfigError(f"{name} has shape {shapes[1]} in the run and {shapes[0]} in its "
                              "base; average runs of one shape")
    ids = [number for name, number in tokenizer.added.items() if name != END_OF_TEXT]
    kept = {} if base.chat else {
        name: new[name][ids] for name in ("token_embedding.weight", f"{tuned.after[-1]}.weight")
        if name in new}
    for name, tensor in new.items():
        if tensor.is_floating_point():
            tensor.copy_(torch.lerp(old[name], tensor, share))
    for name, rows in kept.items():
        new[name][ids] = rows
    return tuned
