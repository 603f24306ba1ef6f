"""Chat messages as ids, in ChatML: <|im_start|>ROLE newline TEXT <|im_end|> newline.

The name of a special token inside a message stays ordinary text, so no message can end its own chat
turn. The ids of the first messages of a conversation are the beginning of the ids of all of it, and
so are those of the prompt for a reply, unless the reply begins with whitespace: as in every ChatML
renderer, byte-pair encoding may join that with the newline before it.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from fira.data.tokenizer import TURN_END, TURN_START, Tokenizer

ROLES = ("system", "user", "assistant")


class Turn(NamedTuple):
    """A message as ids: `ids[start:stop]` are its text and the token that ends the turn."""

    role: str
    ids: list[int]
    start: int
    stop: int


def turns(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> Iterator[Turn]:
    """Each of `messages` ({"role", "content"}) as ids.

    Raises ValueError for an unknown role, a message without text, or a tokenizer without ChatML.
    """
    start, end = tokenizer.special(TURN_START), tokenizer.special(TURN_END)
    newline = tokenizer.encode("\n")
    for number, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(f"message {number} has role {role!r}; use one of: {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise ValueError(f"message {number} has no text under content; give a string")
        ids = [start, *tokenizer.encode(f"{role}\n{content}"), end]
        yield Turn(role, ids + newline, 1 + len(tokenizer.encode(f"{role}\n")), len(ids))


def render(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]],
           add_generation_prompt: bool = True, continue_final: bool = False) -> list[int]:
    """Ids of `messages`, with the head of an assistant's turn at their end, or, with
    `continue_final`, without the end of the last message; raises as `turns`."""
    ids = [id for turn in turns(tokenizer, messages) for id in turn.ids]
    if continue_final:
        return ids[:-1 - len(tokenizer.encode("\n"))]  # the end of the turn and a newline
    if add_generation_prompt:
        ids += [tokenizer.special(TURN_START), *tokenizer.encode("assistant\n")]
    return ids


def prompt_ids(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]],
               tuned: bool, continue_final: bool = False) -> list[int]:
    """What a model reads: chat turns, or, if it is not `tuned` for them, the plain text so far.

    It then writes a reply, or, with `continue_final`, the rest of the last message.
    """
    if tuned:
        return render(tokenizer, messages, continue_final=continue_final)
    texts = [one["content"] + "\n" * (one["role"] != "user") for one in messages]
    if continue_final:
        texts[-1] = messages[-1]["content"]
    return [tokenizer.end_of_text, *tokenizer.encode("".join(texts))]
