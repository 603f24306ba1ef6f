"""Clients that send nothing, half of something, or read nothing take nothing from the others."""
from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import json
import socket
import time
import tracemalloc

import pytest
from starlette.requests import ClientDisconnect

from fira.serve import connection
from fira.serve.connection import HTTPServer
from fira.serve.guard import Bodies
from tests.serve.test_server import until

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def body(**changes):
    sent = json.dumps({"prompt": "The state", "max_tokens": 17, **changes}).encode()
    return b"Content-Length: %d\r\n\r\n" % len(sent) + sent


LARGE = body(prompt=["x"] * 16, n=4, max_tokens=150, logprobs=20)  # 10 MB are the answer
STREAM = body(max_tokens=150, stream=True)


@pytest.fixture
def connect(running):
    """Open a connection that sends these bytes."""
    with contextlib.ExitStack() as opened:
        def begin(sent=b"", receive=2**16):
            client = opened.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
            client.settimeout(20)
            client.connect(running.socket.getsockname())
            client.sendall(sent)
            return client
        yield begin


def read(client):
    """What the server sends until it closes the connection."""
    return b"".join(iter(lambda: client.recv(2**16), b""))


@pytest.fixture
def impatient(monkeypatch):
    for name in ("HEAD_SECONDS", "BODY_SECONDS", "READ_SECONDS"):
        monkeypatch.setattr(connection, name, 0.2)
    monkeypatch.setattr(connection, "CHECK_SECONDS", 0.05)


def test_the_body_of_a_client_that_leaves_is_freed_at_once():
    class Leaving:
        headers = {"content-type": "application/json"}

        async def stream(self):
            for _ in range(64):
                yield bytes(2**14)
            raise ClientDisconnect

    async def leave():
        for _ in range(8):
            with contextlib.suppress(ClientDisconnect):
                async with Bodies().receive(Leaving()):
                    pass

    gc.disable()  # it would free what refers to itself, some time later
    tracemalloc.start()
    try:
        asyncio.run(leave())
        assert tracemalloc.get_traced_memory()[0] < 2**20  # of 8 MB
    finally:
        tracemalloc.stop()
        gc.enable()


def test_bodies_that_stall_take_little_memory_and_nothing_from_others(running, connect):
    bodies, sent = running.server.bodies, b"Content-Length: 4000000\r\n\r\n" + bytes(3_900_000)
    whole = HEAD + body()
    small = connect(whole[:-1])
    until(lambda: bodies.partial)
    first = connect(HEAD + sent)
    until(lambda: len(bodies.partial) == 2)
    number = list(bodies.partial)[1]
    for _ in range(20):  # 78 MB
        connect(HEAD + sent)
    until(lambda: number not in bodies.partial)
    assert running.http.get("/v1/models").status_code == 200
    assert connect(HEAD + body()).recv(2**16).startswith(b"HTTP/1.1 200")
    assert sum(map(len, bodies.partial.values())) <= 2**26 and not bodies.whole
    first.sendall(b" ")
    assert first.recv(2**16).startswith(b"HTTP/1.1 503")
    small.sendall(whole[-1:])
    assert small.recv(2**16).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("sent", [
    b"", b"GET /health HT", HEAD, HEAD + LARGE[:-1], HEAD + b"Transfer-Encoding: chunked\r\n\r\n4"])
def test_a_client_that_does_not_finish_its_request_is_dropped(impatient, connect, sent):
    assert read(connect(sent)) == b""


def test_a_client_that_does_not_read_is_dropped(impatient, running, connect, engine):
    connections = running.process.server_state.connections
    others = len(connections)
    slow = connect(HEAD + LARGE, receive=4096)
    until(lambda: len(engine.asked) == 64 and not engine.running)
    until(lambda: len(connections) == others)
    assert len(read(slow)) < 2**20


def test_a_connection_is_kept_after_an_answer_but_not_with_half_of_a_request(impatient, connect):
    ask, client = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", connect()
    for _ in range(2):
        client.sendall(ask)
        answer = b""
        while not answer.endswith(b"}"):
            answer += client.recv(2**16)
        time.sleep(0.6)
    client.sendall(ask[:9])
    assert read(client) == b""


def test_a_client_that_waits_for_its_answer_is_not_dropped(impatient, connect, engine):
    engine.pause = 0.05
    client = connect(HEAD + body())  # 0.85 s
    assert client.recv(2**16).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("sent", [
    HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n0\r\n\r\nGET /health HTTP/1.1",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\nnothing\r\n", HEAD + b"Content-Length: -1\r\n\r\n",
    HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", b"\x16\x03\x01\r\n\r\n"])
def test_a_request_whose_end_is_unclear_is_refused_and_its_connection_closed(
        connect, engine, sent, capfd):
    assert read(connect(sent)).startswith(b"HTTP/1.1 400")
    assert not engine.asked and not capfd.readouterr().err


def test_silent_connections_make_room_for_others(running, connect):
    silent = [connect() for _ in range(2 * running.process.limit)]
    # a kept connection of this client, as old, is dropped with the first silent one
    assert read(silent[0]) == b"" and running.http.get("/health").status_code == 200
    assert len(running.process.server_state.connections) <= running.process.limit


def test_beyond_the_limit_a_client_is_told_to_come_back(running, connect, engine):
    engine.pause, running.process.limit = 0.05, 3
    for _ in range(3):
        connect(HEAD + STREAM)
    until(lambda: len(engine.running) == 3)
    for _ in range(5):
        answer = connect(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n").recv(2**16)
        assert answer.startswith(b"HTTP/1.1 503") and b"too_many_connections" in answer


def test_an_accept_that_fails_is_logged_once_and_not_repeated_at_once(caplog):
    class Full(socket.socket):
        tried = 0

        def accept(self):
            self.tried += 1
            raise OSError(errno.EMFILE, "Too many open files")

    with Full() as listener, pytest.raises(asyncio.TimeoutError):
        asyncio.run(asyncio.wait_for(HTTPServer(None, 5).accept(listener), 1.5))
    assert listener.tried == 2 and caplog.text.count("Too many open files") == 1


@pytest.mark.parametrize("sent", [b"", HEAD, HEAD + LARGE[:-1], HEAD + LARGE, HEAD + STREAM])
def test_a_signal_ends_the_server_in_time_whatever_a_client_does(
        monkeypatch, running, connect, engine, sent, capfd):
    monkeypatch.setattr(connection, "DRAIN_SECONDS", 0.5)
    engine.pause = 0.0 if sent.endswith(LARGE) else 0.05
    connect(sent, receive=4096)
    time.sleep(0.3)
    running.stop()  # which waits for 10 seconds at most
    assert not capfd.readouterr().err
