"""`fira serve` as a process: start, restart after a kill, end by a signal, errors at the start."""
from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import torch

from fira.serve.process import listen, open_service
from tests.serve.test_connection import HEAD

ROOT = Path(__file__).resolve().parents[2]
TEXT = {"prompt": "The state", "max_tokens": 40, "ignore_eos": True}


class Process:
    """`fira serve RUN` on a port of its own; ready when made."""

    def __init__(self, run):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20)
        self.child = subprocess.Popen(
            [sys.executable, "-m", "fira", "serve", str(run), "--port", port],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        while not self.ready():
            assert self.child.poll() is None, self.child.stderr.read()
            time.sleep(0.1)

    def ready(self):
        with contextlib.suppress(httpx.TransportError):
            return self.http.get("/health").status_code == 200


@pytest.fixture
def serve(trained_run):
    started = []
    yield lambda: started.append(Process(trained_run)) or started[-1]
    for process in started:
        process.child.kill()
        process.child.communicate()
        process.http.close()


def test_it_comes_back_after_a_kill_and_ends_well_at_sigterm(serve):
    greedy = {**TEXT, "temperature": 0, "max_tokens": 9}
    first = serve()
    said = first.http.post("/v1/completions", json=greedy)
    assert first.http.get("/v1/models").json()["data"][0]["chat_tuned"] is False
    first.child.send_signal(signal.SIGKILL)
    assert first.child.wait(10) == -signal.SIGKILL
    second = serve()
    again = second.http.post("/v1/completions", json=greedy)
    assert again.json()["choices"] == said.json()["choices"]
    body = {**TEXT, "stream": True, "max_tokens": 20}
    with second.http.stream("POST", "/v1/completions", json=body) as stream:
        parts = stream.iter_bytes()
        next(parts)
        second.child.send_signal(signal.SIGTERM)
        assert b"".join(parts).endswith(b"data: [DONE]\n\n")
    assert second.child.wait(10) == 0
    assert "Traceback" not in second.child.stderr.read()


def test_a_second_signal_ends_it_at_once(serve):
    process = serve()
    with socket.create_connection(("127.0.0.1", process.http.base_url.port)) as client:
        client.sendall(HEAD + b"Content-Length: 9\r\n\r\n{")
        time.sleep(0.5)
        process.child.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.child.wait(1)
        process.child.send_signal(signal.SIGINT)
        assert process.child.wait(10) == -signal.SIGINT


def test_slots_have_the_context_and_the_precision_that_are_asked_for(trained_run, refused):
    model, engine = open_service(trained_run, "run", 2, 4, 100, "cpu", "float32", context=16,
                                 cache="float16")
    engine.close()
    assert gc.get_freeze_count() > 10_000  # libraries' objects, which no collection looks through
    gc.unfreeze()
    assert model.window == engine.capacity == engine.cache.keys.shape[3] == 16
    assert engine.cache.values.dtype == torch.float16
    assert "capacity=1000000 must be at least 1 and at most the model's context" in refused(
        "serve", trained_run, "--context", 1000000, "--port", 0)


def test_an_address_that_cannot_be_used_is_one_line(trained_run, refused):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert "give another --host or --port" in refused("serve", trained_run, "--port", port)
    assert "give another" in refused("serve", trained_run, "--host", "203.0.113.1")


def test_small_writes_do_not_wait_for_acknowledgements():
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
