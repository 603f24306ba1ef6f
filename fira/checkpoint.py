"""Step folders: everything a run needs to continue, written whole or not at all.

A step folder appears by one rename after its files and their checksums (manifest.json) are on the
disk, so any folder named step-NNNNNN is complete. Weights and optimizer state are safetensors. A
run that trains an adapter saves the trained tensors only, and the checksum of the weights under it.
"""
from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fira.files import find_damage, sha256, sync, write_json, write_manifest
from fira.model.files import ADAPTER, CONFIG, WEIGHTS, build_meta, find_base, write_config
from fira.parallel.files import Writer, create_file, read_rows, read_slices, write_rows
from fira.parallel.layout import Layout
from fira.parallel.mesh import Mesh

OPTIMIZER, STATE = "optimizer.safetensors", "state.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
KEEP = 2  # newest steps, besides the best: if the newest is damaged, the one before continues


class Checkpoints:
    """The step folders of one run; keeps the newest KEEP and the best.

    On many ranks all of them call every method. Each writes its own rows into the same files while
    training goes on; the first makes the folder whole. With `base`, a step folder that the model's
    frozen weights come from, only trainable tensors and the routers' buffers are saved.
    """

    def __init__(self, run: Path, tokenizer_folder: Path, mesh: Mesh | None = None,
                 base: Path | None = None) -> None:
        self.run, self.tokenizer_folder, self.mesh = run, tokenizer_folder, mesh or Mesh()
        self.base = None if base is None else describe_base(base)
        self._writer = Writer(self.mesh)
        if self.mesh.rank == 0:
            run.mkdir(parents=True, exist_ok=True)
            for leftover in run.glob(".step-*"):  # of a save that a kill cut short
                shutil.rmtree(leftover)
        self.mesh.wait()

    def save(self, step: int, layout: Layout, optimizer: torch.optim.Optimizer,
             state: dict[str, Any]) -> Path:
        """Write step-NNNNNN. Raises ValueError if the disk refuses; older steps stay whole.

        On many ranks it is being written when this returns; `wait` raises the error.
        """
        self.wait()
        folder = self.run / f"step-{step:06d}"
        if self.mesh.agree(folder.exists())[0]:
            return folder
        partial = self.run / f".{folder.name}.partial"
        weights = (layout.model.state_dict() if self.base is None
                   else adapter_tensors(layout.model))
        files = {WEIGHTS if self.base is None else ADAPTER: weights,
                 OPTIMIZER: optimizer_tensors(layout.model, optimizer)}
        contents = {name: self._writer.collect(layout, files[name]) for name in files}
        layout.model.base = self.base

        def begin() -> None:
            write_config(layout.model, partial)
            for name in TOKENIZER_FILES:
                shutil.copyfile(self.tokenizer_folder / name, partial / name)
            write_json(partial / STATE, state)
            for name, content in contents.items():
                create_file(partial / name, content)

        def write() -> None:
            for name, content in contents.items():
                write_rows(partial / name, content)

        def finish() -> None:
            write_manifest(partial)
            os.rename(partial, folder)
            sync(self.run)

        self._writer.start([(begin, True), (write, False), (finish, True)],
                           lambda error: self._refused(partial, folder, error))
        return folder

    def wait(self) -> None:
        """Wait until the newest save is whole. Raises ValueError if it cannot be."""
        self._writer.wait()

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
        """The newest undamaged step folder; damaged ones are renamed and reported through `say`."""
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
        """Delete all but the newest KEEP steps and the best; one still being written stays."""
        if self.mesh.rank:
            return
        for folder in self.steps()[:-KEEP]:
            if step_number(folder) != best_step:
                shutil.rmtree(folder)


def step_number(folder: Path) -> int:
    return int(folder.name.partition("-")[2])


def describe_base(folder: Path) -> dict[str, str]:
    """What an adapter's step folder says of the weights under it: their place and checksum."""
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder} holds no {WEIGHTS}, which an adapter needs under it; give a "
                         "step folder with whole weights")
    return {"path": str(folder.resolve()), "sha256": sha256(folder / WEIGHTS)}


def _base_weights(folder: Path, layout: Layout) -> Path | None:
    """The file of the weights under the adapter in `folder`; None if its weights are whole.

    Raises ValueError on all ranks if the file is gone or was changed.
    """
    base = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("base")
    if base is None:
        return None
    fault = None
    try:
        if layout.mesh.rank == 0:  # one rank reads all of it; the others receive the result
            find_base(folder, base)
    except ValueError as error:
        fault = str(error)
    if fault := layout.mesh.gather(fault)[0]:
        raise ValueError(fault)
    return Path(base["path"]) / WEIGHTS


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: trainable parameters and the buffers of the routers."""
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False)
              if not p.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer state of trainable parameters as one flat table, parameter/key -> tensor."""
    return {f"{name}/{key}": value.detach().contiguous()
            for name, parameter in model.named_parameters() if parameter.requires_grad
            for key, value in optimizer.state.get(parameter, {}).items()}


def restore(folder: Path, layout: Layout, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put a step folder's weights and optimizer state back in place; returns its loop state.

    Whatever layout wrote it: every rank reads its own rows.
    """
    read_weights(folder, layout)
    saved: dict[str, list[str]] = {}
    with safe_open(folder / OPTIMIZER, framework="pt") as file:
        for key in file.keys():
            saved.setdefault(key.rpartition("/")[0], []).append(key)
        parameters = {name: p for name, p in layout.model.named_parameters() if p.requires_grad}
        for part in layout.slices(parameters.items()):
            device, state = part.rows.device, {}
            for key in saved.get(part.name, []):
                scalar = not file.get_slice(key).get_shape()
                value = (file.get_tensor(key) if scalar
                         else read_rows(file, key, part.start, len(part.rows)))
                state[key.rpartition("/")[2]] = value if scalar else value.to(device)
            optimizer.state[parameters[part.name]] = state
    return json.loads((folder / STATE).read_text(encoding="utf-8"))


@torch.no_grad()
def read_weights(folder: Path, layout: Layout) -> None:
    """Put a step folder's weights in place, in the dtype of the model; an adapter's after those of
    its base.

    Router buffers that the folder lacks, because it was balanced by another method, stay as they
    are. So do an adapter's own parameters where the folder is not of an adapter. Raises ValueError,
    one line, if the base is gone or was changed.
    """
    base, tensors = _base_weights(folder, layout), layout.model.state_dict()
    missing = {name for name, _ in layout.model.named_parameters()}
    if base is None:
        missing &= {name for name, _ in build_meta(layout.model.spec).named_parameters()}
    for path in [folder / WEIGHTS] if base is None else [base, folder / ADAPTER]:
        with safe_open(path, framework="pt") as file:
            found = tensors.keys() & set(file.keys())
        read_slices(path, layout.slices((name, tensors[name]) for name in sorted(found)))
        missing -= found
    assert not missing, (folder, missing)
