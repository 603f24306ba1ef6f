"""`fira serve FILE.gguf`: llama.cpp's own server, in this process, until a signal.

It speaks OpenAI's API as llama.cpp understands it; our page, keys, queue and metrics are not here.
"""
from __future__ import annotations

import signal
import threading
from pathlib import Path

from rich.text import Text

from fira.infer.edge import Edge
from fira.runlog import console
from fira.serve.address import LOOPBACK, listen, url


def serve(file: Path, host: str, port: int, name: str | None, slots: int) -> None:
    """Every slot has the file's whole context. Raises ValueError, one line, if that cannot begin.
    """
    listener = listen(host, port)  # says why not, which llama.cpp does not
    address, port = url(listener, host), listener.getsockname()[1]
    listener.close()
    notes, name = console(), name or file.stem
    if host not in LOOPBACK:
        notes.print(Text(f"Anyone who reaches {address} may use the model.", style="yellow"),
                    soft_wrap=True)
    context = Edge(file).context
    edge = Edge(file, context * slots, slots=slots, host=host, port=port, name=name)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    notes.print(f"serving {name} by llama.cpp: API at {address}/v1", soft_wrap=True)
    ended.wait()
    del edge  # its server ends here
