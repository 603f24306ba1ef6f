"""Step folders: everything a run needs to continue, written whole or not at all.

A step folder appears by one rename after its files and their checksums (manifest.json) are on the
disk, so any folder named step-NNNNNN is complete. Weights and optimizer state are safetensors: 8
bytes of header length, a JSON header, the tensors. All ranks write one file, each its own rows at
their offset, and it is byte for byte what one process would write, so any layout reads what any
other wrote. Nothing is gathered; all ranks must see the same folder. A run that trains an adapter
saves the trained tensors only, and the checksum of the weights under it.
"""
from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn

from fira import files
from fira.convert.files import find_whole
from fira.data.tokenizer import FILES
from fira.files import find_damage, sha256, sync, write_json, write_manifest
from fira.model import build_meta
from fira.model.files import ADAPTER, CONFIG, WEIGHTS, find_base, read_config
from fira.model.initialize import TensorSlice
from fira.parallel.layout import Layout
from fira.parallel.mesh import Mesh
from fira.runlog import METRICS, TRACKED, read_rows

OPTIMIZER, STATE = "optimizer.safetensors", "state.json"
AVERAGE = "average"  # the folder with the averaged weights of a run that keeps them
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
          torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}
Rows = list[tuple[int, Tensor]]  # rows to write, each at an offset in the file
KEEP = 2  # newest steps, besides the best: if the newest is damaged, the one before continues


class Checkpoints:
    """The step folders of one run; keeps the newest KEEP, the best and every `keep_every`-th.

    All ranks call every method. A save is written by a thread with a process group of its own, so
    that training continues: each rank writes its rows into the same files, and the first makes the
    folder complete. Many ranks copy their rows first. One rank reads them where they are, so its
    weights must not change before `wait` returns; forward and backward passes may run. With `base`,
    the step folder that the frozen weights come from, only trainable tensors and the routers'
    buffers are saved.
    """

    def __init__(self, run: Path, tokenizer_folder: Path, mesh: Mesh | None = None,
                 base: Path | None = None, keep_every: int | None = None) -> None:
        self.run, self.tokenizer_folder, self.mesh = run, tokenizer_folder, mesh or Mesh()
        self.base = None if base is None else describe_base(base)
        self.keep_every = keep_every
        self.group = (dist.new_group(backend="gloo", timeout=self.mesh.timeout)
                      if self.mesh.size > 1 else None)
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def save(self, step: int, layout: Layout, optimizer: torch.optim.Optimizer | None,
             state: dict[str, Any]) -> Path:
        """Begin to write step-NNNNNN, if it is not there; without an optimizer AVERAGE, anew.

        `wait` raises ValueError if the disk fails; older steps stay undamaged.
        """
        self.wait()
        folder, model = self.run / (f"step-{step:06d}" if optimizer else AVERAGE), layout.model
        if optimizer and any(self._gather(folder.exists())):
            return folder
        tensors = {OPTIMIZER: optimizer_tensors(model, optimizer)} if optimizer else {}
        tensors |= ({WEIGHTS: model.state_dict()} if self.base is None
                    else {ADAPTER: adapter_tensors(model)})
        model.base = self.base
        texts = {CONFIG: model.config(), STATE: state}  # as they are now: training goes on
        contents = {name: self._collect(layout, found) for name, found in tensors.items()}
        self._writing = self._thread.submit(self._write, folder, texts, contents)
        return folder

    def wait(self) -> None:
        """Wait until the newest step folder is complete. Raises ValueError if it cannot be."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _gather(self, value: Any) -> list[Any]:
        """The small `value` of every rank; also a barrier."""
        return self.mesh.gather(value, self.group) if self.mesh.size > 1 else [value]

    def _collect(self, layout: Layout, tensors: dict[str, Tensor]) -> tuple[int, Rows]:
        """The size of a file of `tensors`, and what this rank writes of it, in the file's order."""
        parts = list(layout.slices(tensors.items()))
        described = self._gather({part.name: (DTYPES[part.rows.dtype], part.shape,
                                              part.rows.element_size()) for part in parts})
        header, starts, size = _lay_out({name: facts for one in described
                                         for name, facts in one.items()})
        rows = [(starts[part.name] + part.start * prod(part.shape[1:]) * part.rows.element_size(),
                 part.rows.to("cpu", copy=True) if self.mesh.size > 1 else part.rows)
                for part in parts if layout.writes(part)]
        if self.mesh.rank == 0:
            rows.append((0, torch.frombuffer(bytearray(header), dtype=torch.uint8)))
        return size, sorted(rows, key=lambda row: row[0])

    def _write(self, folder: Path, texts: dict[str, Any],
               contents: dict[str, tuple[int, Rows]]) -> None:
        """Write JSON files and files of tensors into `folder`. Each of three tasks, of which only
        `write` is for all ranks, starts when every rank has finished the one before."""
        partial = folder.with_name(f".{folder.name}.partial")
        digests: dict[str, str | None] = {}

        def begin() -> None:
            partial.mkdir(parents=True, exist_ok=True)
            for name, content in texts.items():
                write_json(partial / name, content)
            for name in FILES:
                shutil.copyfile(self.tokenizer_folder / name, partial / name)
            for name, (size, _) in contents.items():
                with open(partial / name, "wb") as file:
                    file.truncate(size)

        def write() -> None:
            with ThreadPoolExecutor() as threads:  # the files at the same time
                found = threads.map(write_rows, (partial / name for name in contents),
                                    (rows for _, rows in contents.values()))
                digests.update(zip(contents, found, strict=True))

        def finish() -> None:
            write_manifest(partial, digests)
            files.remove(folder)
            os.rename(partial, folder)
            sync(self.run)

        for task in (begin, write, finish):
            fault = ""
            try:
                if task is write or self.mesh.rank == 0:
                    task()
            except OSError as error:
                fault = str(error)
            if faults := [text for text in self._gather(fault) if text]:
                raise self._refused(partial, faults[0])

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

    def newest_whole(self, say: Callable[[str], None], back: int | None = None) -> Path | None:
        """The newest undamaged step folder; None if nothing was saved yet. For the first rank, with
        the run claimed. Damaged newer ones are renamed and reported through `say`; if all that
        was saved is damaged or gone, this raises ValueError and renames nothing. The run first
        goes back to step `back`, if that is given."""
        if back is not None:
            self._go_back(back, say)
        required = (CONFIG, WEIGHTS if self.base is None else ADAPTER, OPTIMIZER, STATE)
        faults, whole = dict[Path, str](), None
        for step in reversed(self.steps()):
            if (fault := find_damage(step, required=required)) is None:
                whole = step
                break
            faults[step] = fault
        validated = {row["step"] for row in read_rows(self.run, lambda _: None)
                     if row["kind"] == "validation"}
        # the first save may still be written at the first validation; it is whole at the second
        if whole is None and (len(validated) > 1 or any(self.run.glob("step-*"))):
            raise self._nothing_whole(faults)
        for step, fault in faults.items():
            aside = step.rename(files.free_name(step))
            say(f"checkpoint {step.name} is damaged ({fault}); it is now {aside.name}, and "
                f"{whole and whole.name} is used")
        for leftover in self.run.glob(".*.partial"):  # of a save that a kill cut short
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

    def _go_back(self, step: int, say: Callable[[str], None]) -> None:
        """Move all that came after `step` into a folder of its own, with a copy of the record. A
        kill in between loses nothing: the record is copied first, the newest step moved first.
        Raises ValueError, and moves nothing, if `step` is not there or damaged."""
        if fault := find_damage(self.run / f"step-{step:06d}"):
            names = ", ".join(folder.name for folder in self.steps()) or "there is none"
            raise ValueError(f"{self.run} has no whole checkpoint of step {step} ({fault}); choose "
                             f"another with --step: {names}")
        later = [folder for folder in reversed(self.steps()) if step_number(folder) > step]
        if not later:
            return
        number = 1 + len([*self.run.glob(f"after-{step:06d}-*")])
        aside = self.run / f"after-{step:06d}-{number}"
        with files.replacing(aside) as partial:
            partial.mkdir()
            for name in (CONFIG, METRICS):
                shutil.copyfile(self.run / name, partial / name)
        for path in filter(Path.exists, (*later, self.run / AVERAGE, self.run / TRACKED)):
            path.rename(aside / path.name)
        for folder in (aside, self.run):
            sync(folder)
        say(f"going back to step {step}: {len(later)} later steps and their record are in {aside}")

    def prune(self, best_step: int | None) -> None:
        """Delete all but the steps to keep; one still being written stays."""
        for folder in self.steps()[:-KEEP]:
            number = step_number(folder)
            kept = number == best_step or self.keep_every and number % self.keep_every == 0
            if self.mesh.rank == 0 and not kept:
                shutil.rmtree(folder)


def _lay_out(tensors: dict[str, tuple[str, tuple[int, ...], int]]
             ) -> tuple[bytes, dict[str, int], int]:
    """Header, offset of every tensor and size of a file of tensors: (dtype, shape, item size)."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    for name in sorted(tensors, key=lambda name: (-tensors[name][2], name)):  # so all are aligned
        kind, shape, width = tensors[name]
        starts[name], begin = end, end
        end += prod(shape) * width
        entries[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + start for name, start in starts.items()}, len(header) + end


def write_rows(path: Path, rows: Rows) -> str | None:
    """Write this rank's rows at their place, and fsync them. Returns the SHA-256 of the file if
    they are all of it; it is computed in a thread of its own while they are written."""
    digest = hashlib.sha256()
    whole = path.stat().st_size == sum(tensor.nbytes for _, tensor in rows)
    with ThreadPoolExecutor(1) as hashing, open(path, "r+b") as file:
        for offset, tensor in rows:
            content = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            if whole:
                hashing.submit(digest.update, content)
            file.seek(offset)
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest() if whole else None


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
    """What training changes: trainable parameters and buffers, but those of quantized weights."""
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False)
              if not p.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items()
            if name not in frozen and not name.endswith((".numbers", ".scale"))}


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


def read_slice(file: Any, name: str, part: TensorSlice) -> Tensor:
    """The rows of `part` of a tensor in a file, or all of a tensor without rows."""
    saved = file.get_slice(name)
    shape = saved.get_shape()
    if not shape:
        return file.get_tensor(name)
    end = part.start + len(part.rows)
    return saved[part.start:end] if len(part.rows) else torch.empty(0, *shape[1:])
