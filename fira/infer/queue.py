"""Who is served when: first come, first served, in a bounded queue. Plain values, no torch."""
from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from fira.infer.request import Listener, QueueFull, SamplingParams


@dataclass
class Request:
    """One prompt to continue; `cancelled` is set by whoever no longer wants it."""

    id: int
    prompt: list[int]
    params: SamplingParams
    listener: Listener
    cancelled: bool = False


class Queue:
    """At most `limit` waiting requests, in the order in which they came."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.waiting: deque[Request] = deque()

    def __len__(self) -> int:
        return len(self.waiting)

    def push(self, request: Request) -> None:
        """Raises QueueFull."""
        if len(self.waiting) >= self.limit:
            raise QueueFull(f"{len(self.waiting)} requests wait already, as many as may; "
                            "try again later")
        self.waiting.append(request)

    def next_batch(self, free: int) -> list[Request]:
        """Take the oldest requests, as many as there are free slots."""
        return [self.waiting.popleft() for _ in range(min(free, len(self.waiting)))]

    def take_cancelled(self) -> list[Request]:
        cancelled = [request for request in self.waiting if request.cancelled]
        if cancelled:
            self.waiting = deque(one for one in self.waiting if not one.cancelled)
        return cancelled


def share(budget: int, needs: Sequence[int]) -> list[int]:
    """Split a step's prompt tokens among prompts, oldest first in `needs`.

    The oldest gets half, so that it always moves on; the rest goes to the shortest first, so that
    a short prompt does not wait for a long one.
    """
    if not needs:
        return []
    given = [0] * len(needs)
    given[0] = min(needs[0], (budget + 1) // 2)
    left = budget - given[0]
    for index in sorted(range(len(needs)), key=lambda index: needs[index]):
        more = min(left, needs[index] - given[index])
        given[index] += more
        left -= more
    return given
