"""Step folders: everything a run needs to continue, written whole or not at all.

A step folder appears by one rename after its files and their checksums (manifest.json) are on the
disk, so any folder named step-NNNNNN is complete. Weights and optimizer state are safetensors. A
run that trains an adapter saves the trained tensors only, and the checksum of the weights under it.
"""
from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fira import files
from fira.convert.files import find_whole
from fira.data.tokenizer import FILES
from fira.files import find_damage, sha256, sync, write_json, write_manifest
from fira.model import build_meta
from fira.model.files import ADAPTER, CONFIG, WEIGHTS, find_base, read_config
from fira.parallel.files import Writer, read_slice
from fira.parallel.layout import Layout
from fira.parallel.mesh import Mesh
from fira.runlog import read_rows

OPTIMIZER, STATE = "optimizer.safetensors", "state.json"
KEEP = 2  # newest steps, besides the best: if the newest is damaged, the one before continues


class Checkpoints:
    """The step folders of one run; keeps the newest KEEP and the best.

    On many ranks all of them call every method. Each writes its own rows into the same files while
    training goes on; the first makes the folder complete. With `base`, the step folder that the
    frozen weights come from, only trainable tensors and the routers' buffers are saved.
    """

    def __init__(self, run: Path, tokenizer_folder: Path, mesh: Mesh | None = None,
                 base: Path | None = None) -> None:
        self.run, self.tokenizer_folder, self.mesh = run, tokenizer_folder, mesh or Mesh()
        self.base = None if base is None else describe_base(base)
        self._writer = Writer(self.mesh) if self.mesh.size > 1 else None

    def save(self, step: int, layout: Layout, optimizer: torch.optim.Optimizer,
             state: dict[str, Any]) -> Path:
        """Write step-NNNNNN. Raises ValueError if the disk fails; older steps stay undamaged.

        On many ranks it is still being written when this returns, and `wait` raises the error.
        """
        self.wait()
        folder = self.run / f"step-{step:06d}"
        if self.mesh.agree(folder.exists())[0] if self._writer else folder.exists():
            return folder
        partial = self.run / f".{folder.name}.partial"
        files = {OPTIMIZER: optimizer_tensors(layout.model, optimizer)}
        files |= ({WEIGHTS: layout.model.state_dict()} if self.base is None
                  else {ADAPTER: adapter_tensors(layout.model)})
        layout.model.base = self.base

        def begin() -> None:
            partial.mkdir(parents=True, exist_ok=True)
            write_json(partial / CONFIG, layout.model.config())
            for name in FILES:
                shutil.copyfile(self.tokenizer_folder / name, partial / name)
            write_json(partial / STATE, state)

        def finish() -> None:
            write_manifest(partial)
            os.rename(partial, folder)
            sync(self.run)

        if self._writer:
            self._writer.start(layout, partial, files, begin, finish,
                               lambda error: self._refused(partial, error))
            return folder
        try:
            begin()
            for name, tensors in files.items():
                save_file(tensors, partial / name, metadata={"format": "pt"})
            finish()
        except (OSError, SafetensorError) as error:
            raise self._refused(partial, error) from error
        return folder

    def wait(self) -> None:
        """Wait until the newest step folder is complete. Raises ValueError if it cannot be."""
        if self._writer:
            self._writer.wait()

    def _refused(self, partial: Path, error: object) -> ValueError:
        if self.mesh.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        before = self.steps()
        kept = f"{before[-1].name} is whole" if before else "no earlier step exists"
        return ValueError(f"cannot save {partial.stem[1:]} in {self.run}: {error}; {kept}; "
                          "free some disk space and continue with --resume")

    def steps(self) -> list[Path]:
        """Complete step folders, oldest first."""
        return sorted((path for path in self.run.glob("step-*") if path.name[5:].isdecimal()),
                      key=step_number)

    def newest_whole(self, say: Callable[[str], None]) -> Path | None:
        """The newest undamaged step folder; None if nothing was saved yet. For the first rank, with
        the run claimed. Damaged newer ones are renamed and reported through `say`; if all that
        was saved is damaged or gone, this raises ValueError and renames nothing."""
        required = (CONFIG, WEIGHTS if self.base is None else ADAPTER, OPTIMIZER, STATE)
        faults, whole = dict[Path, str](), None
        for step in reversed(self.steps()):
            if (fault := find_damage(step, required=required)) is None:
                whole = step
                break
            faults[step] = fault
        validated = any(row["kind"] == "validation" for row in read_rows(self.run, lambda _: None))
        if whole is None and (validated or any(self.run.glob("step-*"))):  # a save comes before
            raise self._nothing_whole(faults)
        for step, fault in faults.items():
            aside = step.rename(files.free_name(step))
            say(f"checkpoint {step.name} is damaged ({fault}); it is now {aside.name}, and "
                f"{whole and whole.name} is used")
        for leftover in self.run.glob(".step-*"):  # of a save that a kill cut short
            files.remove(leftover)
        return whole

    def _nothing_whole(self, faults: dict[Path, str]) -> ValueError:
        remedy, found = "put the files back from a copy, or start a new run in another folder", []
        for step in sorted(self.run.glob("step-*")):
            found.append(f"{step.name}: {faults.get(step, 'set aside')}")
            with contextlib.suppress(ValueError):
                remedy = f"start a new run from its weights with --from {find_whole(step)}"
        return ValueError(f"{self.run} has no whole checkpoint to resume "
                          f"({', '.join(found) or 'no step folder'}); {remedy}")

    def prune(self, best_step: int | None) -> None:
        """Delete all but the newest KEEP steps and the best; one still being written stays."""
        for folder in self.steps()[:-KEEP]:
            if self.mesh.rank == 0 and step_number(folder) != best_step:
                shutil.rmtree(folder)


def step_number(folder: Path) -> int:
    return int(folder.name.partition("-")[2])


def describe_base(folder: Path) -> dict[str, str]:
    """What an adapter's step folder records of the weights that it was trained on."""
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder} holds no {WEIGHTS}, which an adapter is trained on; give a "
                         "step folder with the weights of a whole model")
    return {"path": str(folder.resolve()), "sha256": sha256(folder / WEIGHTS)}


def _weight_files(folder: Path, layout: Layout) -> list[Path]:
    """The file with the weights of `folder`, or of an adapter that of its base and its own.

    Raises ValueError on all ranks if the base is gone or was changed.
    """
    base = read_config(folder / CONFIG)[1]["base"]
    if base is None:
        return [folder / WEIGHTS]
    return [layout.mesh.first(lambda: find_base(folder, base)), folder / ADAPTER]


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
    """Put a step folder's weights and optimizer state back in place; returns its loop state. Every
    rank reads its own rows, whichever layout wrote them."""
    read_weights(folder, layout)
    with safe_open(folder / OPTIMIZER, framework="pt") as file:
        saved = set(file.keys())
        kinds = {key.rpartition("/")[2] for key in saved}
        parameters = {name: p for name, p in layout.model.named_parameters() if p.requires_grad}
        for part in layout.slices(parameters.items()):
            optimizer.state[parameters[part.name]] = {
                kind: read_slice(file, f"{part.name}/{kind}", part).to(part.rows.device)
                for kind in kinds if f"{part.name}/{kind}" in saved}
    return json.loads((folder / STATE).read_text(encoding="utf-8"))


@torch.no_grad()
def read_weights(folder: Path, layout: Layout) -> None:
    """Put a step folder's weights in place, in the model's dtype; an adapter's after its base's.

    Router buffers that the folder lacks, because it was balanced by another method, stay as they
    are. So do an adapter's parameters if the folder holds a whole model. Raises ValueError, one
    line, if the base is gone or was changed.
    """
    paths, tensors = _weight_files(folder, layout), layout.model.state_dict()
    missing = {name for name, _ in layout.model.named_parameters()}
    if len(paths) == 1:
        missing &= {name for name, _ in build_meta(layout.model.spec).named_parameters()}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            found = tensors.keys() & set(file.keys())
            for part in layout.slices((name, tensors[name]) for name in sorted(found)):
                part.rows.copy_(read_slice(file, part.name, part))
        missing -= found
    assert not missing, (folder, missing)
