"""The founding document's way to data: what lies in one search folder becomes a data folder.

A step folder, a data folder and a tokenizer may all lie below the search folder. What was found is
printed, and where two things could be meant the user is asked, never guessed for.
"""
from __future__ import annotations

from pathlib import Path

from rich.console import Console

from fira.config import load_preset
from fira.data.shards import MANIFEST, read_manifest
from fira.data.sources import ENDINGS, SUPPORTED
from fira.data.tokenizer import Tokenizer
from fira.stages.prepare import learn_tokenizer, prepare_data
from fira.stages.pretrain import check_vocabulary, configure

BESIDE = ("merges.txt", "vocab.txt", "readme.md", "license.txt", "license.md")  # no training text
LEARN_BYTES = 1_000_000_000


def find_tokenizer(search: Path, run: Path) -> Path | None:
    """In the current folder, else with the run, else below `search`; None if there is none.

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

    Parquet goes before jsonl and jsonl before plain text, which is seldom part of a data set that
    has them. Raises ValueError if there is nothing, or more than one data folder.
    """
    prepared = [run / "data"] if is_prepared(run / "data") else sorted(
        path.parent for path in search.rglob(MANIFEST) if is_prepared(path.parent))
    if len(prepared) > 1:
        raise ValueError(f"{search} holds several data folders ({_names(prepared)}); "
                         "choose one with --data FOLDER")
    if prepared:
        return [str(prepared[0])]
    text = [path for path in sorted(search.rglob("*")) if path.is_file()
            and path.name.lower().endswith(ENDINGS) and path.name.lower() not in BESIDE
            and not any(part.startswith(".") for part in path.relative_to(search).parts)]
    for kind in (".parquet", ".jsonl", ""):
        if chosen := [str(path) for path in text if kind in path.name.lower()]:
            return chosen
    missing = "" if search.is_dir() else " (there is no such folder)"
    raise ValueError(f"no data in {search}{missing}: looked for files ending in {SUPPORTED}, and "
                     "for a folder made by fira data; run: python training_with_MoE.py --data "
                     "FILE_OR_FOLDER")


def is_prepared(folder: Path) -> bool:
    """Is it a finished data folder?"""
    return (folder / MANIFEST).is_file() and any(folder.glob("train-*.bin"))


def data_folder(search: Path, run: Path, sources: list[str], tokenizer: Path | None,
                validation: list[str], preset: str, settings: list[str], screen: Console) -> Path:
    """The data folder to train `preset` on: a prepared one as it is, else made in `run`/data.

    Text without a tokenizer gets one of the model's vocabulary size. Raises ValueError as its parts
    do, before any long work where the settings or the tokenizer do not fit.
    """
    config = configure(load_preset(preset), settings)
    if not sources:
        sources = [config.data.folder] if config.data.folder else find_data(search, run)
    screen.print(f"data: {_names(sources)}", soft_wrap=True)
    if len(sources) == 1 and is_prepared(Path(sources[0])):
        _refuse_other_tokenizer(Path(sources[0]), tokenizer)
        return Path(sources[0])
    path = tokenizer or find_tokenizer(search, run)
    if path is None:
        screen.print("no tokenizer.json found; learning one from the data")
        chosen = learn_tokenizer(sources, run / "tokenizer", config.model.vocab_size, LEARN_BYTES,
                                 screen)
    else:
        screen.print(f"tokenizer: {path}", soft_wrap=True)
        chosen = Tokenizer.load(path)
    check_vocabulary(chosen, config)
    prepare_data(sources, run / "data", chosen, 20, validation, None, screen)
    return run / "data"


def _refuse_other_tokenizer(data: Path, tokenizer: Path | None) -> None:
    made_with = read_manifest(data)["tokenizer_hash"]
    if tokenizer and (given := Tokenizer.load(tokenizer).hash) != made_with:
        raise ValueError(f"{data} was made with tokenizer {made_with[:12]}, not with {tokenizer} "
                         f"({given[:12]}); leave out --tokenizer, or give the text with --data")


def _names(paths: list[Path] | list[str]) -> str:
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(map(str, paths[:3])) + more
