"""Finds the data and the tokenizer for training_with_MoE.py, the founding document's script.

Step folders, a data folder, text files and a tokenizer may all be somewhere below one search folder
(/kaggle/input). What was found is printed. If two things could be meant, the user is asked.
"""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from fira.config import load_preset
from fira.data.prepare import learn_tokenizer, prepare
from fira.data.shards import read_manifest
from fira.data.sources import LINES, SUPPORTED, text_files
from fira.data.tokenizer import Tokenizer
from fira.files import MANIFEST
from fira.stages.config import configure
from fira.stages.pretrain import PRETRAIN
from fira.stages.run import check_vocabulary

NO_TEXT = ("merges.txt", "vocab.txt", "readme.md", "license.txt", "license.md")  # in lower case
LEARN_BYTES = 1_000_000_000


def find_tokenizer(search: Path, run: Path) -> Path | None:
    """The tokenizer.json of the current folder, else of the run, else below `search`, or None.

    Raises ValueError if `search` holds several that differ.
    """
    steps = sorted(run.glob("step-*[0-9]/tokenizer.json"))
    for path in (Path("tokenizer.json"), *steps[-1:], run / "data" / "tokenizer.json",
                 run / "tokenizer" / "tokenizer.json"):
        if path.is_file():
            return path
    found = sorted(search.rglob("tokenizer.json"))
    if len({path.read_bytes() for path in found}) > 1:
        raise ValueError(f"{search} holds different tokenizers ({_names(found)}); "
                         "choose one with --tokenizer PATH, or use_tokenizer(PATH) in Python")
    return found[0] if found else None


def find_data(search: Path, run: Path) -> list[str]:
    """The run's prepared data, else a data folder below `search`, else the text files there.

    Parquet files are preferred to lines of JSON, those to tables, plain text and the rest, because
    text beside a data set is seldom part of it. Raises ValueError if there is nothing, or more than
    one data folder.
    """
    if _is_prepared(run / "data"):
        return [str(run / "data")]
    prepared = sorted(file.parent for file in search.rglob(MANIFEST) if _is_prepared(file.parent))
    if len(prepared) > 1:
        raise ValueError(f"{search} holds several data folders ({_names(prepared)}); "
                         "choose one with --data FOLDER")
    if prepared:
        return [str(prepared[0])]
    text = [path for path in text_files(search, {}) if path.name.lower() not in NO_TEXT]
    for kinds in ((".parquet",), LINES, (".csv", ".tsv"), (".txt", ".md"), ("",)):
        if chosen := [str(path) for path in text if any(map(path.name.lower().count, kinds))]:
            return chosen
    missing = "" if search.is_dir() else " (there is no such folder)"
    raise ValueError(f"no data in {search}{missing}: looked for files ending in {SUPPORTED}, and "
                     "for a folder made by fira data; run: python training_with_MoE.py --data "
                     "FILE_OR_FOLDER")


def data_folder(search: Path, run: Path, sources: Sequence[str], tokenizer: Path | None,
                validation: Sequence[str], preset: str, settings: list[str],
                screen: Console) -> Path:
    """The data folder to train `preset` on: a prepared one as it is, else made in `run`/data.

    Without a tokenizer, one of the model's vocabulary size is learned from the text. Raises
    ValueError, before any long work, if the settings or the tokenizer do not fit.
    """
    config = configure(PRETRAIN, load_preset(preset), settings)
    if not sources:
        sources = [config.data.folder] if config.data.folder else find_data(search, run)
    screen.print(f"data: {_names(sources)}", soft_wrap=True)
    if len(sources) == 1 and _is_prepared(Path(sources[0])):
        _check_made_with(tokenizer, Path(sources[0]))
        return Path(sources[0])
    path = tokenizer or find_tokenizer(search, run)
    if path:
        screen.print(f"tokenizer: {path}", soft_wrap=True)
        chosen = Tokenizer.load(path)
    else:
        screen.print("no tokenizer.json found; learning one from the data")
        chosen = learn_tokenizer(sources, run / "tokenizer", config.model.vocab_size, LEARN_BYTES,
                                 screen)
    if any(setting.startswith("model.vocab_size=") for setting in settings):
        check_vocabulary(chosen, config.model)
    prepare(sources, run / "data", chosen, validation_sources=validation, screen=screen)
    return run / "data"


def _is_prepared(folder: Path) -> bool:
    return (folder / MANIFEST).is_file() and any(folder.glob("train-*.bin"))


def _check_made_with(tokenizer: Path | None, data: Path) -> None:
    made_with = read_manifest(data)["tokenizer_hash"]
    if tokenizer and (given := Tokenizer.load(tokenizer).hash) != made_with:
        raise ValueError(f"{data} was made with tokenizer {made_with[:12]}, not with {tokenizer} "
                         f"({given[:12]}); leave out --tokenizer, or give the text with --data")


def _names(paths: Sequence[Path | str]) -> str:
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(map(str, paths[:3])) + more
