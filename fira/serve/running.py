"""A job in the engine, as the event loop sees it: events come in, leaving cancels."""
from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from fira.infer.request import End, QueueFull, Token
from fira.serve.api import Job
from fira.serve.schema import Refused

KEEPALIVE_SECONDS = 10
Event = tuple[int, "Token | End"]


class Running:
    """Adds a job's choices to the engine. Raises Refused; then nothing of it runs."""

    def __init__(self, engine: Any, job: Job) -> None:
        self.engine = engine
        self.loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.live: dict[int, Any] = {}
        try:
            for index, (ids, params) in enumerate(job.choices):
                self.live[index] = engine.add(ids, params, partial(self._hear, index))
        except QueueFull as error:
            self.cancel()
            raise Refused(429, f"the server is busy: {error}; ask again in a second",
                          code="queue_full", headers={"Retry-After": "1"}) from None
        except ValueError as error:
            self.cancel()
            raise Refused(400, str(error), code="invalid_value") from None

    async def read(self) -> AsyncIterator[Event | None]:
        """Events until every choice has ended; None when there was none for a while."""
        while self.live:
            try:
                event = (self.events.get_nowait() if not self.events.empty() else
                         await asyncio.wait_for(self.events.get(), KEEPALIVE_SECONDS))
            except asyncio.TimeoutError:
                yield None
                continue
            if isinstance(event[1], End):
                del self.live[event[0]]
            yield event

    def cancel(self) -> None:
        """Free the slots of what has not ended."""
        for request in self.live.values():
            self.engine.cancel(request)
        self.live.clear()

    def _hear(self, index: int, event: Token | End) -> None:
        """Called in the engine's thread."""
        self.loop.call_soon_threadsafe(self.events.put_nowait, (index, event))
