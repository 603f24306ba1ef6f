"""Who may ask, and how much: keys, host names, body sizes."""
from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
from pathlib import Path

from starlette.requests import Request

from fira.serve.address import LOOPBACK
from fira.serve.schema import Refused

MAX_BODY = 4 * 2**20  # bytes; far above any model's window here
MAX_DISCARDED = 16 * MAX_BODY  # so much of a body too large is read, that the refusal is heard
BODY_SECONDS = 60
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\[\]:]+)(:\d+)?")  # name or address, and the port
OPEN = ("/", "/health", "/openapi.json")  # need no key


class Keys:
    """Accepted keys, as digests."""

    def __init__(self, keys: list[str]) -> None:
        self.digests = [_digest(key) for key in keys]

    @classmethod
    def load(cls, path: Path) -> Keys:
        """One key a line; blank lines and those that begin with # are no keys."""
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            raise ValueError(f"{path} is not UTF-8 text; give a file with one key a line") from None
        keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not keys:
            raise ValueError(f"{path} holds no key; write one a line")
        odd = next((number for number, line in enumerate(lines, 1) if line in keys and (
            not line.isascii() or " " in line.strip())), None)
        if odd:
            raise ValueError(f"{path}:{odd} is no key: it has blanks or letters outside ASCII; "
                             "write one key a line")
        return cls(keys)

    def check(self, request: Request) -> None:
        """Raises Refused(401) without a known bearer key, after equally long for any key."""
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        digest = _digest(key.strip())
        found = sum([hmac.compare_digest(digest, known) for known in self.digests])
        if scheme.lower() != "bearer" or not found:
            raise Refused(401, "the API key is missing or unknown; send a header Authorization: "
                          "Bearer KEY", code="invalid_api_key",
                          headers={"WWW-Authenticate": "Bearer"})


def check_host(request: Request) -> None:
    """Without keys, a server on loopback answers to loopback's names alone.

    Else a web page elsewhere could reach it through a name that it points to 127.0.0.1.
    """
    host = request.headers.get("host")
    if host is None:  # no browser leaves it out
        return
    named = _HOST.fullmatch(host.lower())
    if not named or named[1].strip("[]") not in LOOPBACK:
        raise Refused(403, f"host {host[:60]!r} is not this machine's; use 127.0.0.1, "
                      "or start the server with --keys", code="unknown_host")


async def read_body(request: Request) -> bytes:
    """The JSON body. Raises Refused for another type (415), a large (413) or slow one (408)."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused(415, f"content type {kind[:60]!r} is not application/json; send a header "
                      "Content-Type: application/json")
    try:
        return await asyncio.wait_for(_read(request), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise Refused(408, f"the body took longer than {BODY_SECONDS} s; send it faster") from None


async def _read(request: Request) -> bytes:
    body, size = bytearray(), 0
    async for part in request.stream():
        size += len(part)
        if size <= MAX_BODY:
            body += part
        elif size > MAX_DISCARDED:
            break
    if size > MAX_BODY:
        raise Refused(413, f"the body is larger than {MAX_BODY} bytes; send less")
    return bytes(body)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()
