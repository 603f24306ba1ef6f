"""Chat messages as ids, in ChatML: <|im_start|>ROLE newline TEXT <|im_end|> newline.

The name of a special token inside a message stays ordinary text, so no message can end its own chat
turn. The ids of the first messages of a conversation are the beginning of the ids of all of it, and
so are those of the prompt for a reply, unless the reply begins with whitespace: as in every ChatML
renderer, byte-pair encoding may join that with the newline before it.

Tools have the form of Qwen3's chat template (Hermes): their descriptions stand in the system
message, a call is JSON between <tool_call> and </tool_call> at the end of the assistant's message,
and what the tools return follows as a user's turn of <tool_response> blocks. Thoughts, which an
assistant's message has under reasoning_content, stand before its text between <think> and </think>.
As in Qwen3's template, only those after the last user's message are read; so the ids of an answer
with a thought are no beginning of those of a longer conversation. An empty thought ("") belongs to
the head of the turn: after it a model that thinks answers at once.
"""
from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from fira.data.tokenizer import (
    CALL,
    CALL_END,
    RESPONSE,
    RESPONSE_END,
    THINK,
    THINK_END,
    TOOLS_HEAD,
    TOOLS_TAIL,
    TURN_END,
    TURN_START,
    Tokenizer,
)

ROLES = ("system", "user", "assistant", "tool")


class Marker(str):
    """A token's name that the form itself writes; in a message the same letters are plain text."""


class Turn(NamedTuple):
    """A message as ids: `ids[start:stop]` are its thoughts, text and calls and the token
    that ends it."""

    role: str
    ids: list[int]
    start: int
    stop: int


def turns(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]],
          tools: Sequence[Mapping[str, Any]] = ()) -> Iterator[Turn]:
    """Each of `messages` ({"role", "content"}; an assistant's may have "tool_calls"
    and "reasoning_content") as ids.

    `tools` are OpenAI's {"type": "function", "function"}; they stand in the first message's ids.
    Raises ValueError for an unknown role, a message without text, or a tokenizer without ChatML.
    """
    newline = len(tokenizer.encode("\n"))
    for role, head, body in write_turns(messages, tools):
        ids = _encode(tokenizer, head + body)
        yield Turn(role, ids, len(_encode(tokenizer, head)),
                   len(ids) - newline * (body[-1] == "\n"))


def render(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]],
           add_generation_prompt: bool = True, tools: Sequence[Mapping[str, Any]] = (),
           continue_final: bool = False, direct: bool = False) -> list[int]:
    """Ids of `messages`, with the head of an assistant's turn at their end, or, with
    `continue_final`, without the end of the last message; raises as `turns`. `direct`: an empty
    thought follows the head."""
    ids = [id for turn in turns(tokenizer, messages, tools) for id in turn.ids]
    if continue_final:
        return ids[:-1 - len(tokenizer.encode("\n"))]  # the end of the turn and a newline
    if add_generation_prompt:
        thought = write_thought("") if direct else []
        ids += _encode(tokenizer, [Marker(TURN_START), "assistant\n", *thought])
    return ids


def write_turns(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
                ) -> Iterator[tuple[str, list[str], list[str]]]:
    """Of each message: role, what stands before its text, and the rest; each part is plain text or
    a Marker."""
    end = [Marker(TURN_END), "\n"]
    roles = ["", *(str(message.get("role")) for message in messages), ""]
    asked = max((number for number, role in enumerate(roles) if role == "user"), default=0) - 1
    for number, message in enumerate(messages):
        before, role, after = roles[number:number + 3]
        text, calls = _text(number, message), message.get("tool_calls") or ()
        head, body = [Marker(TURN_START), f"{role}\n"], [text]
        thoughts = message.get("reasoning_content") if number > asked else None
        if role == "assistant" and thoughts is not None:
            text, block = text.lstrip("\n"), write_thought(thoughts)
            head, body = ((head, [*block, text]) if thoughts.strip("\n") else
                          ([*head, *block], [text]))
        if tools and not number:
            own = [text, "\n\n"] if role == "system" else []
            described = [json.dumps(tool, ensure_ascii=False) + "\n" for tool in tools]
            tail = [Marker(part) if part in (CALL, CALL_END) else part
                    for part in re.split(f"({CALL}|{CALL_END})", TOOLS_TAIL)]
            system = [*own, TOOLS_HEAD, *described, *tail]
            if role == "system":
                body = system
            else:
                head = [Marker(TURN_START), "system\n", *system, *end, *head]
        if role == "tool":  # one turn holds the responses to all calls of a message
            head[-2:] = [] if before == "tool" else [Marker(TURN_START), "user"]
            body = ["\n", Marker(RESPONSE), f"\n{text}\n", Marker(RESPONSE_END)]
        for place, call in enumerate(calls):
            body += ["\n" if text or place else "", *_write_call(call.get("function", call))]
        yield role, head, body if after == role == "tool" else body + end


def write_thought(thoughts: str) -> list[str]:
    return [Marker(THINK), "\n" + thoughts.strip("\n") + "\n", Marker(THINK_END), "\n\n"]


def _write_call(call: Mapping[str, Any]) -> list[str]:
    arguments = call["arguments"]  # JSON as text, which stays as it is, or an object
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    text = f'\n{{"name": "{call["name"]}", "arguments": {arguments}}}\n'
    return [Marker(CALL), text, Marker(CALL_END)]


def _text(number: int, message: Mapping[str, Any]) -> str:
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"message {number} has role {role!r}; use one of: {', '.join(ROLES)}")
    if not isinstance(message.get("reasoning_content") or "", str):
        raise ValueError(f"message {number} has no text under reasoning_content; give a string")
    if content is None and message.get("tool_calls"):
        return ""
    if not isinstance(content, str):
        raise ValueError(f"message {number} has no text under content; give a string")
    return content


def _encode(tokenizer: Tokenizer, parts: Sequence[str]) -> list[int]:
    known = {*tokenizer.added, TURN_START, TURN_END}
    ids: list[int] = []
    for special, group in itertools.groupby(
            parts, lambda part: isinstance(part, Marker) and part in known):
        names = list(group)
        ids += map(tokenizer.special, names) if special else tokenizer.encode("".join(names))
    return ids


def knows_tools(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer, and the chat template that came with it, have this form of tools."""
    template = str(tokenizer.settings.get("chat_template"))
    return {CALL, CALL_END} <= {*tokenizer.added} and "tools" in template and CALL in template


def can_think(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer has the tokens around thoughts."""
    return {THINK, THINK_END} <= tokenizer.added.keys()


def prompt_ids(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], tuned: bool,
               tools: Sequence[Mapping[str, Any]] = (), continue_final: bool = False,
               direct: bool = False) -> list[int]:
    """What a model reads: chat turns, or, if it is not `tuned` for them, the plain text so far.

    It then writes a reply, or, with `continue_final`, the rest of the last message. `direct`: it
    thinks in other replies, but not in this one.
    """
    if tuned:
        return render(tokenizer, messages, True, tools, continue_final, direct)
    texts = [one["content"] + "\n" * (one["role"] != "user") for one in messages]
    if continue_final:
        texts[-1] = messages[-1]["content"]
    return [tokenizer.end_of_text, *tokenizer.encode("".join(texts))]
