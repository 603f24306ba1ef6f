"""One safetensors file written and read by many ranks: each moves its own rows, at their offset.

The file does not show how the work was divided: it is what one process would write, so any layout
reads what any other wrote, nothing is gathered, and no tensor has to fit on one rank. Needs a
folder that all ranks see. The format: 8 bytes of header length, a JSON header, the tensors.
"""
from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from fira.model.initialize import TensorSlice
from fira.parallel.layout import Layout
from fira.parallel.mesh import Mesh

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
          torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}
Tasks = list[tuple[Callable[[], None], bool]]  # what to do, and whether only the first rank does it


class Content(NamedTuple):
    """A file about to be written: header, size, and this rank's rows with their offsets."""

    header: bytes
    size: int
    rows: list[tuple[int, Tensor]]


class Writer:
    """Writes files of all ranks, one save at a time: on many ranks in a thread, with a process
    group of its own, so that training goes on."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.group = (dist.new_group(backend="gloo", timeout=mesh.timeout) if mesh.size > 1
                      else None)
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def collect(self, layout: Layout, tensors: dict[str, Tensor]) -> Content:
        """The content of a file of `tensors`, named as parameters or as parameter/key.

        Copies this rank's rows to the CPU, so that training may change them while they are written.
        """
        parts = list(layout.slices(tensors.items()))
        described: Any = {part.name: (DTYPES[part.rows.dtype], part.rows.element_size(), part.shape)
                          for part in parts}
        everyone = [described]
        if self.group is not None:
            everyone = [None] * self.mesh.size
            dist.all_gather_object(everyone, described, group=self.group)
        header, starts, size = _layout_file({name: facts for one in everyone
                                             for name, facts in one.items()})
        rows = [(starts[part.name] + part.start * prod(part.shape[1:]) * part.rows.element_size(),
                 part.rows.detach().to("cpu", copy=True).contiguous())
                for part in parts if layout.writes(part)]
        return Content(header, size, rows)

    def start(self, tasks: Tasks, refuse: Callable[[str], Exception]) -> None:
        """Do `tasks` in order, each when every rank has finished the one before; `refuse` makes the
        error of what failed on any rank, which `wait` raises."""
        if self.group is None:
            self._run(tasks, refuse)
            self.wait()
            return
        self._thread = threading.Thread(target=self._run, args=(tasks, refuse), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the tasks of `start`. Raises what went wrong."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, tasks: Tasks, refuse: Callable[[str], Exception]) -> None:
        try:
            for do, first_only in tasks:
                text = ""
                if not (first_only and self.mesh.rank):
                    try:
                        do()
                    except OSError as error:
                        text = str(error)
                if text := self._first_error(text):
                    self._error = refuse(text)
                    return
        except Exception as error:  # such as a lost rank: `wait` raises it
            self._error = error

    def _first_error(self, text: str) -> str:
        """What went wrong on any rank, or nothing; also a barrier."""
        if self.group is None:
            return text
        everyone: list[Any] = [None] * self.mesh.size
        dist.all_gather_object(everyone, text, group=self.group)
        return next((one for one in everyone if one), "")


def _layout_file(tensors: dict[str, tuple[str, int, tuple[int, ...]]]
                 ) -> tuple[bytes, dict[str, int], int]:
    """Header, offset of every tensor and size of a file of tensors: (dtype, item size, shape)."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    for name in sorted(tensors, key=lambda name: (-tensors[name][1], name)):  # so all are aligned
        kind, width, shape = tensors[name]
        starts[name], begin = end, end
        end += prod(shape) * width
        entries[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + start for name, start in starts.items()}, len(header) + end


def create_file(path: Path, content: Content) -> None:
    """Write the header and give the file its full size; one rank does this first."""
    with open(path, "wb") as file:
        file.write(content.header)
        file.truncate(content.size)


def write_rows(path: Path, content: Content) -> None:
    """Write this rank's rows at their place, and fsync them."""
    with open(path, "r+b") as file:
        for offset, tensor in content.rows:
            file.seek(offset)
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def read_slices(path: Path, parts: Iterable[TensorSlice]) -> None:
    """Fill the rows of `parts` in place from a file, whichever layout wrote it."""
    with safe_open(path, framework="pt") as file:
        for part in parts:
            part.rows.copy_(read_rows(file, part.name, part.start, len(part.rows))
                            if part.rows.dim() else file.get_tensor(part.name))


def read_rows(file: Any, name: str, start: int, count: int) -> Tensor:
    """`count` rows of a tensor from row `start`; nothing else is read."""
    part = file.get_slice(name)
    if count == 0:
        return torch.from_numpy(np.empty((0, *part.get_shape()[1:]), np.float32))
    return part[start:start + count]
