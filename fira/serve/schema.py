"""The requests that the server accepts and the responses that it sends, also for /openapi.json.

Requests are strict: a field that is not declared here is refused, unless it is null, which has the
meaning of an absent one. Fields of OpenAI's for which the server has no function are declared with
the values that ask for nothing. Names, ranges and defaults are OpenAI's; `top_k`, `min_p`,
`repetition_penalty`, `ignore_eos`, `experts` and `continue_final_message` are extensions.
Descriptions say what a value is, because errors quote them after "must be". Lists fail at their
first error, because a message for each of a million entries takes minutes. Responses are dicts.
"""
from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field
from typing_extensions import NotRequired, TypedDict

MAX_CHOICES = 64  # choices that one request may ask for, over all its prompts
MAX_MESSAGES, MAX_STOPS, MAX_STOP_LENGTH, MAX_TOP_LOGPROBS = 1024, 16, 256, 20
MAX_INPUTS = 2048  # texts to embed in one request, as OpenAI takes
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


Nothing = Annotated[list[Any], Field(max_length=0)] | None
Label = Field(None, description="a label or a hint, which has no effect")


class Strict(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, frozen=True)
    __pydantic_extra__: dict[str, None]  # null asks for nothing, also in a field not declared here
    cache_control: dict[str, Any] | None = Label


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Call(Strict):
    name: str
    arguments: str


class ToolCall(Strict):
    """A call in an assistant's message, as a response gives it."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: Call
    index: int | None = None


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)] | None = None
    name: str | None = Label
    annotations: Nothing = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128, fail_fast=True)] | None = None
    tool_call_id: str | None = Label
    reasoning_content: str | None = None
    reasoning: str | None = None


class Function(Strict):
    name: str = Field(pattern=r"^[\w.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionName(Strict):
    name: str


class Tool(Strict):
    type: Literal["function"]
    function: Function


class NamedTool(Strict):
    type: Literal["function"]
    function: FunctionName


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class NamedSchema(Strict):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None


class Structure(Strict):
    """vLLM's structured_outputs: exactly one of the fields."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1, fail_fast=True)] | None = None
    grammar: str | None = None
    json_object: bool | None = None


Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
TokenId = Annotated[int, Field(ge=0)]
TokenKey = Annotated[str, Field(pattern="^[0-9]{1,9}$")]  # a token id as the key of an object
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
Several = Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)
Many = Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)
Text = Annotated[str, Field(min_length=1)]
Effort = Literal["none", "minimal", "low", "medium", "high"]


class GenerationRequest(Strict):
    """The fields that chats and text completions share."""

    model: str | None = Field(None, description="a string, the id of the served model")
    max_tokens: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="at least 1, or 0 or -1 for no limit")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.1, le=10)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[TokenKey, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, description="an object of token ids, as /tokenize gives them, and numbers from "
                          "-100 to 100")
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)] | None = Field(
        None, description=f"a string or at most {MAX_STOPS} strings, each of 1 to "
                          f"{MAX_STOP_LENGTH} characters")
    seed: int | None = Field(None, ge=-SEED_LIMIT, lt=SEED_LIMIT)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = Field(
        None, description="true to continue after the end of text, or false")
    experts: bool | None = Field(
        None, description="true to list the experts that processed each token, or false")
    user: str | None = Label
    safety_identifier: str | None = Label
    metadata: dict[str, Any] | None = Label
    prompt_cache_key: str | None = Label
    store: Literal[False] | None = Field(
        None, description="false, because the server stores nothing")
    service_tier: Literal["auto", "default"] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: Structure | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(min_length=1, fail_fast=True)] | None = None
    guided_grammar: str | None = None
    grammar: str | None = None


class Reply(Strict):
    """How an answer begins: where the last message ends, or with a thought, in others' names."""

    continue_final_message: bool | None = Field(
        None, description="true to continue the last message, an assistant's, or false")
    reasoning_effort: Effort | None = None
    chat_template_kwargs: dict[Literal["enable_thinking"], bool | None] | None = None
    max_thinking_tokens: int | None = Field(None, ge=0, validation_alias=AliasChoices(
        "max_thinking_tokens", "thinking_budget", "thinking_token_budget"))


class ChatRequest(GenerationRequest, Reply):
    messages: Messages
    max_completion_tokens: int | None = Field(None, ge=0)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = Field(
        None, description="'none', 'auto', 'required' or an object that names one of the tools")
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = Field(
        None, description='["text"], because the model writes text only')


class CompletionRequest(GenerationRequest):
    prompt: (str | Annotated[list[str], Several] | TokenIds
             | Annotated[list[TokenIds], Several]) = Field(
        description="a string, a list of token ids, or a list of at most "
                    f"{MAX_CHOICES} strings or lists of token ids, none of them empty")
    echo: bool | None = None
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)
    suffix: Literal[""] | None = Field(
        None, description="empty, because the model only continues text")
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)


class EmbeddingRequest(Strict):
    model: str | None = Field(None, description="a string, the id of the served model")
    input: Text | Annotated[list[Text], Many] | TokenIds | Annotated[list[TokenIds], Many] = Field(
        description=f"a string, a list of token ids, or a list of at most {MAX_INPUTS} strings or "
                    "lists of token ids, none of them empty")
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1)
    user: str | None = Label


class TokenizeRequest(Reply):
    """Either a text, or messages, which are rendered as a chat prompt."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [
        {"required": [given], "properties": {given: {"not": {"type": "null"}},
                                             other: {"type": "null"}}}
        for given, other in (("prompt", "messages"), ("messages", "prompt"))]})
    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = Field(
        None, description="true to begin with the end of text, as a completion does, or false")


class DetokenizeRequest(Strict):
    model: str | None = None
    tokens: list[TokenId] = Field(fail_fast=True)


class Error(TypedDict):
    error: dict[Literal["message", "type", "param", "code"], str | None]


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[Literal["cached_tokens"], int]
    completion_tokens_details: dict[Literal["reasoning_tokens"], int]


class TokenLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: NotRequired[list[TokenLogprob]]


class TextLogprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class AssistantMessage(TypedDict):
    role: str
    content: str | None
    reasoning_content: NotRequired[str]
    reasoning: NotRequired[str]  # the same
    tool_calls: NotRequired[list[dict[str, Any]]]


class Choice(TypedDict):
    index: int
    finish_reason: str
    experts: NotRequired[list[list[list[int]]]]  # [token][layer][rank by weight]


class ChatChoice(Choice):
    message: AssistantMessage
    logprobs: dict[Literal["content"], list[TokenLogprob]] | None


class TextChoice(Choice):
    text: str
    logprobs: TextLogprobs | None


class Completion(TypedDict):
    id: str
    object: str
    created: int
    model: str
    usage: Usage


class ChatCompletion(Completion):
    choices: list[ChatChoice]


class TextCompletion(Completion):
    choices: list[TextChoice]


class Embeddings(TypedDict):
    object: str
    data: list[dict[str, str | int | list[float]]]  # base64 is of little-endian float32 numbers
    model: str
    usage: dict[str, int]


class Model(TypedDict):
    id: str
    object: str
    created: int
    owned_by: str
    max_model_len: int
    chat_tuned: bool
    thinks: bool
    fira: NotRequired[dict[str, str | int]]  # numbers that the chat page shows


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
