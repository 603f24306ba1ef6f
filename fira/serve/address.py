"""Where a server listens."""
from __future__ import annotations

import socket

LOOPBACK = ("localhost", "127.0.0.1", "::1")


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. Raises ValueError if the address is not this machine's or is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        why = error.strerror or str(error)
        raise ValueError(f"{host}:{port} cannot be listened at ({why}); give another "
                         "--host or --port") from None
    # connections inherit it; asyncio sets it only on sockets of its own, and without it each small
    # write waits for the client's delayed acknowledgement: 40 ms a response, and tokens in bursts
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def url(listener: socket.socket, host: str) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
