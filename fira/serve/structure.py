"""The form that a request wants its text to have: a grammar, or calls of its tools.

A call has Qwen3's form (fira/data/chat.py), and the grammar holds the model to it: text before a
call is free; what follows <tool_call> names one of the tools and follows that tool's schema.
"""
from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from fira.data.tokenizer import CALL, CALL_END, Tokenizer
from fira.infer.constraint import JSON_FORM, Constraint, Grammars
from fira.infer.request import overlap
from fira.serve.schema import APIError, ChatRequest, GenerationRequest, NamedTool, Tool

GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "grammar")


def choose_tools(request: ChatRequest) -> list[Tool]:
    """The tools that the model may call: all, the named one, or none."""
    tools, choice = request.tools or [], request.tool_choice
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if tool.function.name == choice.function.name]
    if not tools and choice not in (None, "none", "auto"):
        raise APIError(400, "tool_choice asks for a tool that is not in tools; add it there",
                       "tool_choice")
    return [] if choice == "none" else tools


def constrain(request: GenerationRequest, grammars: Grammars,
              tools: Sequence[Tool] = ()) -> Constraint | None:
    """The constraint of a request, compiled. Raises APIError if it cannot be compiled."""
    param, kind, grammar = read_grammar(request)
    if tools and kind not in ("", "json"):
        raise APIError(400, f"{param} cannot be used with tools; leave one of them out", param)
    try:
        if tools:
            assert isinstance(request, ChatRequest)
            param, kind = "tools", "grammar"
            grammar = call_grammar(request, grammars.tokenizer, tools, grammar)
        return grammars.compile(kind, grammar) if kind else None
    except (ValueError, TypeError) as error:
        raise APIError(400, f"{param} cannot be compiled: {error}", param, "invalid_value"
                       ) from None


def read_grammar(request: GenerationRequest) -> tuple[str, str, str]:
    """The field that constrains the text, the kind of its grammar, and the grammar."""
    given = {name: getattr(request, name) for name in GUIDED}
    if request.structured_outputs:
        given |= {f"structured_outputs.{name}": value for name, value in
                  request.structured_outputs.model_dump(by_alias=True).items()}
    form = request.response_format
    if form and form.type == "json_schema" and not form.json_schema:
        raise APIError(400, "response_format.json_schema is missing; give it", "response_format")
    given["response_format"] = form and form.type != "text" and (
        form.json_schema.schema_ if form.json_schema else True)
    found = [(name, value) for name, value in given.items() if value not in (None, False)]
    if len(found) > 1:
        raise APIError(400, f"{found[0][0]} and {found[1][0]} both constrain the text; leave one "
                       "of them out", found[0][0])
    name, value = found[0] if found else ("", "")
    if name.endswith("choice"):
        texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in value)
        return name, "grammar", f"start: {texts}"
    if name.endswith(("regex", "grammar")) or not name:
        return name, re.split("[._]", name)[-1], value
    value = {"type": "object"} if value is True else value
    return name, "json", value if isinstance(value, str) else json.dumps(value)


def call_grammar(request: ChatRequest, tokenizer: Tokenizer, tools: Sequence[Tool],
                 content: str) -> str:
    """Lark's grammar of a message that may call `tools`, and must if tool_choice says so.

    `content` is the JSON schema of a message without calls; "": any text, also before calls.
    """
    forced = request.tool_choice not in (None, "auto")
    if content:
        content = json.dumps({"x-guidance": JSON_FORM, **json.loads(content)})
    start, end = tokenizer.special(CALL), tokenizer.special(CALL_END)
    bodies = []
    for tool in tools:
        function = tool.function
        # what llguidance cannot hold is left free, unless the caller wants it held
        schema = {"type": "object", **(function.parameters or {"additionalProperties": False}),
                  "x-guidance": {**JSON_FORM, "lenient": not function.strict}}
        head = f'\n{{"name": {json.dumps(function.name)}, "arguments": '
        bodies.append(f"{json.dumps(head)} %json {json.dumps(schema)}")
    return "\n".join([
        "start: calls" if forced else f"start: calls | %json {content}" if content else
        f"start: <[^{start}]>* calls?",
        "calls: call" if request.parallel_tool_calls is False else 'calls: call ("\\n" call)*',
        f'call: <[{start}]> ({" | ".join(bodies)}) "}}\\n" <[{end}]>'])


class CallParser:
    """Divides text that follows a `call_grammar`, as it arrives, into the deltas of a stream."""

    BOUNDS = (f'{CALL}\n{{"name": ', ', "arguments": ', f"}}\n{CALL_END}")

    def __init__(self) -> None:
        # the text that is in no delta yet, and where it belongs: 0 content, 1 name, 2 arguments
        self.rest, self.place, self.calls = "", 0, 0

    def push(self, text: str, last: bool) -> Iterator[dict[str, Any]]:
        """The deltas that more text completes; `last`: no more text follows."""
        self.rest += text
        found = "more"
        while found:
            bound = self.BOUNDS[self.place]
            part, found, after = self.rest.partition(bound)
            if self.place == 0 and found:
                part = part.removesuffix("\n")
            held = 0 if found or last else max(overlap(part, bound), overlap(part, "\n" + bound))
            ready = part[:len(part) - held]
            if self.place == 1:
                ready = part if found else ""
            if ready:
                yield self._delta(ready)
            self.rest = after if found else part[len(ready):]
            self.place = (self.place + 1) % 3 if found else self.place

    def _delta(self, text: str) -> dict[str, Any]:
        if self.place == 0:
            return {"content": text}
        fields: dict[str, Any] = {"function": {"arguments": text}}
        if self.place == 1:
            self.calls += 1
            fields = {"id": f"call_{uuid.uuid4().hex}", "type": "function",
                      "function": {"name": json.loads(text), "arguments": ""}}
        return {"tool_calls": [{"index": self.calls - 1, **fields}]}
