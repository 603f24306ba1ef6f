"""One safetensors file written and read by many ranks: each moves its own rows, at their offset.

The file does not show how the work was divided: it is what one process would write, so any layout
reads what any other wrote, nothing is gathered, and no tensor has to fit on one rank. Needs a
folder that all ranks see. The format: 8 bytes of header length, a JSON header, the tensors.
"""
from __future__ import annotations

import json
import os
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from fira.model.initialize import TensorSlice as Piece

NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
         torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}


class Rows(NamedTuple):
    """Bytes of this rank and where in the file they go."""

    offset: int
    tensor: Tensor


class Plan(NamedTuple):
    """A file about to be written: its header, its size, the rows that this rank brings."""

    header: bytes
    size: int
    rows: list[Rows]


def plan_file(pieces: Iterable[Piece], mine: Iterable[bool], group: Any = None) -> Plan:
    """Lay out a file of all ranks' pieces; of its own a rank writes those marked `mine`.

    Copies the rows to the CPU, so training may go on while they are written.
    """
    pieces, mine = list(pieces), list(mine)
    described = {piece.name: (NAMES[piece.rows.dtype], piece.rows.element_size(), piece.shape)
                 for piece in pieces}
    everyone: list[Any] = [described]
    if group is not None:
        everyone = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, described, group=group)
    tensors = {name: facts for one in everyone for name, facts in one.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    for name in sorted(tensors, key=lambda name: (-tensors[name][1], name)):  # so all are aligned
        kind, width, shape = tensors[name]
        starts[name], begin = end, end
        end += prod(shape) * width
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    rows = [Rows(len(head) + starts[piece.name] + piece.start * _row_bytes(piece),
                 piece.rows.detach().to("cpu", copy=True).contiguous())
            for piece, own in zip(pieces, mine, strict=True) if own]
    return Plan(head, len(head) + end, rows)


def _row_bytes(piece: Piece) -> int:
    return prod(piece.shape[1:]) * piece.rows.element_size()


def create_file(path: Path, plan: Plan) -> None:
    """The file with its header and full size; one rank does this first."""
    with open(path, "wb") as file:
        file.write(plan.header)
        file.truncate(plan.size)


def write_rows(path: Path, plan: Plan) -> None:
    """Put this rank's rows in place and on the disk."""
    with open(path, "r+b") as file:
        for offset, tensor in plan.rows:
            file.seek(offset)
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def read_pieces(path: Path, pieces: Iterable[Piece]) -> None:
    """Fill the rows of `pieces` in place from a file, whoever wrote it."""
    with safe_open(path, framework="pt") as file:
        for piece in pieces:
            piece.rows.copy_(read_rows(file, piece.name, piece.start, len(piece.rows))
                             if piece.rows.dim() else file.get_tensor(piece.name))


def read_rows(file: Any, name: str, start: int, count: int) -> Tensor:
    """`count` rows of a tensor from `start`; nothing else is read."""
    part = file.get_slice(name)
    if count == 0:
        return torch.from_numpy(np.empty((0, *part.get_shape()[1:]), np.float32))
    return part[start:start + count]
