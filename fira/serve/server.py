"""The HTTP application: routes, streams, refusals. It runs in one event loop beside the engine."""
from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from fira.serve.answer import KEEPALIVE, Answer, sse
from fira.serve.api import (
    Job,
    Served,
    chat_job,
    check_model,
    completion_job,
    detokenize,
    model_entry,
    tokenize,
)
from fira.serve.guard import OPEN, Keys, check_host, read_body
from fira.serve.metrics import Metrics
from fira.serve.openapi import document
from fira.serve.running import Running
from fira.serve.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Refused,
    TokenizeRequest,
    parse,
)

PAGE = Path(__file__).with_name("page.html")
STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
Endpoint = Callable[[Request], Awaitable[Response]]


class Service(NamedTuple):
    """What answers: the model's description and its engine, started."""

    served: Served
    engine: Any


class Server:
    """The application's state: `load` brings the service while the server already listens."""

    def __init__(self, load: Callable[[], Service], keys: Keys | None = None,
                 loopback: bool = False, failed: Callable[[Exception], None] | None = None) -> None:
        """`loopback`: only this machine is meant to ask. `failed` hears why `load` did not."""
        self.load, self.keys, self.loopback, self.failed = load, keys, loopback, failed
        self.service: Service | None = None
        self.metrics = Metrics(lambda: self.service and self.service.engine)
        self.page = PAGE.read_text(encoding="utf-8")
        self.page_headers = page_headers(self.page)

    def app(self) -> Starlette:
        posts = {"/v1/chat/completions": self.chat_completions, "/v1/completions": self.completions,
                 "/tokenize": self.tokenize, "/detokenize": self.detokenize}
        gets = {"/": self.home, "/health": self.health, "/metrics": self.show_metrics,
                "/openapi.json": self.openapi, "/v1/models": self.models,
                "/v1/models/{model:path}": self.model}
        routes = [Route(path, self.guarded(path, endpoint), methods=[method])
                  for method, table in (("POST", posts), ("GET", gets))
                  for path, endpoint in table.items()]
        return Starlette(routes=routes, lifespan=self.lifespan, exception_handlers={
            HTTPException: _http_error, Exception: _bug})

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        loading = asyncio.create_task(self._load())
        yield
        await loading
        if self.service:
            await asyncio.to_thread(self.service.engine.close)

    async def _load(self) -> None:
        try:
            self.service = await asyncio.to_thread(self.load)
        except Exception as error:
            if not self.failed:
                raise
            self.failed(error)

    def guarded(self, path: str, endpoint: Endpoint) -> Endpoint:
        """The endpoint behind keys and host names; refusals become answers; all is counted."""
        async def answer(request: Request) -> Response:
            start = time.monotonic()
            try:
                if path not in OPEN and self.keys:
                    self.keys.check(request)
                if self.loopback and not self.keys:
                    check_host(request)
                response = await endpoint(request)
            except Refused as refused:
                response = JSONResponse(refused.body, refused.status, refused.headers)
            except ClientDisconnect:
                response = Response(status_code=499)  # nginx's number; nobody is there to read it
            self.metrics.requests.labels(path, response.status_code).inc()
            if not isinstance(response, EventStream):
                self.metrics.seconds.labels(path).observe(time.monotonic() - start)
            return response
        return answer

    def ready(self) -> Service:
        if self.service is None:
            raise Refused(503, "the model is loading; ask again in a few seconds",
                          code="loading", headers={"Retry-After": "2"})
        return self.service

    async def chat_completions(self, request: Request) -> Response:
        service = self.ready()
        body = parse(ChatRequest, await read_body(request))
        job = await asyncio.to_thread(chat_job, body, service.served)
        return await self.respond(request, service, job)

    async def completions(self, request: Request) -> Response:
        service = self.ready()
        body = parse(CompletionRequest, await read_body(request))
        job = await asyncio.to_thread(completion_job, body, service.served)
        return await self.respond(request, service, job)

    async def respond(self, request: Request, service: Service, job: Job) -> Response:
        start = time.monotonic()
        answer, running = Answer(job, service.served), Running(service.engine, job)
        if job.stream:
            return EventStream(self.chunks(request, answer, running, start), running)
        collecting = asyncio.create_task(self.collect(answer, running, start))
        leaving = asyncio.create_task(_leaving(request))
        try:
            await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not collecting.done():
                raise ClientDisconnect
            return JSONResponse(await collecting)
        finally:
            collecting.cancel()
            leaving.cancel()
            running.cancel()

    async def collect(self, answer: Answer, running: Running, start: float) -> dict[str, Any]:
        waits = True
        async for event in running.read():
            if event:
                if waits:
                    self.metrics.first_token.observe(time.monotonic() - start)
                waits = False
                answer.hear(*event)
        return answer.whole()

    async def chunks(self, request: Request, answer: Answer, running: Running,
                     start: float) -> AsyncIterator[bytes]:
        """The stream of an answer. A failure in its midst is a chunk that says so."""
        for chunk in answer.first():
            yield chunk
        waits = True
        try:
            async for event in running.read():
                if event is None:
                    yield KEEPALIVE
                    continue
                if waits:
                    self.metrics.first_token.observe(time.monotonic() - start)
                waits = False
                for chunk in answer.feed(*event):
                    yield chunk
            for chunk in answer.last():
                yield chunk
        except Refused as refused:
            yield sse(refused.body)
        self.metrics.seconds.labels(request.scope["path"]).observe(time.monotonic() - start)

    async def tokenize(self, request: Request) -> Response:
        service = self.ready()
        body = parse(TokenizeRequest, await read_body(request))
        return JSONResponse(await asyncio.to_thread(tokenize, body, service.served))

    async def detokenize(self, request: Request) -> Response:
        service = self.ready()
        body = parse(DetokenizeRequest, await read_body(request))
        return JSONResponse(await asyncio.to_thread(detokenize, body, service.served))

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model_entry(self.ready().served)]})

    async def model(self, request: Request) -> Response:
        served = self.ready().served
        check_model(request.path_params["model"], served)
        return JSONResponse(model_entry(served))

    async def health(self, request: Request) -> Response:
        self.ready()
        return JSONResponse({"status": "ok"})

    async def show_metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(),
                        media_type="text/plain; version=0.0.4; charset=utf-8")

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(document(bool(self.keys)))

    async def home(self, request: Request) -> Response:
        return HTMLResponse(self.page, headers=self.page_headers)


class EventStream(StreamingResponse):
    """Server-sent events; when the client leaves, however that shows, its slots are freed."""

    def __init__(self, chunks: AsyncIterator[bytes], running: Running) -> None:
        super().__init__(chunks, media_type="text/event-stream", headers=STREAM_HEADERS)
        self.running = running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.running.cancel()


def page_headers(page: str) -> dict[str, str]:
    """The page may run its own script and style, known by their digests, and ask its own server."""
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


async def _leaving(request: Request) -> None:
    """Returns when the client has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _http_error(request: Request, error: Exception) -> Response:
    """Unknown paths and methods, in the shape of every other refusal."""
    assert isinstance(error, HTTPException)
    path = request.scope["path"][:80]
    words = {404: f"there is nothing at {path}; /openapi.json lists what is",
             405: f"{request.method} is not for {path}"}
    message = words.get(error.status_code, error.detail)
    refused = Refused(error.status_code, message, headers=dict(error.headers or {}))
    return JSONResponse(refused.body, refused.status, refused.headers)


async def _bug(request: Request, error: Exception) -> Response:
    """The traceback goes to the log, by uvicorn; the caller learns that it is not their fault.

    uvicorn then closes the connection, so the answer says it: else the next request on it is lost.
    """
    refused = Refused(500, "the server failed on this request; its log says why",
                      headers={"Connection": "close"})
    return JSONResponse(refused.body, refused.status, refused.headers)
