"""The HTTP application: routes, event streams, errors. It runs in one event loop."""
from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import itertools
import re
import threading
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from fira import __version__
from fira.infer.request import End, QueueFull
from fira.serve import api, openapi
from fira.serve.guard import OPEN_PATHS, Bodies, Keys, check_host, parse
from fira.serve.metrics import Metrics
from fira.serve.response import (
    KEEPALIVE,
    EmbeddingBuilder,
    Event,
    ItemResponseBuilder,
    ResponseBuilder,
)
from fira.serve.schema import MAX_CHOICES, APIError, EmbeddingRequest

PAGE = Path(__file__).with_name("page.html")
STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
KEEPALIVE_SECONDS = 10  # proxies close connections that are silent for longer, often for 60 s
REQUEST_ID = "x-request-id"
# The status of an answer that is cut off, by the engine's reason; the grammar is the client's.
FAILURES = {"grammar": 400, "error": 500, "cancelled": 503}
Endpoint = Callable[[Request], Awaitable[Response]]
Service = tuple[api.ServedModel, Any]  # the description of a loaded model, and its started engine


class Server:
    """The application's state. The server listens while `load` is still loading the model."""

    def __init__(self, load: Callable[[], Service], failed: Callable[[Exception], None],
                 keys: Keys | None = None, loopback: bool = False,
                 origins: Sequence[str] = ()) -> None:
        """`failed` is called with the exception if `load` raises one. `loopback`: the server
        listens on a loopback address, so that only programs on this machine may use it. Web pages
        of the `origins` may call it."""
        self.load, self.failed, self.keys, self.loopback = load, failed, keys, loopback
        self.origins, self.bodies = origins, Bodies()
        self.service: Service | None = None
        self.metrics = Metrics(lambda: self.service and self.service[1])

    def app(self) -> Starlette:
        html, description = PAGE.read_text(encoding="utf-8"), openapi.describe()
        headers = page_headers(html)
        pages: dict[str, Callable[[], Response]] = {
            "/": lambda: HTMLResponse(html, headers=headers),
            "/metrics": lambda: Response(generate_latest(self.metrics.registry),
                                         media_type=CONTENT_TYPE_LATEST),
            "/version": lambda: JSONResponse({"version": __version__}),
            "/tokenizer_info": lambda: JSONResponse(api.describe_tokenizer(self.ready()[0])),
            "/openapi.json": lambda: JSONResponse(description)}
        routes = [Route(path, self.guarded(path, partial(self.show, page)))
                  for path, page in pages.items()]
        for path, operation in api.OPERATIONS.items():
            endpoint = self.guarded(path, partial(self.call, operation))
            routes.append(Route(path, endpoint, methods=["POST" if operation.request else "GET"]))
        cors = Middleware(CORSMiddleware, allow_origins=self.origins, allow_headers=["*"],
                          allow_methods=["GET", "POST"], expose_headers=["retry-after", REQUEST_ID])
        return Starlette(routes=routes, lifespan=self.lifespan,
                         middleware=[cors] if self.origins else [], exception_handlers={
                             HTTPException: _http_error, Exception: _internal_error})

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        threading.Thread(target=self._load, args=[asyncio.get_running_loop()],
                         daemon=True).start()  # no end waits for it
        yield
        if self.service:
            await asyncio.to_thread(self.service[1].close)

    def _load(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            service = self.load()
            self.outbox = Outbox(service[1], loop)
            self.service = service
        except Exception as error:
            self.failed(error)

    def guarded(self, path: str, endpoint: Endpoint) -> Endpoint:
        """Wrap an endpoint: check key and host, turn APIError into a response, count it."""
        async def respond(request: Request) -> Response:
            request.state.start = time.monotonic()
            try:
                if path not in OPEN_PATHS and self.keys:
                    self.keys.check(request)
                if self.loopback and not self.keys:
                    check_host(request)
                response = await endpoint(request)
            except APIError as error:
                response = _error_response(error)
            except ClientDisconnect:
                response = Response(status_code=499)  # nginx's number; no client receives it
            self.metrics.requests.labels(path, response.status_code).inc()
            if not isinstance(response, EventStream):
                self.metrics.seconds.labels(path).observe(_elapsed(request))
            return _with_id(request, response)
        return respond

    def ready(self) -> Service:
        if self.service is None:
            raise APIError(503, "the model is loading; ask again in a few seconds",
                           code="loading", headers={"Retry-After": "2"})
        return self.service

    async def show(self, page: Callable[[], Response], request: Request) -> Response:
        return page()

    async def call(self, operation: api.Operation, request: Request) -> Response:
        """Run an operation on the request's body, if it has one, and on the model."""
        model, _ = self.ready()
        if operation.request:
            result = await self.prepare(operation, request, model)
        else:
            api.check_model(request.path_params.get("model"), model)
            result = operation.function(model)
        if isinstance(result, api.Generation):
            if isinstance(result.request, EmbeddingRequest):
                return await self.generate(request, EmbeddingBuilder(result, model),
                                           Events(self.outbox, result, lambda: None))
            events = Events(self.outbox, result, lambda: self.metrics.first_token.observe(
                _elapsed(request)))
            builder = ItemResponseBuilder if result.asked else ResponseBuilder
            return await self.generate(request, builder(result, model), events)
        return JSONResponse(result)

    async def prepare(self, operation: api.Operation, request: Request, model: api.ServedModel
                      ) -> Any:
        """The result for the request's body, which is freed before a generation begins."""
        async with self.bodies.receive(request) as body:
            return await asyncio.to_thread(prepare, operation, body, model)

    async def generate(self, request: Request, builder: Any, events: Events) -> Response:
        """Raises ClientDisconnect if the client leaves before the response is complete."""
        if builder.stream:
            return EventStream(self.stream(request, builder, events), events)
        watching = asyncio.create_task(events.watch(request))
        try:
            async for event in events.read():
                if event:
                    builder.add(*event)
            return Response(builder.body(), media_type="application/json")
        finally:
            watching.cancel()
            events.cancel()

    async def stream(self, request: Request, builder: ResponseBuilder,
                     events: Events) -> AsyncIterator[bytes]:
        """The chunks of a response, those that are there in one piece. An error after the first
        chunk becomes the last chunk."""
        if begun := b"".join(builder.first_chunks()):
            yield begun
        chunks: list[bytes] = []
        try:
            async for event in events.read():
                chunks += builder.chunks(*event) if event else (KEEPALIVE,)
                if chunks and events.queue.empty():
                    yield b"".join(chunks)
                    chunks.clear()
            chunks += builder.last_chunks()
        except APIError as error:
            chunks.append(builder.failed(error))
        yield b"".join(chunks)
        self.metrics.seconds.labels(request.scope["path"]).observe(_elapsed(request))


def prepare(operation: api.Operation, body: bytes, model: api.ServedModel) -> Any:
    """An operation's result for a body. It may take long, so it runs outside of the event loop."""
    assert operation.request
    request: Any = parse(operation.request, body, MAX_CHOICES * model.window, model.longest_token)
    api.check_model(request.model, model)
    return operation.function(request, model)


class Outbox:
    """Events on their way from the engine's thread, which calls `put` and `_wake`, into the event
    loop. It is woken once for those of a step, which it sends while the next is computed."""

    def __init__(self, engine: Any, loop: asyncio.AbstractEventLoop) -> None:
        self.engine, self.loop, self.waking = engine, loop, False
        self.events: deque[tuple[asyncio.Queue[Any], int, Event]] = deque()
        engine.after_tokens = self._wake

    def put(self, queue: asyncio.Queue[Any], index: int, event: Event) -> None:
        self.events.append((queue, index, event))

    def _wake(self) -> None:
        if self.events and not self.waking:
            self.waking = True
            self.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self.waking = False
        while self.events:
            queue, *event = self.events.popleft()
            queue.put_nowait(tuple(event))


class Events:
    """Adds a generation's choices to the engine; its events arrive in the event loop.

    `started` is called at the first event. Raises APIError if the engine does not accept one of
    the choices; then none is generated.
    """

    def __init__(self, outbox: Outbox, generation: api.Generation,
                 started: Callable[[], None]) -> None:
        self.engine, self.outbox, self.started = outbox.engine, outbox, started
        self.queue = asyncio.Queue[tuple[int, Event] | None]()
        self.running: dict[int, Any] = {}  # choice index -> the engine's request id
        self.left = iter(enumerate(generation.choices))
        self._add(MAX_CHOICES)  # only the texts to embed may be more

    def _add(self, most: int) -> None:
        try:
            for index, (ids, params) in itertools.islice(self.left, most):
                told = partial(self.outbox.put, self.queue, index)
                self.running[index] = self.engine.add(ids, params, told)
        except QueueFull as error:
            self.cancel()
            raise APIError(429, f"the server is busy: {error}; ask again in a second",
                           code="queue_full", headers={"Retry-After": "1"}) from None
        except ValueError as error:
            self.cancel()
            raise APIError(400, str(error), code="invalid_value") from None

    async def read(self) -> AsyncIterator[tuple[int, Event] | None]:
        """Events until every choice has ended; None after KEEPALIVE_SECONDS without one. Raises
        APIError if the engine failed or was closed."""
        waiting = True
        while self.running:
            try:
                found = (self.queue.get_nowait() if not self.queue.empty() else
                         await asyncio.wait_for(self.queue.get(), KEEPALIVE_SECONDS))
            except asyncio.TimeoutError:
                yield None
                continue
            if found is None:
                raise ClientDisconnect
            if waiting:
                self.started()
                waiting = False
            index, event = found
            if isinstance(event, End):
                if status := FAILURES.get(event.reason):
                    message = event.error or "the server is shutting down; ask again later"
                    raise APIError(status, message, code=event.reason)
                del self.running[index]
                self._add(1)
            yield found

    async def watch(self, request: Request) -> None:
        """Let `read` raise ClientDisconnect when the client has closed its connection."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.queue.put_nowait(None)

    def cancel(self) -> None:
        """Free the engine's slots of all choices that have not ended."""
        for request in self.running.values():
            self.engine.cancel(request)
        self.running.clear()


class EventStream(StreamingResponse):
    """Server-sent events. However the connection ends, the engine's slots are freed."""

    def __init__(self, chunks: AsyncIterator[bytes], events: Events) -> None:
        super().__init__(chunks, media_type="text/event-stream", headers=STREAM_HEADERS)
        self.events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.events.cancel()


def page_headers(page: str) -> dict[str, str]:
    """Headers that let the page run only its own script and style and call only this server."""
    def digests(tag: str) -> str:
        parts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'"
            for part in parts)
    policy = (f"default-src 'none'; script-src {digests('script')}; "
              f"style-src {digests('style')}; connect-src 'self'; img-src data:; base-uri 'none'; "
              "form-action 'none'; frame-ancestors 'none'")
    return {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}


def _elapsed(request: Request) -> float:
    """Seconds since the request arrived."""
    return time.monotonic() - request.state.start


def _error_response(error: APIError) -> Response:
    return JSONResponse(error.body, error.status, error.headers)


def _with_id(request: Request, response: Response) -> Response:
    """The response with the x-request-id of its request, if that is harmless, or a new one."""
    given = request.headers.get(REQUEST_ID, "")
    kept = re.fullmatch(r"[\w.:/+=-]{1,128}", given, re.ASCII)
    response.headers[REQUEST_ID] = given if kept else uuid.uuid4().hex
    return response


async def _http_error(request: Request, error: Exception) -> Response:
    """Unknown paths and methods, in the shape of every other error."""
    assert isinstance(error, HTTPException)
    return _with_id(request, _error_response(APIError(
        error.status_code, f"there is no {request.method} {request.scope['path'][:80]}; "
        "/openapi.json lists the paths and their methods", headers=dict(error.headers or {}))))


async def _internal_error(request: Request, error: Exception) -> Response:
    """Tell the caller that the server failed; uvicorn logs the traceback.

    uvicorn then closes the connection. The header says so, because a client that reused the
    connection would lose its next request.
    """
    return _with_id(request, _error_response(APIError(
        500, "the server failed on this request; its log says why",
        headers={"Connection": "close"})))
