"""Requests in the form of OpenAI's /v1/responses, a list of items, as requests of a chat."""
from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import TypedDict

from fira.serve import schema
from fira.serve.schema import MAX_MESSAGES, APIError, Label, Nothing, Strict

NEEDED = {"message": ("role", "content"), "function_call": ("name", "arguments"),
          "reasoning": ("content",),
          "function_call_output": ("output",)}


class Part(Strict):
    type: Literal["input_text", "output_text", "reasoning_text"]
    text: str
    annotations: Nothing = None
    logprobs: Nothing = None


Content = str | Annotated[list[Part], Field(min_length=1, fail_fast=True)] | None


class Item(Strict):
    """A message, a call or its result; a response's items may be sent back as they are."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    summary: Nothing = None
    id: str | None = None
    status: str | None = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: Content = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: Content = None


class ItemTool(schema.Function):
    type: Literal["function"]


class ItemToolName(schema.FunctionName):
    type: Literal["function"]


class Format(Strict):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(Strict):
    format: Format | None = None


class Reasoning(Strict):
    effort: schema.Effort | None = None
    summary: str | None = Label


class ItemRequest(Strict):
    """Stateless: the whole conversation is in `input`."""

    model: str | None = Field(None, description="a string, the id of the served model")
    input: str | Annotated[list[Item], Field(
        min_length=1, max_length=MAX_MESSAGES - 1, fail_fast=True)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    stream: bool | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    tools: Annotated[list[ItemTool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ItemToolName | None = Field(
        None, description="'none', 'auto', 'required' or an object that names one of the tools")
    parallel_tool_calls: bool | None = None
    user: str | None = Label
    safety_identifier: str | None = Label
    metadata: dict[str, Any] | None = Label
    prompt_cache_key: str | None = Label
    service_tier: Literal["auto", "default"] | None = None
    include: Nothing = Field(None, description="empty: there is nothing more to include")
    truncation: Literal["disabled"] | None = None
    store: Literal[False] | None = Field(None, description="false: the server stores nothing")
    background: Literal[False] | None = Field(
        None, description="false: the server stores nothing that could be fetched later")
    previous_response_id: Literal[""] | None = Field(
        None, description="left out: the server stores nothing; send the conversation in input")


class ItemResponse(TypedDict):
    id: str
    object: str
    status: str
    model: str
    output: list[dict[str, Any]]


def to_chat(request: ItemRequest) -> schema.ChatRequest:
    """Raises APIError for an item without what its type needs."""
    messages: list[dict[str, Any]] = []
    if request.instructions:
        messages.append({"role": "system", "content": request.instructions})
    items = ([Item(role="user", content=request.input)] if isinstance(request.input, str) else
             request.input)
    for number, item in enumerate(items):
        for name in NEEDED[item.type]:
            if getattr(item, name) is None:
                param = f"input.{number}.{name}"
                raise APIError(400, f"{param} is missing; give it", param, "missing_field")
        if item.type == "function_call":
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant"})
            messages[-1].setdefault("tool_calls", []).append(
                {"function": {"name": item.name, "arguments": item.arguments}})
        elif item.type == "reasoning":
            messages.append({"role": "assistant", "reasoning_content": _text(item.content)})
        elif item.type == "function_call_output":
            messages.append({"role": "tool", "content": _text(item.output)})
        else:
            alone = messages and messages[-1].keys() == {"role", "reasoning_content"}
            thought = messages.pop() if alone else {}
            messages.append(thought | {"role": item.role, "content": _text(item.content)})
    given = request.model_dump(exclude_none=True, include={
        "model", "temperature", "top_p", "stream", "parallel_tool_calls", "tool_choice"})
    if isinstance(request.tool_choice, ItemToolName):
        given["tool_choice"] = {"type": "function", "function": {"name": request.tool_choice.name}}
    given["reasoning_effort"] = request.reasoning and request.reasoning.effort
    form = request.text and request.text.format
    if form:
        given["response_format"] = {"type": form.type}
        if form.schema_ is not None:
            given["response_format"]["json_schema"] = {"schema": form.schema_}
    tools = [{"type": "function", "function": tool.model_dump(exclude={"type"})}
             for tool in request.tools or ()]
    return schema.ChatRequest.model_validate(
        {**given, "messages": messages, "tools": tools,
         "max_completion_tokens": request.max_output_tokens})


def _text(content: Content) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content or ())
