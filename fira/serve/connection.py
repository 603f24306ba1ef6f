"""Connections: how many there may be, and how long each may keep the server waiting.

uvicorn's own limit ends only connections that are idle after a response. Here every connection is
looked at once a second, and dropped when its client has owed the same thing for too long: the head
of a request, its body, or the reading of what was sent.
"""
from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import resource
import signal
import socket
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from fira.serve.guard import BODY_SECONDS
from fira.serve.schema import APIError

log = logging.getLogger(__name__)
SIGNALS = (signal.SIGTERM, signal.SIGINT)
DRAIN_SECONDS = 30  # time to finish the requests in progress after a signal
HEAD_SECONDS = 15  # from the connection, or the first byte after a response, to a complete head
KEEP_SECONDS = 75  # of silence after a response. Clients reuse a connection for 5 to 60 s: a server
# that closes it sooner, or just then, loses the request that is on its way
READ_SECONDS = 30  # in which a client must read READ_BYTES of what waits for it, or all of it
READ_BYTES = 32 * 1024
CHECK_SECONDS = 1.0
RESERVED = 64  # descriptors for everything but connections
BUSY = (b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
        b"Connection: close\r\n\r\n" + json.dumps(APIError(
            503, "the server has too many connections; ask again in a second",
            code="too_many_connections").body).encode())


class Connection(H11Protocol):
    """One client. `debt` is what it owes, the first item in how many seconds, since `since`."""

    debt: tuple[Any, ...] | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.check()

    def check(self) -> None:
        if self not in self.connections:
            return  # it has ended
        debt, now = self.find_debt(), self.loop.time()
        if debt != self.debt:
            self.debt, self.since = debt, now
        elif debt and now - self.since > debt[0]:
            self.transport.abort()
        self.loop.call_later(CHECK_SECONDS, self.check)

    def find_debt(self) -> tuple[Any, ...] | None:
        """None while the client waits for the server."""
        if unread := self.transport.get_write_buffer_size():
            return READ_SECONDS, unread // READ_BYTES
        if self.conn.their_state is h11.SEND_BODY:
            return BODY_SECONDS, self.cycle
        kept = self.timeout_keep_alive_task  # uvicorn's, until the next byte
        return (HEAD_SECONDS, self.cycle) if self.is_idle() and not kept else None

    def is_idle(self) -> bool:
        """Whether every request is answered."""
        return self.cycle is None or self.cycle.response_complete

    def handle_events(self) -> None:
        """A request with two lengths is refused: a proxy may have believed the other one."""
        before = self.cycle
        super().handle_events()
        names = {name for name, _ in self.headers or ()}
        if self.cycle is not before and {b"content-length", b"transfer-encoding"} <= names:
            self.send_400_response("give Content-Length or Transfer-Encoding, not both")

    def send_400_response(self, msg: str) -> None:
        """uvicorn calls this when the client's bytes are not HTTP, also during a response."""
        if self.cycle:
            self.cycle.disconnected = True  # its task must not write, too
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.abort()


class HTTPServer(uvicorn.Server):
    """uvicorn with at most `limit` connections, and fewer where files are few.

    The accept loop is ours: asyncio's repeats a failed accept thousands of times, and logs each.
    uvicorn does not configure logging, because that closes the handlers of other packages.
    """

    def __init__(self, app: Any, limit: int) -> None:
        super().__init__(uvicorn.Config(
            app, http=Connection, log_level="error", log_config=None, access_log=False,
            lifespan="on", ws="none", server_header=False,
            timeout_keep_alive=KEEP_SECONDS, timeout_graceful_shutdown=DRAIN_SECONDS + 1))
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.limit = max(1, min(limit, files - RESERVED))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup([])
        self.accepting = [asyncio.create_task(self.accept(found)) for found in sockets or ()]

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer what has been asked; after DRAIN_SECONDS drop the connections that are left."""
        for task in self.accepting:
            task.cancel()
        asyncio.get_running_loop().call_later(DRAIN_SECONDS, self.drop)
        await super().shutdown(sockets)

    def drop(self) -> None:
        for found in [*self.server_state.connections]:
            found.transport.abort()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal lets the server finish; the next one ends the process at once."""
        super().handle_exit(sig, frame)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    async def accept(self, listener: socket.socket) -> None:
        loop, told = asyncio.get_running_loop(), False
        listener.setblocking(False)
        while True:
            try:
                client, _ = await loop.sock_accept(listener)
                if len(self.server_state.connections) < self.limit or self.make_room():
                    await loop.connect_accepted_socket(lambda: Connection(
                        self.config, self.server_state, self.lifespan.state), client)
                    continue
                with client, contextlib.suppress(OSError):
                    client.send(BUSY)
                    client.shutdown(socket.SHUT_WR)
                    client.recv(2**16)  # what is not read when it closes would reset it
            except OSError as error:  # most often, no descriptor is left
                if not told:
                    log.error("connections cannot be accepted: %s", error)
                told = True
                await asyncio.sleep(CHECK_SECONDS)

    def make_room(self) -> bool:
        """Drop the connection that has asked nothing for longest, if there is one."""
        idle = [found for found in self.server_state.connections
                if isinstance(found, Connection) and found.is_idle()]
        if idle:
            oldest = min(idle, key=lambda found: found.since)
            oldest.transport.abort()
            self.server_state.connections.discard(oldest)
        return bool(idle)
