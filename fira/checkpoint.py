"""Step folders: everything a run needs to continue, written whole or not at all.

A step folder appears by one rename after its files and their checksums (manifest.json) are on the
disk, so any folder named step-NNNNNN is complete. Weights and optimizer state are safetensors.
"""
from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from fira.files import MANIFEST
from fira.model.files import WEIGHTS, write_config
from fira.parallel.files import create_file, read_pieces, read_rows, write_rows
from fira.parallel.layout import Layout
from fira.parallel.mesh import Mesh
from fira.parallel.saver import Saver

OPTIMIZER, STATE = "optimizer.safetensors", "state.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


class Checkpoints:
    """The step folders of one run; keeps the newest `keep` and the best.

    On many ranks all of them call every method. Each writes its own rows into the same files while
    training goes on; the first makes the folder whole.
    """

    def __init__(self, run: Path, tokenizer_folder: Path, keep: int,
                 mesh: Mesh | None = None) -> None:
        self.run, self.tokenizer_folder, self.keep = run, tokenizer_folder, keep
        self.mesh = mesh or Mesh()
        self._saver = Saver(self.mesh)
        if self.mesh.rank == 0:
            run.mkdir(parents=True, exist_ok=True)
            for leftover in run.glob(".step-*"):  # a save that a kill cut short
                shutil.rmtree(leftover)
        self.mesh.wait()

    def save(self, step: int, layout: Layout, optimizer: torch.optim.Optimizer,
             state: dict[str, Any]) -> Path:
        """Write step-NNNNNN. Raises ValueError if the disk refuses; older steps stay whole.

        On many ranks it is being written when this returns; an error comes with `wait`.
        """
        self.wait()
        folder = self.run / f"step-{step:06d}"
        if self.mesh.agree(folder.exists())[0]:
            return folder
        partial = self.run / f".{folder.name}.partial"
        plans = {WEIGHTS: self._saver.plan(layout, layout.model.state_dict()),
                 OPTIMIZER: self._saver.plan(layout, optimizer_tensors(layout.model, optimizer))}

        def begin() -> None:
            write_config(layout.model, partial)
            for name in TOKENIZER_FILES:
                shutil.copyfile(self.tokenizer_folder / name, partial / name)
            (partial / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
            for name, plan in plans.items():
                create_file(partial / name, plan)

        def write() -> None:
            for name, plan in plans.items():
                write_rows(partial / name, plan)

        def finish() -> None:
            write_manifest(partial)
            os.rename(partial, folder)
            _sync(self.run)

        self._saver.start([(begin, True), (write, False), (finish, True)],
                          lambda error: self._refused(partial, folder, error))
        return folder

    def wait(self) -> None:
        """Until the newest save is whole. Raises ValueError if it cannot be."""
        self._saver.wait()

    def _refused(self, partial: Path, folder: Path, error: str) -> ValueError:
        if self.mesh.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        before = self.steps()
        kept = f"{before[-1].name} is whole" if before else "no earlier step exists"
        return ValueError(f"cannot save {folder}: {error}; {kept}; "
                          "free some disk space and continue with --resume")

    def steps(self) -> list[Path]:
        """Complete step folders, oldest first."""
        return sorted((path for path in self.run.glob("step-*")
                       if re.fullmatch(r"step-\d+", path.name)), key=step_number)

    def newest_whole(self, say: Any) -> Path | None:
        """The newest undamaged step folder; damaged ones are reported through `say`, set aside."""
        found = self._newest_whole(say) if self.mesh.rank == 0 else None
        number = int(self.mesh.agree(step_number(found) if found else -1)[0])
        return None if number < 0 else self.run / f"step-{number:06d}"

    def _newest_whole(self, say: Any) -> Path | None:
        for folder in reversed(self.steps()):
            fault = find_damage(folder)
            if fault is None:
                return folder
            aside = folder.with_name(folder.name + ".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            say(f"checkpoint {folder.name} is damaged ({fault}); it is now {aside.name}, "
                "and the one before is used")
        return None

    def prune(self, best_step: int | None) -> None:
        """Delete all but the newest `keep` steps and the best; one still being written is not among
        them."""
        if self.mesh.rank:
            return
        for folder in self.steps()[:-self.keep]:
            if step_number(folder) != best_step:
                shutil.rmtree(folder)


def step_number(folder: Path) -> int:
    return int(folder.name.partition("-")[2])


def optimizer_tensors(model: nn.Module,
                      optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Optimizer state as one flat table, `parameter name/key` -> tensor."""
    return {f"{name}/{key}": value.detach().contiguous()
            for name, parameter in model.named_parameters()
            for key, value in optimizer.state.get(parameter, {}).items()}


def restore(folder: Path, layout: Layout, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put a step folder's weights and optimizer state back in place; returns its loop state.

    Whatever layout wrote it: every rank reads its own rows.
    """
    model = layout.model
    read_weights(folder, layout)
    saved: dict[str, list[str]] = {}
    with safe_open(folder / OPTIMIZER, framework="pt") as file:
        for key in file.keys():
            saved.setdefault(key.rpartition("/")[0], []).append(key)
        parameters = dict(model.named_parameters())
        for piece in layout.pieces(parameters.items()):
            device, state = piece.rows.device, {}
            for key in saved.get(piece.name, []):
                scalar = not file.get_slice(key).get_shape()
                value = (file.get_tensor(key) if scalar
                         else read_rows(file, key, piece.start, len(piece.rows)))
                state[key.rpartition("/")[2]] = value if scalar else value.to(device)
            optimizer.state[parameters[piece.name]] = state
    return json.loads((folder / STATE).read_text(encoding="utf-8"))


@torch.no_grad()
def read_weights(folder: Path, layout: Layout) -> None:
    """Put a step folder's weights in place, in the dtype of the model that is there.

    A router's state that the folder lacks, since it was balanced in another way, stays as it is.
    """
    state = layout.model.state_dict()
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        lacking = state.keys() - set(file.keys())
    assert lacking.isdisjoint(dict(layout.model.named_parameters())), lacking
    read_pieces(folder / WEIGHTS, layout.pieces(
        (name, tensor) for name, tensor in state.items() if name not in lacking))


def write_manifest(folder: Path) -> None:
    """Checksum every file of `folder` into manifest.json and push all of it to the disk."""
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
             for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=2) + "\n", encoding="utf-8")
    for path in folder.iterdir():
        _sync(path)
    _sync(folder)


def find_damage(folder: Path, names: tuple[str, ...] | None = None) -> str | None:
    """What is wrong with a step folder (or only with files `names`), in words; None if whole."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError):
        return f"{MANIFEST} is missing or unreadable"
    for name, facts in manifest.items():
        if names is not None and name not in names:
            continue
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != facts["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, not {facts['bytes']}"
        if sha256(path) != facts["sha256"]:
            return f"{name} was altered"
    return None


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """fsync a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
