"""What a request may say, strictly typed. What is not declared here is refused, never ignored.

Names, ranges and defaults are OpenAI's; `top_k`, `min_p`, `repetition_penalty`, `ignore_eos` and
`experts` are extensions. Null means left out. Descriptions are nouns: they stand in error messages
and in /openapi.json. Lists fail fast: a fault for each of a million entries would take minutes.
"""
from __future__ import annotations

import difflib
import json
import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

MAX_CHOICES = 64  # answers one request may ask for, over all its prompts
MAX_FAULTS = 1000  # more are not looked at one by one
MAX_MESSAGES, MAX_STOPS, MAX_STOP_LENGTH, MAX_RIVALS = 1024, 16, 256, 20
SEED = 2**63
_WORDS = re.compile(r"^(Input|List|Dictionary|String|Value) should ")

REFUSED = {  # fields of OpenAI's API that ask for what this server does not do
    "best_of": "answers are not ranked; ask for n answers and choose",
    "suffix": "text is only continued, not filled in",
    "tools": "the model calls no tools", "tool_choice": "the model calls no tools",
    "parallel_tool_calls": "the model calls no tools", "functions": "the model calls no functions",
    "function_call": "the model calls no functions", "audio": "the model has no voice",
    "modalities": "the model writes text only", "store": "the server stores nothing",
    "metadata": "the server stores nothing", "prediction": "predicted outputs are not used",
    "reasoning_effort": "the model's effort cannot be set",
    "web_search_options": "the server reaches no network",
    "moderation": "nothing is moderated", "service_tier": "there is one tier",
    "verbosity": "the model's verbosity cannot be set",
    "safety_identifier": "give the label as user",
    "prompt_cache_key": "prompts are cached without it",
    "prompt_cache_options": "prompts are cached without them",
    "prompt_cache_retention": "prompts stay cached while there is room",
}


class Refused(Exception):
    """An answer with the true status: what is wrong, with which field, and what to do."""

    def __init__(self, status: int, message: str, param: str | None = None,
                 code: str | None = None, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 429: "rate_limit_error", 404: "not_found_error"}
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kinds.get(self.status, kind),
                          "param": self.param, "code": self.code}}


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


class Sampling(Strict):
    """What both kinds of completion take."""

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
    seed: int | None = Field(None, ge=-SEED, lt=SEED)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = Field(None, description="whether to go on after the end of text")
    experts: bool | None = Field(None, description="whether to tell each token's experts")
    user: str | None = Field(None, description="the caller's own label; it changes nothing")


class ChatRequest(Sampling):
    messages: Messages
    max_completion_tokens: int | None = Field(None, ge=0)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_RIVALS)
    response_format: ResponseFormat | None = Field(None, description="text, the only format")


class CompletionRequest(Sampling):
    prompt: (str | Annotated[list[str], Several] | TokenIds
             | Annotated[list[TokenIds], Several]) = Field(
        description="a string, a list of token ids, or a list of at most "
                    f"{MAX_CHOICES} strings or lists of token ids, none of them empty")
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_RIVALS)


class TokenizeRequest(Strict):
    """Text as it is, or messages as a chat would read them."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [
        {"required": [given], "properties": {given: {"not": {"type": "null"}},
                                             other: {"type": "null"}}}
        for given, other in (("prompt", "messages"), ("messages", "prompt"))]})
    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = Field(
        None, description="whether to begin with the end of text, as a completion's prompt does")


class DetokenizeRequest(Strict):
    model: str | None = None
    tokens: list[TokenId] = Field(fail_fast=True)


Schema = TypeVar("Schema", bound=BaseModel)


def parse(schema: type[Schema], body: bytes) -> Schema:
    """The request in `body`. Raises Refused(400), one line about its first fault."""
    try:
        return schema.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(schema, error) from None


def _refusal(schema: type[BaseModel], error: ValidationError) -> Refused:
    if error.error_count() > MAX_FAULTS:
        return Refused(400, f"the request has {error.error_count()} faults; /openapi.json lists "
                       "the fields", code="invalid_value")
    faults = error.errors(include_url=False)
    if faults[0]["type"] == "json_invalid":
        why = faults[0]["ctx"]["error"]
        return Refused(400, f"the body is not valid JSON ({why}); send one JSON object",
                       code="invalid_json")
    if not faults[0]["loc"]:
        return Refused(400, "the body must be one JSON object, such as {\"model\": ...}")
    fault = max(faults, key=lambda fault: len(fault["loc"]))  # the branch that came furthest
    path = _path(fault)
    param, name = _clipped(".".join(path)), path[-1]
    if fault["type"] == "extra_forbidden":
        return Refused(400, _unknown(schema, param, name, len(path)), param, "unknown_field")
    if fault["type"] == "missing":
        return Refused(400, f"{param} is missing; give it", param, "missing_field")
    rule = _WORDS.sub("must ", fault["msg"].partition(" after validation")[0])
    rule = rule.replace("a valid integer", "an integer").replace("a valid array", "a list")
    rule = rule.replace("a valid", "a")
    field = schema.model_fields.get(path[0])
    if len({str(other["loc"]) for other in faults if other["loc"][0] == fault["loc"][0]}) > 1 \
            and field and field.description and len(path) <= 2:
        rule = f"must be {field.description}"
    return Refused(400, f"{param}={_short(fault['input'])} {rule}", param, "invalid_value")


def _unknown(schema: type[BaseModel], param: str, name: str, depth: int) -> str:
    if depth == 1 and name in REFUSED:
        return f"{name} is not supported: {REFUSED[name]}; leave it out"
    near = difflib.get_close_matches(name[:60], schema.model_fields, 1) if depth == 1 else []
    hint = f"did you mean {near[0]}?" if near else "leave it out; /openapi.json lists the fields"
    return f"{_short(param)} is no field of this request; {hint}"


def _path(fault: ErrorDetails) -> list[str]:
    """The names on the way to a fault, without those that Pydantic gives to a union's members."""
    first, *rest = fault["loc"]
    last = [rest.pop()] if rest and fault["type"] == "extra_forbidden" else []  # the caller's word
    return [str(part) for part in (first, *(part for part in rest if not _is_branch(part)), *last)]


def _is_branch(part: int | str) -> bool:
    """'str', 'constrained-str', 'list[...]': the member of a union that was tried."""
    return isinstance(part, str) and (part in ("str", "int", "constrained-str", "constrained-int")
                                      or "[" in part)


def _short(value: Any) -> str:
    return _clipped(json.dumps(value, default=str))


def _clipped(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
