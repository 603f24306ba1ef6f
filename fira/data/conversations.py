"""Files of conversations and of text become rows: token ids, and which of them are trained on.

A conversation is trained on in its assistant turns only: their thoughts, text and calls and the
token that ends the turn, never the head of the turn. Text is trained on in all of it.
"""
from __future__ import annotations

import collections
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fira.data.chat import can_think, turns
from fira.data.records import read_record, records, unread_records
from fira.data.sources import RECORDS, Input, Tally, inputs, note
from fira.data.text import items
from fira.data.tokenizer import THINK, THINK_END, TURN_END, TURN_START, Tokenizer

ROLE_OF = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant",
           "developer": "system", "observation": "tool", "function_response": "tool"}
QUESTIONS = ("instruction", "prompt", "question", "query")
ANSWERS = ("output", "completion", "response", "answer")
CONTEXTS = ("input", "context")  # what a question is about, after it
SYSTEMS = ("system", "system_prompt")
FORMS = ("messages", "conversations (from, value)", f"one of {', '.join(QUESTIONS)} with one of "
         f"{', '.join(ANSWERS)}")
SHORTENED = "cut after the last answer that fits"
TOO_LONG = "left out, too long for their first answer"
NO_ANSWER, AT_FAULT = "left out, without an answer to train on", "left out, at fault"
FAULTS = (TypeError, AttributeError, LookupError, ValueError)  # of a row that is none
_THOUGHTS = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)

WHOLE = 1 << 40  # ids: a limit for rows that are never shortened


class Row(NamedTuple):
    """Ids of a conversation or a piece of text, and whether each is a target: [n] both. Rows of
    one conversation have one number of a `group`."""

    ids: np.ndarray
    trained: np.ndarray
    group: int = 0


class Conversation(NamedTuple):
    """Messages ({"role", "content"}, and what `fira.data.chat.turns` reads), and the tools."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]


def find_form(record: Any) -> tuple[str, ...]:
    """The keys under which a record has its conversation. Raises ValueError if it has none."""
    keys = record if isinstance(record, dict) else {}
    for form in (("messages",), ("conversations",)):
        if isinstance(keys.get(form[0]), list):
            return form
    for found in ((question, answer) for question in QUESTIONS for answer in ANSWERS):
        if all(keys.get(key) is not None for key in found):
            return found
    raise ValueError(f"no conversation under the keys {', '.join([*keys][:8]) or '(none)'}; use "
                     f"{'; '.join(FORMS)}; text is given with --text")


def read_conversation(record: Any) -> Conversation:
    """The conversation of a record, checked. Raises ValueError, with the message's number."""
    form, tools = find_form(record), record.get("tools") or []
    asked, answer = _question(record, form[0]) if len(form) == 2 else [], record[form[-1]]
    if not isinstance(answer, list):
        answer = [{"role": "assistant", "content": answer}]
    messages = [_message(number, one) for number, one in enumerate([*asked, *answer])]
    for message in messages[:len(asked)]:  # a question may have answers to earlier ones in it
        message["train"] = False
    tools = json.loads(tools) if isinstance(tools, str) else tools
    if not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError("tools is no list of objects")
    _check_order(messages)
    return Conversation(messages, tools)


def _question(record: Any, key: str) -> list[Any]:
    """The messages before an answer: a list of them, or a text with what it is about."""
    if isinstance(record[key], list):
        return record[key]
    parts = [record[key], *(record[name] for name in CONTEXTS if record.get(name))]
    text = "\n\n".join(parts) if all(isinstance(part, str) for part in parts) else None
    return [*({"role": "system", "content": record[name]} for name in SYSTEMS if record.get(name)),
            {"role": "user", "content": text}]


def _message(number: int, given: Any) -> dict[str, Any]:
    """A message with a role that chat turns know; an answer is stripped of white space around it,
    and of its thoughts, which get a field of their own."""
    if not (isinstance(given, dict) and given.keys() & {"role", "from"}):
        raise ValueError(f"message {number} has no role")
    role = str(given.get("role", given.get("from")))
    message = given | {"role": ROLE_OF.get(role, role),
                       "content": given.get("content", given.get("value"))}
    if message["role"] == "assistant" and isinstance(message["content"], str):
        split = None if message.get("reasoning_content") else _THOUGHTS.match(message["content"])
        thoughts = {"reasoning_content": split[1].strip()} if split else {}
        message |= thoughts | {"content": (split[2] if split else message["content"]).strip()}
    return message


def _check_order(messages: list[dict[str, Any]]) -> None:
    before = ""
    for number, message in enumerate(messages):
        role = message["role"]
        if role == before != "tool":
            raise ValueError(f"message {number} is of the {role} like the one before it; join them")
        if role == "system" and number:
            raise ValueError(f"message {number} is of the system, which speaks only first")
        if role == "assistant" and not (message["content"] or message.get("tool_calls")):
            raise ValueError(f"message {number}, an answer, is empty")
        before = role


def split(conversation: Conversation) -> list[Conversation]:
    """What is read when each of its answers is generated, for which no earlier thoughts are read:
    it ends after each question that is answered with a thought, and where it ends itself. Every
    answer is trained on in one of these."""
    messages, tools = conversation
    asked = [number for number, one in enumerate(messages) if one["role"] == "user"]
    ends = {next((later for later in asked if later > number), len(messages))
            for number, one in enumerate(messages) if one.get("reasoning_content") is not None}
    found, done = list[Conversation](), 0
    for end in sorted(ends | {len(messages)}):
        if not found or any(one["role"] == "assistant" for one in messages[done:end]):
            before = [one | {"train": False} for one in messages[:done]]
            found.append(Conversation([*before, *messages[done:end]], tools))
            done = end
    return found


def without_thoughts(conversation: Conversation) -> list[Conversation]:
    """The conversation with empty thoughts in place of its thoughts; nothing if it has none."""
    messages = [one | {"reasoning_content": ""} if one.get("reasoning_content") else one
                for one in conversation.messages]
    return [Conversation(messages, conversation.tools)] * (messages != conversation.messages)


def chat_row(tokenizer: Tokenizer, conversation: Conversation,
             longest: int) -> tuple[Row | None, str, int]:
    """The row of a conversation, what became of it ("" if it is whole), and how many ids are needed
    for its first answer. Raises ValueError for thoughts without the tokens around them.

    Whole turns are kept while they fit into `longest` ids, up to an answer that is trained on; None
    if not even the first one fits, or if there is none. A message is not trained on if its field
    `train` is false or its `weight` 0.
    """
    answers = (all(message.get(key) not in (False, 0) for key in ("train", "weight"))
               for message in conversation.messages if message["role"] == "assistant")
    if not can_think(tokenizer) and any(message.get("reasoning_content") is not None
                                        for message in conversation.messages):
        raise ValueError(f"the tokenizer of this base has no {THINK} or no {THINK_END}, which "
                         "thoughts need; tune a base whose tokenizer has them (those of fira "
                         "tokenizer train and Qwen3 do)")
    ids: list[int] = []
    spans: list[slice] = []
    size = 0
    for turn in turns(tokenizer, *conversation):
        before = len(ids)
        ids += turn.ids
        trained = turn.role == "assistant" and next(answers)
        if len(ids) > longest and (size or trained):
            break
        if trained:
            spans.append(slice(before + turn.start, before + turn.stop))
            size = len(ids)
    else:
        if not size:
            return None, NO_ANSWER, 0
    if not size:
        return None, TOO_LONG, len(ids)
    mask = np.zeros(size, bool)
    for span in spans:
        mask[span] = True
    return Row(np.array(ids[:size], np.int32), mask), SHORTENED * (len(ids) > longest), size


def check_turns(tokenizer: Tokenizer) -> None:
    """Raises ValueError if the tokenizer has no tokens that begin and end a turn."""
    if gone := [name for name in (TURN_START, TURN_END) if name not in tokenizer.added]:
        raise ValueError(f"the tokenizer of this base has no {' and no '.join(gone)}, which chat "
                         "turns need; tune it on --text, or tune a base whose tokenizer has them "
                         "(those of fira tokenizer train, Qwen2 and Qwen3 do)")


def _fault(error: Exception) -> str:
    return f"field {error} is missing" if isinstance(error, KeyError) else str(error)


class Reader:
    """Reads rows of at most `longest` ids. `lines` say what was found and `tally` counts what was
    shortened or left out, with the first places; `needed` is the length that the shortest of the
    rows that are too long needs. `direct`: conversations with thoughts are read a second time, with
    empty ones."""

    def __init__(self, tokenizer: Tokenizer, longest: int, skip_bad: bool = False,
                 direct: bool = False) -> None:
        self.tokenizer, self.longest, self.skip_bad = tokenizer, longest, skip_bad
        self.direct, self.groups = direct, itertools.count()
        self.lines: list[str] = []
        self.tally: Tally = {}
        self.needed = 0

    def chat(self, given: Sequence[Input]) -> list[Row]:
        """The rows of all conversations in `given`. Raises ValueError, one line with the place, for
        a record that is none, unless bad ones are left out."""
        check_turns(self.tokenizer)
        rows = list[Row]()
        for place in given:
            if place.ending not in (*RECORDS, "hub", "sotu"):
                raise ValueError(f"{place.name} is text, not conversations (.jsonl, .ndjson, .json "
                                 "or .parquet); give it with --text")
            forms, where = collections.Counter[str](), ""
            for where, record in unread_records([place]):
                try:
                    record = read_record(record)
                    whole = read_conversation(record)
                    given_twice = without_thoughts(whole) if self.direct else []
                    found = [chat_row(self.tokenizer, part, self.longest)
                             for one in (whole, *given_twice) for part in split(one)]
                except FAULTS as error:
                    if not self.skip_bad:
                        raise ValueError(f"{where}: {_fault(error)}; correct this row, leave it "
                                         "out, or give --skip-bad") from error
                    note(self.tally, AT_FAULT, Path(where).name)
                    continue
                forms["/".join(find_form(record))] += 1
                group = next(self.groups) if any(row for row, *_ in found) else 0
                for row, why, needed in found:
                    rows += [row._replace(group=group)] if row else []
                    if why:
                        note(self.tally, why, Path(where).name)
                    if why == TOO_LONG:
                        self.needed = min(needed, self.needed or needed)
            if not where:
                raise ValueError(f"{place.name} holds no conversation; give a file with "
                                 f"{'; '.join(FORMS)}")
            self.lines.append(f"{Path(place.name).name}: {forms.total():,} conversations "
                              f"({', '.join(forms) or 'none'})")
        return rows

    def text(self, given: Sequence[Input]) -> list[Row]:
        """The rows of documents between end-of-text tokens. A document is cut into rows each of
        which begins with the last id of the one before it: every id is a target once."""
        rows = list[Row]()
        for place in given:
            _refuse_conversations(place)
            count, number = len(rows), 0
            end = np.array([self.tokenizer.end_of_text], np.int32)
            ids = end
            for item in items([place]):
                number += item.ends
                ids = np.concatenate([ids, self.tokenizer.encode_array(item.text).astype(np.int32),
                                      end[:item.ends]])
                while len(ids) >= self.longest or (item.ends and len(ids) > 1):
                    piece = ids[:self.longest]
                    ids = ids[len(piece) - 1:]
                    rows.append(Row(piece, np.arange(len(piece)) > 0, next(self.groups)))
            if not number:
                raise ValueError(f"{place.name} holds no text; leave it out")
            self.lines.append(f"{Path(place.name).name}: {number:,} documents "
                              f"({len(rows) - count:,} rows of text)")
        return rows


def _refuse_conversations(place: Input) -> None:
    """Raises ValueError if the first record is a conversation and no text."""
    if place.ending in RECORDS:
        where, record = next(records([place]), ("", {}))
        try:
            form = find_form(record)
        except ValueError:
            return
        if "text" not in record:
            raise ValueError(f"{where} is a conversation ({'/'.join(form)}), not text; give it "
                             "with --chat")


def without(rows: Sequence[Row], others: Sequence[Row]) -> list[Row]:
    """`rows` without those that are equal to one of `others`."""
    seen = {row.ids.tobytes() for row in others}
    return [row for row in rows if row.ids.tobytes() not in seen]


def pairs(tokenizer: Tokenizer, sources: Sequence[str], skip_bad: bool = False
          ) -> Iterator[tuple[Row, Row] | None]:
    """The rows of the chosen and of the rejected answer of every record; None for a pair at fault,
    if bad ones are skipped. Raises ValueError, one line with the place, if they are not."""
    check_turns(tokenizer)
    for where, record in unread_records(inputs(sources, RECORDS)):
        try:
            chosen, rejected = (chat_row(tokenizer, one, WHOLE)[0]
                                for one in read_pair(read_record(record)))
            assert chosen and rejected, record  # both end with an answer
            yield chosen, rejected
        except FAULTS as error:
            if not skip_bad:
                raise ValueError(f"{where}: {_fault(error)}; correct this row, leave it out, or "
                                 "give --skip-bad") from error
            yield None


def read_pair(record: Any) -> tuple[Conversation, Conversation]:
    """The conversations that end with the chosen and with the rejected answer of a record; only
    that answer is trained on.

    prompt, chosen and rejected are text or messages; the answers may hold the prompt's messages too
    (with or without the field prompt), as on the hub. Raises ValueError for what is no pair.
    """
    if not isinstance(record, dict) or not record.keys() >= {"chosen", "rejected"}:
        found = ", ".join([*record][:8]) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"no pair of answers under {found}; use prompt, chosen and rejected")
    chosen, rejected = (_answered(record, key) for key in ("chosen", "rejected"))
    if chosen.messages[:-1] != rejected.messages[:-1]:
        raise ValueError("chosen and rejected differ before their last message, the answer")
    if chosen == rejected:
        raise ValueError("chosen and rejected are equal")
    return chosen, rejected


def _answered(record: Any, key: str) -> Conversation:
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
    return read_conversation({"prompt": messages[:-1], "completion": messages[-1:],
                              "tools": record.get("tools")})
