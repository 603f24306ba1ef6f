"""What the server receives and what it sends: one definition of each, also for /openapi.json.

Requests are strict: a field that is not declared here is refused, never ignored. Names, ranges and
defaults are OpenAI's; `top_k`, `min_p`, `repetition_penalty`, `ignore_eos` and `experts` are
extensions. Null means that a field is left out. Descriptions are nouns, because error messages
quote them after "must be". Lists fail at their first error: a message for each of a million entries
would take minutes. Responses are plain dicts whose keys mypy checks against the types below.
"""
from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from typing_extensions import NotRequired, TypedDict

from fira import __version__

MAX_CHOICES = 64  # choices that one request may ask for, over all its prompts
MAX_MESSAGES, MAX_STOPS, MAX_STOP_LENGTH, MAX_TOP_LOGPROBS = 1024, 16, 256, 20
SEED_LIMIT = 2**63


class APIError(Exception):
    """A request that fails: HTTP status, one line for the caller, the field that caused it."""

    def __init__(self, status: int, message: str, param: str | None = None,
                 code: str | None = None, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    @property
    def body(self) -> Error:
        types = {401: "authentication_error", 429: "rate_limit_error", 404: "not_found_error"}
        other = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": types.get(self.status, other),
                          "param": self.param, "code": self.code}}


# Requests


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)] = Field(
        description="a string or a list of text parts")


class StreamOptions(Strict):
    include_usage: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text"]


Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
TokenId = Annotated[int, Field(ge=0)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
Several = Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)


class GenerationRequest(Strict):
    """The fields that chats and text completions share."""

    model: str | None = Field(None, description="the served model's id; null is that one")
    max_tokens: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.1, le=10)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, description="token ids as strings, with numbers from -100 to 100")
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)] | None = Field(
        None, description=f"a string or at most {MAX_STOPS} strings, each of 1 to "
                          f"{MAX_STOP_LENGTH} characters")
    seed: int | None = Field(None, ge=-SEED_LIMIT, lt=SEED_LIMIT)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = Field(
        None, description="whether generation continues after the end of text")
    experts: bool | None = Field(
        None, description="whether the response lists the experts that processed each token")
    user: str | None = Field(None, description="the caller's own label, which has no effect")


class ChatRequest(GenerationRequest):
    messages: Messages
    max_completion_tokens: int | None = Field(None, ge=0)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    response_format: ResponseFormat | None = Field(None, description="text, the only format")


class CompletionRequest(GenerationRequest):
    prompt: (str | Annotated[list[str], Several] | TokenIds
             | Annotated[list[TokenIds], Several]) = Field(
        description="a string, a list of token ids, or a list of at most "
                    f"{MAX_CHOICES} strings or lists of token ids, none of them empty")
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)


class TokenizeRequest(Strict):
    """Either a text, or messages, which are rendered as a chat prompt."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [
        {"required": [given], "properties": {given: {"not": {"type": "null"}},
                                             other: {"type": "null"}}}
        for given, other in (("prompt", "messages"), ("messages", "prompt"))]})
    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = Field(
        None, description="whether the ids begin with the end of text, as in a completion")


class DetokenizeRequest(Strict):
    model: str | None = None
    tokens: list[TokenId] = Field(fail_fast=True)


# Responses


class ErrorDetail(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(TypedDict):
    error: ErrorDetail


class PromptTokensDetails(TypedDict):
    cached_tokens: int


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TokenLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(TypedDict):
    content: list[ChatTokenLogprob]


class TextLogprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class AssistantMessage(TypedDict):
    role: str
    content: str


class Choice(TypedDict):
    index: int
    finish_reason: str
    experts: NotRequired[Sequence[Sequence[Sequence[int]]]]  # [token][layer][rank by weight]


class ChatChoice(Choice):
    message: AssistantMessage
    logprobs: ChatLogprobs | None


class TextChoice(Choice):
    text: str
    logprobs: TextLogprobs | None


class Head(TypedDict):
    """The fields that a response and every chunk of a stream begin with."""

    id: str
    object: str
    created: int
    model: str


class ChatCompletion(Head):
    choices: list[ChatChoice]
    usage: Usage


class TextCompletion(Head):
    choices: list[TextChoice]
    usage: Usage


class Architecture(TypedDict):
    architecture: str
    layers: int
    num_experts: int
    top_k: int
    parameters: int


class Model(TypedDict):
    id: str
    object: str
    created: int
    owned_by: str
    max_model_len: int
    chat_tuned: bool
    fira: NotRequired[Architecture]


class Models(TypedDict):
    object: str
    data: list[Model]


class Tokens(TypedDict):
    tokens: list[int]
    count: int
    max_model_len: int


class Detokenized(TypedDict):
    prompt: str


class Health(TypedDict):
    status: str


class Operation(NamedTuple):
    summary: str
    response: Any
    request: type[BaseModel] | None = None  # a POST has one, a GET has none
    streams: bool = False


OPERATIONS = {
    "/v1/chat/completions": Operation("Answer a chat", ChatCompletion, ChatRequest, streams=True),
    "/v1/completions": Operation("Continue a text", TextCompletion, CompletionRequest,
                                 streams=True),
    "/tokenize": Operation("Convert text to token ids", Tokens, TokenizeRequest),
    "/detokenize": Operation("Convert token ids to text", Detokenized, DetokenizeRequest),
    "/v1/models": Operation("List the served model", Models),
    "/v1/models/{model}": Operation("Describe one model", Model),
    "/health": Operation("Whether the model is loaded", Health),
}
ERRORS = {"400": "A field of the request is wrong", "401": "The API key is missing or unknown",
          "404": "The named model is not the served one", "413": "The body is too large",
          "415": "The body is not JSON", "429": "The queue is full; see Retry-After",
          "503": "The model is loading; see Retry-After"}
EVENT = {"type": "object", "required": ["data"], "properties": {"data": {
    "type": "string", "description": "a chunk or an error in JSON; the last one is [DONE]"}}}
REF = "#/components/schemas/{model}"


@functools.cache
def openapi(keys: bool) -> dict[str, Any]:
    """The OpenAPI description. `keys` says whether the server requires an API key."""
    types: list[tuple[Any, Any]] = [
        *((operation.request, "validation") for operation in OPERATIONS.values()),
        *((operation.response, "serialization") for operation in OPERATIONS.values()),
        (Error, "serialization")]
    _, schemas = TypeAdapter.json_schemas([(type.__name__, mode, TypeAdapter(type))
                                           for type, mode in types if type], ref_template=REF)
    key = {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}} if keys else {}
    return {"openapi": "3.1.0",
            "info": {"title": "FIRA", "version": __version__,
                     "description": "An OpenAI-compatible server of one FIRA model."},
            "paths": {path: {"post" if one.request else "get": _describe(path, one, keys)}
                      for path, one in OPERATIONS.items()},
            "components": {"schemas": schemas["$defs"], **key}}


def _describe(path: str, operation: Operation, keys: bool) -> dict[str, Any]:
    named = "{" in path
    statuses = set(ERRORS) if operation.request else {"401", "503", *(["404"] if named else [])}
    errors = {status: {"description": words, "content": _json(Error)}
              for status, words in ERRORS.items()
              if status in statuses and (keys or status != "401")}
    content = _json(operation.response)
    if operation.streams:
        content["text/event-stream"] = {"schema": EVENT}
    described: dict[str, Any] = {
        "summary": operation.summary, "operationId": re.sub(r"\W+", "_", path).strip("_"),
        "responses": {"200": {"description": operation.summary, "content": content}, **errors}}
    if operation.request:
        described["requestBody"] = {"required": True, "content": _json(operation.request)}
    if named:
        described["parameters"] = [{"name": "model", "in": "path", "required": True,
                                    "schema": {"type": "string"}}]
    if keys and path != "/health":
        described["security"] = [{"key": []}]
    return described


def _json(model: Any) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": REF.format(model=model.__name__)}}}
