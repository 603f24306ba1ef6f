"""The process of `fira serve`: it listens, loads the model, serves, and ends at a signal."""
from __future__ import annotations

import gc
import signal
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.text import Text

from fira.infer.chat import UNTUNED
from fira.infer.decode import open_step
from fira.infer.engine import Engine
from fira.infer.load import load
from fira.model.files import CONFIG, find_model, knows_chat
from fira.runlog import console
from fira.serve.api import ServedModel
from fira.serve.connection import SIGNALS, HTTPServer
from fira.serve.guard import LOOPBACK, Keys, check_origins
from fira.serve.server import Server, Service

CONNECTIONS = 256  # besides those of the requests that may run or wait
SEND_BUFFER = 128 * 1024  # bytes that the system holds for a client that does not read


def serve(run: Path, host: str, port: int, keys: Path | None, name: str | None, slots: int,
          queue: int, pause: int, device: str, precision: str, cors: Sequence[str] = (),
          adapter: Path | None = None, context: int | None = None,
          cache: str | None = None) -> None:
    """Serve until a signal. Raises ValueError or OSError, one line, if the server cannot start."""
    accepted, origins = Keys.load(keys) if keys else None, check_origins(cors)
    folder = find_model(adapter or run)
    place = folder.resolve()
    name = name or (place.parent.name if place.name.startswith("step-") else place.name)
    listener = listen(host, port)
    address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
    notes = console()
    if host not in LOOPBACK and not accepted:
        notes.print(Text(f"Without --keys, anyone who reaches {address} may use the model.",
                         style="yellow"), soft_wrap=True)
    notes.print(f"loading {folder}, listening on {address}", soft_wrap=True)

    def load_service() -> Service:
        model, engine = open_service(run, name, slots, queue, pause, device, precision,
                                     adapter, context, cache)
        notes.print(f"serving {model.name}: chat page at {address}, API at {address}/v1",
                    soft_wrap=True)
        if not model.chat_tuned:
            notes.print(Text(UNTUNED, style="yellow"), soft_wrap=True)
        return model, engine

    run_until_signal(load_service, accepted, host in LOOPBACK, listener,
                     slots + queue + CONNECTIONS, origins)


def listen(host: str, port: int) -> socket.socket:
    """Return a bound socket. Raises ValueError if the address is not this machine's or in use."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"the server cannot listen at {host}:{port} ({reason}); give another "
                         "--host or --port") from None
    # Accepted connections inherit TCP_NODELAY. asyncio sets it only on sockets that it creates;
    # without it each small write waits up to 40 ms for the client's delayed acknowledgement.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    return listener


def run_until_signal(load_service: Callable[[], Service], keys: Keys | None, loopback: bool,
                     listener: socket.socket, connections: int,
                     origins: Sequence[str] = ()) -> None:
    """Run the server. Raises the exception that loading raised."""
    errors: list[Exception] = []

    def failed(error: Exception) -> None:
        errors.append(error)
        process.should_exit = True

    app = Server(load_service, failed, keys, loopback, origins).app()
    process = HTTPServer(app, connections)
    for number in SIGNALS:  # uvicorn raises them again after draining
        signal.signal(number, lambda *_: None)
    process.run(sockets=[listener])
    if errors:
        raise errors[0]


def open_service(run: Path, name: str, slots: int, queue: int, pause: int, device: str,
                 precision: str, adapter: Path | None = None, context: int | None = None,
                 cache: str | None = None) -> Service:
    """Load the model of a run and start an engine for it."""
    model, tokenizer, folder = load(run, device, adapter)
    engine = Engine(model, tokenizer, slots=slots, capacity=context, max_waiting=queue,
                    pause=pause, cache_dtype=getattr(torch, cache) if cache else None)
    engine.decode_step = open_step(model, precision, console().print)
    engine.start()
    gc.collect()
    gc.freeze()  # to look through all that libraries hold stops every thread for 0.15 s
    created = int((folder / CONFIG).stat().st_mtime)
    return ServedModel(name, tokenizer, engine.capacity, model.spec.vocab_size,
                       knows_chat(folder), created, architecture(model), model.spec.d_model,
                       bool(model.think)), engine


def architecture(model: Any) -> dict[str, str | int]:
    """The numbers that the chat page shows of a model."""
    spec = model.spec
    return {"architecture": spec.architecture, "layers": spec.num_layers,
            "num_experts": spec.num_experts, "top_k": min(spec.top_k, spec.num_experts),
            "parameters": sum(weight.numel() for weight in model.parameters())}
