"""Check what is on the disk against its checksums and rules: a run, a step, data, an export."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from fira import files
from fira.checkpoint import AVERAGE
from fira.convert.hf import read_model
from fira.data.batches import Shards
from fira.data.tokenizer import Tokenizer
from fira.files import MANIFEST
from fira.infer.load import load
from fira.model.files import CONFIG
from fira.runlog import METRICS, read_rows
from fira.stages.config import configure, modernize
from fira.stages.distill import DISTILL
from fira.stages.prefer import PREFER
from fira.stages.pretrain import PRETRAIN
from fira.stages.tune import TUNE

Check = tuple[str, str, Callable[[], Any]]  # file, rule, what raises or returns a fault


def check(path: Path) -> list[tuple[str, str, str]]:
    """(file, rule, fault or "") of all that has a checksum or a rule in a run, a step, data, a
    tokenizer, an exported folder or a GGUF file. Raises ValueError if `path` is none of these."""
    if found := [(name, rule, _fault(test)) for name, rule, test in _checks(path)]:
        return found
    raise ValueError(f"{path} holds nothing to check; give a run, a step folder, a data or "
                     "tokenizer folder, or what fira export wrote")


def _fault(test: Callable[[], Any]) -> str:
    try:
        fault = test()
    except Exception as error:  # an altered file may break what any reader expects; it is reported
        return str(error) if isinstance(error, (ValueError, OSError)) else repr(error)
    return fault if isinstance(fault, str) else ""


def _checks(path: Path) -> Iterator[Check]:
    if path.suffix == ".gguf":
        import gguf

        yield path.name, "structure", partial(gguf.GGUFReader, path)
    elif steps := sorted([*path.glob("step-*[0-9]"), *path.glob(AVERAGE)]):
        yield CONFIG, "settings", partial(_check_settings, path)
        yield METRICS, "every step once", partial(_check_record, path)
        for folder in steps:
            for name, rule, test in _folder(folder):
                yield f"{folder.name}/{name}", rule, test
    elif path.is_dir():
        yield from _folder(path)


def _folder(folder: Path) -> Iterator[Check]:
    names, read = {file.name for file in folder.iterdir()}, partial(_read, folder / MANIFEST)
    if folder.name.startswith("step-") or MANIFEST in names:
        yield MANIFEST, "readable", read
        described = {} if _fault(read) else read()
        for name in described.get("files", ()):
            yield name, "checksum", partial(files.find_damage, folder, (name,))
        for split in described.get("splits", ()):
            yield f"{split}-*.bin", "checksum", partial(_check_split, folder, split)
    if CONFIG in names:
        yield CONFIG, "opens as a model", partial(_open_model, folder)
    if "tokenizer.json" in names:
        yield "tokenizer.json", "opens", partial(Tokenizer.load, folder)


def _read(path: Path) -> dict[str, Any]:
    return files.read_json(path, "copy it again")


def _open_model(folder: Path) -> None:
    kind = _read(folder / CONFIG).get("model_type")
    if kind != "fira":  # a FIRA for transformers has checksums, and transformers opens it
        read_model(folder) if kind else load(folder, "cpu")


def _check_split(folder: Path, split: str) -> str:
    Shards(folder, split).verify()
    same = _read(folder / MANIFEST)["tokenizer_hash"] == Tokenizer.load(folder).hash
    return "" if same else "tokenizer.json is not the one that these ids were made with"


def _check_settings(run: Path) -> None:
    if "config" in (saved := _read(run / CONFIG)):  # not in a run that was imported or exported
        stages = {stage.name: stage for stage in (PRETRAIN, TUNE, PREFER, DISTILL)}
        stage = stages.get(saved.get("stage", ""), PRETRAIN)
        configure(stage, modernize(saved["config"]), ())


def _check_record(run: Path) -> str:
    steps = [row["step"] for row in read_rows(run) if row["kind"] == "step"]
    return "" if steps == [*range(1, len(steps) + 1)] else "a step is missing or out of its place"
