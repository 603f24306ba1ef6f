"""Saving by all ranks in the background: stages that begin when every rank finished the last."""
from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fira.parallel.files import Plan, plan_file
from fira.parallel.layout import Layout
from fira.parallel.mesh import Mesh

Work = list[tuple[Callable[[], None], bool]]  # what to do, and whether only the first rank does it


class Saver:
    """One save at a time: at once on one rank, in a thread with a group of its own on many."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        alone = mesh.size == 1
        self.group = None if alone else dist.new_group(backend="gloo", timeout=mesh.timeout)
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def plan(self, layout: Layout, tensors: dict[str, Tensor]) -> Plan:
        """A file of `tensors`, named as parameters or as parameter/key, from all ranks."""
        pieces = list(layout.pieces(tensors.items()))
        return plan_file(pieces, [layout.writes(piece) for piece in pieces], self.group)

    def start(self, work: Work, refuse: Callable[[str], Exception]) -> None:
        """Do `work` in order; `refuse` makes the error of what went wrong on any rank."""
        if self.group is None:
            self._run(work, refuse)
            self.wait()
            return
        self._thread = threading.Thread(target=self._run, args=(work, refuse), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, work: Work, refuse: Callable[[str], Exception]) -> None:
        try:
            for do, first_only in work:
                words = ""
                if not (first_only and self.mesh.rank):
                    try:
                        do()
                    except OSError as error:
                        words = str(error)
                words = self._first_error(words)
                if words:
                    self._error = refuse(words)
                    return
        except Exception as error:  # a lost rank: raised where the save is waited for
            self._error = error

    def _first_error(self, words: str) -> str:
        """What went wrong on any rank; a barrier as well."""
        if self.group is None:
            return words
        failed = torch.tensor([len(words)])
        dist.all_reduce(failed, group=self.group)
        if not int(failed):
            return ""
        everyone: list[Any] = [None] * self.mesh.size
        dist.all_gather_object(everyone, words, group=self.group)
        return next(one for one in everyone if one)
