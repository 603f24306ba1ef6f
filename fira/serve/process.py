"""`fira serve RUN`: the process. It listens at once, loads the model, serves, drains at SIGTERM."""
from __future__ import annotations

import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn
from rich.text import Text

from fira.infer.chat import BASE, knows_chat
from fira.infer.decode import open_step
from fira.infer.load import load
from fira.model.files import WEIGHTS, find_model
from fira.model.generate import window_length
from fira.runlog import console
from fira.serve.address import LOOPBACK, listen, url
from fira.serve.api import Served
from fira.serve.guard import Keys
from fira.serve.server import Server, Service

DRAIN_SECONDS = 30  # for answers under way when the process is told to end


def serve(run: Path, host: str, port: int, keys: Path | None, name: str | None, slots: int,
          queue: int, device: str, precision: str) -> None:
    """Serve until a signal. Raises ValueError or OSError, one line, if that cannot begin."""
    accepted = Keys.load(keys) if keys else None
    folder = find_model(run)
    listener = listen(host, port)
    address = url(listener, host)
    notes = console()
    if host not in LOOPBACK and not accepted:
        notes.print(Text(f"Anyone who reaches {address} may use the model: there are no --keys.",
                         style="yellow"), soft_wrap=True)
    notes.print(f"loading {folder}, listening at {address}", soft_wrap=True)

    def load_service() -> Service:
        service = open_service(run, name or _name(run), slots, queue, device,
                               precision)
        notes.print(f"serving {service.served.name}: chat page at {address}, API at {address}/v1",
                    soft_wrap=True)
        if not service.served.tuned:
            notes.print(Text(BASE, style="yellow"), soft_wrap=True)
        return service

    run_until_signal(load_service, accepted, host in LOOPBACK, listener)


def run_until_signal(load_service: Callable[[], Service], keys: Keys | None, loopback: bool,
                     listener: socket.socket) -> None:
    """Run the server; raises what loading raised."""
    faults: list[Exception] = []

    def failed(error: Exception) -> None:
        faults.append(error)
        process.should_exit = True

    app = Server(load_service, keys, loopback, failed).app()
    process = uvicorn.Server(uvicorn.Config(
        app, log_level="warning", access_log=False, lifespan="on", server_header=False,
        timeout_graceful_shutdown=DRAIN_SECONDS))
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises them again once it has drained
        signal.signal(number, lambda *_: None)
    process.run(sockets=[listener])
    if faults:
        raise faults[0]


def open_service(run: Path, name: str, slots: int, queue: int, device: str,
                 precision: str) -> Service:
    """The model of a run in a started engine."""
    from fira.infer.engine import Engine

    loaded = load(run, device)
    engine = Engine(loaded.model, loaded.tokenizer, slots=slots, max_waiting=queue)
    fused = open_step(loaded.model, precision, console().print)
    if fused is not None:
        engine.decode_step = fused.decode
    engine.start()
    served = Served(name, loaded.tokenizer, window_length(loaded.model),
                    loaded.model.spec.vocab_size, knows_chat(loaded.folder),
                    int((loaded.folder / WEIGHTS).stat().st_mtime), facts(loaded.model))
    return Service(served, engine)


def facts(model: Any) -> dict[str, Any]:
    """What the page shows of a model."""
    spec = model.spec
    return {"fira": {"architecture": spec.architecture, "layers": spec.num_layers,
                     "num_experts": spec.num_experts, "top_k": min(spec.top_k, spec.num_experts),
                     "parameters": sum(weight.numel() for weight in model.parameters())}}


def _name(run: Path) -> str:
    """A run is called after its folder; a step folder after the run it belongs to."""
    folder = run.resolve()
    return folder.parent.name if folder.name.startswith("step-") else folder.name
