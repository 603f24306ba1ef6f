"""One safetensors file that many ranks write and read: each its own rows, at their offset.

The file is byte for byte what one process would write, so any layout reads what any other wrote.
Nothing is gathered, and no tensor has to fit on one rank. All ranks must see the same folder. The
format: 8 bytes of header length, a JSON header, the tensors.
"""
from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fira.model.initialize import TensorSlice
from fira.parallel.layout import Layout
from fira.parallel.mesh import Mesh

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
          torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}
Rows = list[tuple[int, Tensor]]  # rows to write, each at an offset in the file


class Writer:
    """Writes the files of many ranks, one save at a time, in a thread with its own process group,
    so that training continues."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.group = dist.new_group(backend="gloo", timeout=mesh.timeout)
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def start(self, layout: Layout, folder: Path, files: dict[str, dict[str, Tensor]],
              begin: Callable[[], None], finish: Callable[[], None],
              refuse: Callable[[str], Exception]) -> None:
        """Write `files` (name -> tensors, named as parameters or as parameter/key) into `folder`.

        The first rank calls `begin` before this and `finish` after it; each of the three starts
        when every rank has finished the one before. If a rank fails, `refuse` makes the error that
        `wait` raises on all. This rank's rows are copied to the CPU before this returns, so that
        training may change them.
        """
        contents = {folder / name: self._collect(layout, tensors)
                    for name, tensors in files.items()}

        def create() -> None:
            if self.mesh.rank == 0:
                begin()
                for path, (header, size, _) in contents.items():
                    with open(path, "wb") as file:
                        file.write(header)
                        file.truncate(size)

        def write() -> None:
            for path, (_, _, rows) in contents.items():
                write_rows(path, rows)

        tasks = create, write, finish if self.mesh.rank == 0 else lambda: None
        self._writing = self._thread.submit(self._run, tasks, refuse)

    def wait(self) -> None:
        """Wait until everything is written. Raises what went wrong."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _run(self, tasks: Sequence[Callable[[], None]], refuse: Callable[[str], Exception]) -> None:
        for task in tasks:
            fault = ""
            try:
                task()
            except OSError as error:
                fault = str(error)
            faults = self.mesh.gather(fault, self.group)  # also a barrier
            if found := [text for text in faults if text]:
                raise refuse(found[0])

    def _collect(self, layout: Layout, tensors: dict[str, Tensor]) -> tuple[bytes, int, Rows]:
        """Header and size of a file of `tensors`, and copies of this rank's rows on the CPU."""
        parts = list(layout.slices(tensors.items()))
        described = self.mesh.gather({part.name: (DTYPES[part.rows.dtype], part.shape,
                                                  part.rows.element_size())
                                      for part in parts}, self.group)
        header, starts, size = _lay_out({name: facts for one in described
                                         for name, facts in one.items()})
        rows = [(starts[part.name] + part.start * prod(part.shape[1:]) * part.rows.element_size(),
                 part.rows.detach().to("cpu", copy=True).contiguous())
                for part in parts if layout.writes(part)]
        return header, size, rows


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


def write_rows(path: Path, rows: Rows) -> None:
    """Write this rank's rows at their place, and fsync them."""
    with open(path, "r+b") as file:
        for offset, tensor in rows:
            file.seek(offset)
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def read_slice(file: Any, name: str, part: TensorSlice) -> Tensor:
    """The rows of `part` of a tensor in a file, or all of a tensor without rows."""
    saved = file.get_slice(name)
    shape = saved.get_shape()
    if not shape:
        return file.get_tensor(name)
    end = part.start + len(part.rows)
    return saved[part.start:end] if len(part.rows) else torch.empty(0, *shape[1:])
