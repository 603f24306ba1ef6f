"""Show what a model is: its parameters by part, total and active."""
from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.table import Table

from fira.config import load_preset
from fira.model import build_meta
from fira.model.files import CONFIG, find_model, read_config
from fira.model.transformer import count_parameters
from fira.runlog import console
from fira.stages.config import configure
from fira.stages.pretrain import PRETRAIN


def show(what: str, settings: Iterable[str]) -> None:
    """Print the table of a preset (with settings), or of the model in a run or step folder."""
    spec, length = _spec(what, settings)
    count = count_parameters(build_meta(spec), length)
    table = Table(title=f"{what} ({spec.architecture})", title_justify="left")
    for name in ("part", "parameters", "active"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for row in count.rows:
        table.add_row(row.part, f"{row.total:,}", f"{row.active:,}")
    table.add_section()
    table.add_row("all", f"{count.total:,}", f"{count.active:,}")
    screen = console(stderr=False)
    screen.print(table)
    screen.print(f"{count.total / 1e6:.2f}M parameters, {count.active / 1e6:.2f}M active per "
                 f"token, {count.flops_per_token / 1e9:.3g} GFLOP per token of training "
                 f"at {length} tokens", soft_wrap=True)


def _spec(what: str, settings: Iterable[str]) -> tuple[Any, int]:
    if not Path(what).is_dir():
        config = configure(PRETRAIN, load_preset(what), settings)
        return config.model, config.train.sequence_length
    if list(settings):
        raise ValueError(f"{what} is a trained model, which settings cannot change; "
                         "give a preset to try other shapes")
    spec, notes = read_config(find_model(what) / CONFIG)
    return spec, notes["trained_length"] or spec.context
