"""Chat turns as ids, in ChatML: <|im_start|>ROLE newline TEXT <|im_end|> newline.

Text stays text: a special token's name inside a message is never read as that token.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence

from fira.data.tokenizer import TURN_END, TURN_START, Tokenizer

ROLES = ("system", "user", "assistant")


def render(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]],
           add_generation_prompt: bool = True) -> list[int]:
    """Ids of `messages` ({"role", "content"}), ending where the assistant is to go on.

    Raises ValueError for an unknown role, a message without text, or a tokenizer without turns.
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
