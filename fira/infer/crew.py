"""Threads that run one compiled function together, each as a rank of its own.

Starting a parallel region anew at every token costs more than a small model's layer. These threads
sleep on a lock between tokens and, once woken, meet each other inside the compiled function.
"""
from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any


class Crew:
    """`run(*arguments)` calls function(rank, ranks, *arguments) on all ranks; the caller is rank 0.

    The function must release the GIL and let no rank return before all have arrived at its end.
    """

    def __init__(self, function: Callable[..., None], ranks: int) -> None:
        self.function, self.ranks = function, ranks
        self._job: list[Any] = [()]
        self._wake = [threading.Lock() for _ in range(ranks - 1)]
        for rank, wake in enumerate(self._wake, start=1):
            wake.acquire()
            threading.Thread(target=_serve, args=(function, rank, ranks, wake, self._job),
                             name=f"decode-{rank}", daemon=True).start()
        self._end = weakref.finalize(self, _dismiss, self._wake, self._job)

    def run(self, *arguments: Any) -> None:
        self._job[0] = arguments
        for wake in self._wake:
            wake.release()
        self.function(0, self.ranks, *arguments)


def _serve(function: Callable[..., None], rank: int, ranks: int, wake: Any,
           job: list[Any]) -> None:
    while wake.acquire() and job[0] is not None:
        function(rank, ranks, *job[0])


def _dismiss(wakes: list[Any], job: list[Any]) -> None:
    job[0] = None
    for wake in wakes:
        wake.release()
