"""Chat messages as ids, in ChatML: <|im_start|>ROLE newline TEXT <|im_end|> newline.

The name of a special token inside a message stays ordinary text, so no message can end its own chat
turn. The ids of the first messages of a conversation are the beginning of the ids of all of it, and
so are those of the prompt for a reply, unless the reply begins with whitespace: as in every ChatML
renderer, byte-pair encoding may join that with the newline before it.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence

from fira.data.tokenizer import TURN_END, TURN_START, Tokenizer

ROLES = ("system", "user", "assistant")


def render(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]],
           add_generation_prompt: bool = True) -> list[int]:
    """Ids of `messages` ({"role", "content"}), with the head of an assistant's turn at their end.

    Raises ValueError for an unknown role, a message without text, or a tokenizer without ChatML.
    """
    start, end = tokenizer.special(TURN_START), tokenizer.special(TURN_END)
    newline = tokenizer.encode("\n")
    ids: list[int] = []
    for number, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(f"message {number} has role {role!r}; use one of: {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise ValueError(f"message {number} has no text under content; give a string")
        ids += [start, *tokenizer.encode(f"{role}\n{content}"), end, *newline]
    if add_generation_prompt:
        ids += [start, *tokenizer.encode("assistant\n")]
    return ids


def prompt_ids(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]],
               tuned: bool) -> list[int]:
    """What a model reads: chat turns, or, if it is not `tuned` for them, the plain text so far."""
    if tuned:
        return render(tokenizer, messages)
    texts = [one["content"] + "\n" * (one["role"] != "user") for one in messages]
    return [tokenizer.end_of_text, *tokenizer.encode("".join(texts))]
