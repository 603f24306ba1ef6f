"""The checks that a request passes before the server acts on it: key, host name, size, fields.

Each check raises APIError with one line that names the value, the rule and the remedy.
"""
from __future__ import annotations

import asyncio
import contextlib
import difflib
import hashlib
import hmac
import json
import re
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import Request

from fira.serve.schema import APIError

LOOPBACK = ("localhost", "127.0.0.1", "::1")
OPEN_PATHS = ("/", "/health", "/openapi.json")  # these need no key
MAX_BODY = 4 * 2**20  # bytes, for every model
OTHER_BYTES, OTHER_VALUES = 2**18, 2**13  # what a body may have besides its prompts
MAX_DISCARDED = 16 * MAX_BODY  # bytes of a too large body that are read, so that the client,
# which sends before it listens, receives the error instead of a closed connection
MAX_BODIES = 16 * MAX_BODY  # bytes of all bodies at a time
BODY_SECONDS = 60
UNKNOWN = "none_required"  # pydantic's word for a field that is not declared and not null
MAX_ERRORS = 1000  # wrong fields in one request; more are only counted
_parsing = threading.Lock()  # pydantic holds Python's lock; between two bodies others get it
_LOOPBACK_HOST = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d+)?", re.IGNORECASE)


class Keys:
    """The accepted API keys. Only their digests are kept."""

    def __init__(self, keys: list[str]) -> None:
        self.digests = [_digest(key) for key in keys]

    @classmethod
    def load(cls, path: Path) -> Keys:
        """Read one key per line. Blank lines and lines that begin with # are skipped."""
        keys = []
        for number, line in enumerate(path.read_text("utf-8", "replace").splitlines(), 1):
            key = line.strip()
            if not key or key.startswith("#"):
                continue
            if not key.isascii() or " " in key:
                raise ValueError(f"{path}:{number} is not a key, because it has spaces or letters "
                                 "outside ASCII; write one key per line")
            keys.append(key)
        if not keys:
            raise ValueError(f"{path} has no key; write one key per line")
        return cls(keys)

    def check(self, request: Request) -> None:
        """Raise APIError(401) without a known bearer key; the time does not depend on the key."""
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        digest = _digest(key.strip())
        found = sum([hmac.compare_digest(digest, known) for known in self.digests])
        if scheme.lower() != "bearer" or not found:
            raise APIError(401, "the API key is missing or unknown; send a header Authorization: "
                           "Bearer KEY", code="invalid_api_key",
                           headers={"WWW-Authenticate": "Bearer"})


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()


def check_host(request: Request) -> None:
    """Raise APIError(403) unless the Host header names this machine's loopback address.

    Without this check a web page could reach a server on loopback through a host name of its own
    that resolves to 127.0.0.1 (DNS rebinding).
    """
    host = request.headers.get("host", "localhost")  # every browser sends it
    if not _LOOPBACK_HOST.fullmatch(host):
        raise APIError(403, f"host {host[:60]!r} is not this machine's; use 127.0.0.1, "
                       "or start the server with --keys", code="unknown_host")


def check_origins(origins: Sequence[str]) -> Sequence[str]:
    """`origins`. Raises ValueError for one that no browser would send."""
    for origin in origins:
        if not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s*A-Z]+", origin):
            raise ValueError(f"--cors {origin} is not an origin; give scheme, host and port alone, "
                             "in small letters, such as http://localhost:3000")
    return origins


class Bodies:
    """The bodies that are being received or checked. They take MAX_BODIES bytes at most: beyond,
    the largest that is still being received is given up, so that small requests never are."""

    def __init__(self) -> None:
        self.partial: dict[int, bytearray] = {}
        self.whole = 0  # bytes of those that are checked

    @contextlib.asynccontextmanager
    async def receive(self, request: Request) -> AsyncIterator[bytes]:
        """The JSON body. Raises APIError if it has another type (415), is too large (413), takes
        too long (408) or was given up for others (503)."""
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type != "application/json":
            raise APIError(415, f"content type {content_type[:60]!r} is not application/json; send "
                           "a header Content-Type: application/json")
        try:
            body = await asyncio.wait_for(self._read(request), BODY_SECONDS)
        except asyncio.TimeoutError:
            raise APIError(408, f"the body took longer than {BODY_SECONDS} s; send it faster"
                           ) from None
        self.whole += (size := len(body))
        try:
            yield body
        finally:
            self.whole -= size

    async def _read(self, request: Request) -> bytes:
        body, size = bytearray(), 0
        self.partial[id(body)] = body
        try:
            async for part in request.stream():
                size += len(part)
                if size <= MAX_BODY:
                    body += part
                elif size > MAX_DISCARDED:
                    break
                self._make_room()
                if id(body) not in self.partial:
                    raise APIError(503, f"requests of more than {MAX_BODIES} bytes are arriving; "
                                   "send this one again in a second", code="busy",
                                   headers={"Retry-After": "1"})
            if size > MAX_BODY:
                raise APIError(413, f"the body is larger than {MAX_BODY} bytes; send less")
            return bytes(body)
        finally:  # an error and asyncio's task refer to each other, which keeps this frame for long
            self.partial.pop(id(body), None)
            body.clear()

    def _make_room(self) -> None:
        while self.partial and self.whole + sum(map(len, self.partial.values())) > MAX_BODIES:
            self.partial.pop(max(self.partial, key=lambda key: len(self.partial[key]))).clear()


def parse(schema: type[BaseModel], body: bytes, tokens: int = MAX_BODY,
          token_bytes: int = 1) -> Any:
    """Return the request in `body`. Raises APIError with one line about its first error (400), or,
    before it is parsed, if it is more than prompts of so many `tokens` in all can be (413).

    Values and not bytes take the time: 4 MB of text 6 ms, of numbers 0.4 s, of objects 1 s.
    """
    for size, most, what in ((len(body), OTHER_BYTES + tokens * max(8, 6 * token_bytes), "bytes"),
                             (body.count(b","), OTHER_VALUES + tokens, "values")):
        if size > most:
            raise APIError(413, f"the body has {size} {what}, more than the {most} that prompts "
                           "for this model's window can need; send less")
    try:
        with _parsing:
            return schema.model_validate_json(body)
    except ValidationError as error:
        raise _explain(schema, error) from None


def _explain(schema: type[BaseModel], invalid: ValidationError) -> APIError:
    if invalid.error_count() > MAX_ERRORS:
        return APIError(400, f"the request has {invalid.error_count()} errors; /openapi.json lists "
                        "the fields", code="invalid_value")
    errors = invalid.errors()
    if not errors[0]["loc"]:
        return APIError(400, f"the body is not a JSON object ({errors[0]['msg']}); send one, such "
                        "as {\"model\": ...}", code="invalid_json")
    # a union reports an error per member; the member of the right type, and of these the one that
    # got deepest, is what the caller meant
    error = max(errors, key=lambda error: (not error["type"].endswith("_type"), len(error["loc"])))
    path = _path(error)
    param = ".".join(path)[:60]
    if error["type"] == UNKNOWN:
        return APIError(400, _unknown_field(schema, param, path), param, "unknown_field")
    if error["type"] == "missing":
        return APIError(400, f"{param} is missing; give it", param, "missing_field")
    if most := error.get("ctx", {}).get("max_length"):
        return APIError(400, f"{param} has a length of {len(error['input'])}; at most {most} is "
                        "accepted in one request", param, "invalid_value")
    meaning = schema.model_fields[path[0]].description
    rule = (f"is wrong: {path[0]} must be {meaning}" if meaning else
            re.sub(r"^\w+ should", "must", error["msg"].partition(" after validation")[0]))
    return APIError(400, f"{param}={_shorten(error['input'])} {rule}", param, "invalid_value")


def _unknown_field(schema: type[BaseModel], param: str, path: list[str]) -> str:
    name, top_level = path[-1], len(path) == 1
    near = difflib.get_close_matches(name[:60], schema.model_fields, 1) if top_level else []
    hint = f"did you mean {near[0]}?" if near else "leave it out; /openapi.json lists the fields"
    return f"{_shorten(param)} is not a field of this request; {hint}"


def _path(error: ErrorDetails) -> list[str]:
    """The field names that lead to an error, without the names pydantic gives to union members."""
    first, *rest = error["loc"]
    # the last part of an unknown field is the caller's own word and may look like such a name
    last = [rest.pop()] if rest and error["type"] == UNKNOWN else []
    members = ("str", "int", "constrained-str", "constrained-int", "NamedTool")
    return [str(part) for part in (first, *(
        part for part in rest
        if isinstance(part, int) or not (part in members or "[" in part)), *last)]


def _shorten(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
