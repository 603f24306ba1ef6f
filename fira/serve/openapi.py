"""/openapi.json: what the server takes, from the request models themselves, and what it gives."""
from __future__ import annotations

import functools
import re
from typing import Any

from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import models_json_schema
from typing_extensions import NotRequired, TypedDict

from fira import __version__
from fira.serve.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)

REF = "#/components/schemas/{model}"


class Fault(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(TypedDict):
    error: Fault


class Cached(TypedDict):
    cached_tokens: int


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: Cached


class Scored(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class ChatScore(Scored):
    top_logprobs: list[Scored]


class ChatScores(TypedDict):
    content: list[ChatScore]


class AnswerMessage(TypedDict):
    role: str
    content: str


class ChatChoice(TypedDict):
    index: int
    message: AnswerMessage
    finish_reason: str
    logprobs: ChatScores | None
    experts: NotRequired[list[list[list[int]]]]


class ChatCompletion(TypedDict):
    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextScores(TypedDict):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(TypedDict):
    index: int
    text: str
    finish_reason: str
    logprobs: TextScores | None
    experts: NotRequired[list[list[list[int]]]]


class Completion(TypedDict):
    id: str
    object: str
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class Model(TypedDict):
    id: str
    object: str
    created: int
    owned_by: str
    max_model_len: int
    chat_tuned: bool


class Models(TypedDict):
    object: str
    data: list[Model]


class Tokens(TypedDict):
    tokens: list[int]
    count: int
    max_model_len: int


class Text(TypedDict):
    prompt: str


class Health(TypedDict):
    status: str


RESPONSES: tuple[Any, ...] = (Error, ChatCompletion, Completion, Model, Models, Tokens, Text,
                              Health)
POSTS: dict[str, tuple[str, type[BaseModel], Any]] = {
    "/v1/chat/completions": ("Answer a chat", ChatRequest, ChatCompletion),
    "/v1/completions": ("Continue a text", CompletionRequest, Completion),
    "/tokenize": ("Text to token ids", TokenizeRequest, Tokens),
    "/detokenize": ("Token ids to text", DetokenizeRequest, Text)}
GETS: dict[str, tuple[str, Any]] = {
    "/v1/models": ("The served model", Models), "/v1/models/{model}": ("One model", Model),
    "/health": ("Whether the model is loaded", Health)}
STREAMING = ("/v1/chat/completions", "/v1/completions")
EVENT = {"type": "object", "required": ["data"], "properties": {"data": {
    "type": "string", "description": "a chunk or an error in JSON; at the end [DONE]"}}}
REFUSALS = {"400": "Something in the request cannot be honoured",
            "404": "Another model than the one served", "413": "The body is too large",
            "415": "The body is not JSON", "429": "The queue is full; see Retry-After",
            "503": "The model is loading; see Retry-After"}


@functools.cache
def document(keys: bool) -> dict[str, Any]:
    """The OpenAPI description. `keys` says that the server wants one."""
    requests: list[tuple[type[BaseModel], Any]] = [
        (request, "validation") for _, request, _ in POSTS.values()]
    _, top = models_json_schema(requests, ref_template=REF)
    schemas = dict(top["$defs"])
    for response in RESPONSES:
        found = TypeAdapter(response).json_schema(ref_template=REF, mode="serialization")
        schemas |= found.pop("$defs", {})
        schemas[response.__name__] = found
    paths: dict[str, Any] = {path: {"get": _operation(path, meaning, response, keys)}
                             for path, (meaning, response) in GETS.items()}
    for path, (meaning, request, response) in POSTS.items():
        body = {"required": True, "content": {"application/json": {"schema": _ref(request)}}}
        paths[path] = {"post": {**_operation(path, meaning, response, keys), "requestBody": body}}
    scheme = {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}} if keys else {}
    return {"openapi": "3.1.0",
            "info": {"title": "FIRA", "version": __version__,
                     "description": "An OpenAI-compatible server of one FIRA model."},
            "paths": paths, "components": {"schemas": schemas, **scheme}}


def _operation(path: str, meaning: str, response: Any, keys: bool) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": _ref(response)}}
    if path in STREAMING:
        content["text/event-stream"] = {"schema": EVENT}
    refusals = {**REFUSALS, **({"401": "The API key is missing or unknown"} if keys else {})}
    wanted = {"401", "503"} if path in GETS else set(refusals)
    wanted |= {"404"} if "{" in path else set()
    responses = {status: {"description": words,
                          "content": {"application/json": {"schema": _ref(Error)}}}
                 for status, words in refusals.items() if status in wanted}
    guarded = keys and path != "/health"
    return {"summary": meaning, "operationId": re.sub(r"\W+", "_", path).strip("_"),
            "responses": {"200": {"description": meaning, "content": content}, **responses},
            **({"parameters": [{"name": "model", "in": "path", "required": True,
                                "schema": {"type": "string"}}]} if "{" in path else {}),
            **({"security": [{"key": []}]} if guarded else {})}


def _ref(model: Any) -> dict[str, str]:
    return {"$ref": REF.format(model=model.__name__)}
