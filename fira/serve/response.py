"""The engine's events become one JSON response or the chunks of a stream. No input or output."""
from __future__ import annotations

import base64
import codecs
import itertools
import json
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fira.infer.request import End, Token, TokenScore
from fira.serve.api import Generation, ServedModel
from fira.serve.schema import APIError, ChatRequest, Usage
from fira.serve.structure import CallParser

MIN_LOGPROB = -9999.0  # replaces minus infinity, which JSON cannot express
DONE = b"data: [DONE]\n\n"
KEEPALIVE = b": keepalive\n\n"
Event = Token | End
PARTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # of items, by the name of a delta
    "reasoning_content": ("rs", {"type": "reasoning", "summary": []},
                          {"type": "reasoning_text", "text": ""}),
    "content": ("msg", {"type": "message", "role": "assistant"},
                {"type": "output_text", "text": "", "annotations": [], "logprobs": []})}


class EmbeddingBuilder:
    """Collects embeddings, each as JSON: a thousand at the end would hold up the event loop."""

    stream = False

    def __init__(self, generation: Generation, model: ServedModel) -> None:
        self.generation, self.model = generation, model
        self.items = [b""] * len(generation.choices)

    def add(self, index: int, event: Event) -> None:
        if isinstance(event, End):
            vector: Any = event.embedding
            if self.generation.request.encoding_format == "base64":
                vector = base64.b64encode(np.array(vector, "<f4").tobytes()).decode()
            self.items[index] = encode({"object": "embedding", "index": index, "embedding": vector})

    def body(self) -> bytes:
        tokens = sum(len(ids) for ids, _ in self.generation.choices)
        head = encode({"object": "list", "model": self.model.name,
                       "usage": {"prompt_tokens": tokens, "total_tokens": tokens}})
        return head[:-1] + b',"data":[' + b",".join(self.items) + b"]}"


@dataclass
class ChoiceState:
    """What one choice has received so far."""

    thoughts: str = ""  # that are in no chunk yet
    text: str = ""  # without the echo
    sent: int = 0  # characters of the text that are already in chunks
    # each token with the position where its text begins; when streaming, those not yet in a chunk
    tokens: list[tuple[Token, int]] = field(default_factory=list)
    end: End | None = None
    parser: CallParser | None = None  # if the text may call tools

    @property
    def finish_reason(self) -> str:
        assert self.end
        called = self.parser and self.parser.calls and self.end.reason == "stop"
        return "tool_calls" if called else self.end.reason

    def deltas(self) -> list[dict[str, Any]]:
        """What the text that is not sent yet adds to a message."""
        text, self.sent = self.text[self.sent:], len(self.text)
        thoughts, self.thoughts = self.thoughts, ""
        found = [{"reasoning_content": thoughts, "reasoning": thoughts}] if thoughts else []
        if self.parser:
            return [*found, *self.parser.push(text, last=self.end is not None)]
        return found + ([{"content": text}] if text else [])


class ResponseBuilder:
    """Collects a generation's events.

    Either `add` takes every event and `body` returns the whole response, or the stream is
    `first_chunks`, `chunks` of every event, and `last_chunks`.
    """

    def __init__(self, generation: Generation, model: ServedModel) -> None:
        self.generation, self.model, self.request = generation, model, generation.request
        self.choices = [ChoiceState(parser=CallParser() if generation.calls else None)
                        for _ in generation.choices]
        self.stream = bool(self.request.stream)
        self.is_chat = isinstance(self.request, ChatRequest)
        self.logprobs = generation.choices[0][1].logprobs is not None
        options = self.request.stream_options
        self.include_usage = bool(options and options.include_usage)
        kind = "chat.completion" if self.is_chat else "text_completion"
        chunk = ".chunk" if self.is_chat and self.request.stream else ""
        self.head = {"id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{uuid.uuid4().hex}",
                     "object": kind + chunk, "created": int(time.time()), "model": model.name}

    def add(self, index: int, event: Event) -> None:
        """Take one event of a choice."""
        choice = self.choices[index]
        if isinstance(event, Token) and event.thought:
            choice.thoughts += event.text
            return
        if isinstance(event, Token):
            offset = len(self.generation.echoes[index]) + len(choice.text)
            choice.tokens.append((event, offset))
        else:
            choice.end = event
        choice.text += event.text

    def first_chunks(self) -> Iterator[bytes]:
        """The chunks before any event: the role of a chat, or the echo."""
        for index, echo in enumerate(self.generation.echoes):
            if self.is_chat:
                yield self._chunk(index, {"role": "assistant", "content": ""})
            elif echo:
                yield self._chunk(index, {"text": echo})

    def chunks(self, index: int, event: Event) -> Iterator[bytes]:
        """The chunks that an event completes: text, with its tokens, as soon as there is some."""
        self.add(index, event)
        choice = self.choices[index]
        deltas = choice.deltas() or ([{"content": ""}] if choice.end and choice.tokens else [])
        for delta in deltas:
            content = delta if self.is_chat else {"text": delta["content"]}
            yield self._chunk(index, content, None, choice.tokens)
            choice.tokens = []
        if choice.end:
            yield self._chunk(index, {} if self.is_chat else {"text": ""}, choice.finish_reason)

    def last_chunks(self) -> Iterator[bytes]:
        """The chunks after every choice has ended."""
        if self.include_usage:
            yield sse({**self.head, "choices": [], "usage": self.usage()})
        yield DONE

    def body(self) -> bytes:
        """The response to a request that does not stream."""
        choices = []
        for index, choice in enumerate(self.choices):
            assert choice.end, f"choice {index} has not ended"
            content = ({"message": join(choice.deltas())} if self.is_chat
                       else {"text": self.generation.echoes[index] + choice.text})
            choices.append(self._choice(index, content, choice.finish_reason, choice.tokens))
        return encode({**self.head, "choices": choices, "usage": self.usage()})

    def failed(self, error: APIError) -> bytes:
        """The last chunk of a stream that the engine could not finish."""
        return sse(error.body)

    def usage(self) -> Usage:
        ends = [choice.end for choice in self.choices if choice.end]
        prompt, new = self.generation.prompt_tokens, sum(end.new_tokens for end in ends)
        cached = min(sum(end.cached_tokens for end in ends), prompt)
        thinking = sum(end.thinking_tokens for end in ends)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new,
                "prompt_tokens_details": {"cached_tokens": cached},
                "completion_tokens_details": {"reasoning_tokens": thinking}}

    def _chunk(self, index: int, content: dict[str, Any], reason: str | None = None,
               tokens: list[tuple[Token, int]] | None = None) -> bytes:
        content = {"delta": content} if self.is_chat else content
        usage = {"usage": None} if self.include_usage else {}
        return sse({**self.head, "choices": [self._choice(index, content, reason, tokens or None)],
                    **usage})

    def _choice(self, index: int, content: dict[str, Any], reason: str | None,
                tokens: list[tuple[Token, int]] | None) -> dict[str, Any]:
        """A choice with the log-probabilities and experts of `tokens`, if they were asked for."""
        choice = {"index": index, **content, "finish_reason": reason, "logprobs": None}
        if tokens is not None and self.logprobs:
            choice["logprobs"] = (self._chat_logprobs(tokens) if self.is_chat else
                                  self._text_logprobs(index, tokens))
        if tokens is not None and self.request.experts:
            choice["experts"] = [token.experts or () for token, _ in tokens]
        return choice

    def _chat_logprobs(self, tokens: list[tuple[Token, int]]) -> dict[str, Any]:
        scores = [token.score for token, _ in tokens if token.score]
        return {"content": [{**self._logprob(score.id, score.logprob), "top_logprobs": [
            self._logprob(id, value) for id, value in score.top]} for score in scores]}

    def _logprob(self, id: int, value: float | None) -> dict[str, Any]:
        assert value is not None, "only a prompt's first token has no log-probability"
        return {"token": self.model.name_of(id), "logprob": max(value, MIN_LOGPROB),
                "bytes": list(self.model.token_bytes[id])}

    def _text_logprobs(self, index: int, tokens: list[tuple[Token, int]]) -> dict[str, Any]:
        scores = [token.score for token, _ in tokens if token.score]
        offsets = [offset for _, offset in tokens]
        end = self.choices[index].end
        if self.generation.echoes[index] and end:
            prompt = list(end.prompt)[self.generation.hidden_tokens:]
            scores, offsets = prompt + scores, self._prompt_offsets(prompt) + offsets
        return {"tokens": [self.model.name_of(score.id) for score in scores],
                "token_logprobs": [None if score.logprob is None else
                                   max(score.logprob, MIN_LOGPROB) for score in scores],
                "top_logprobs": [self._top_logprobs(score) for score in scores],
                "text_offset": offsets}

    def _top_logprobs(self, score: TokenScore) -> dict[str, float] | None:
        """The likeliest tokens and the chosen one. Two tokens may have one name: the likelier."""
        top: dict[str, float] = {}
        own = [] if score.logprob is None else [(score.id, score.logprob)]
        for id, value in [*score.top, *own]:
            top.setdefault(self.model.name_of(id), max(value, MIN_LOGPROB))
        return top or None

    def _prompt_offsets(self, prompt: list[TokenScore]) -> list[int]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        offsets, length = [], 0
        for score in prompt:
            offsets.append(length)
            length += len(decoder.decode(self.model.token_bytes[score.id]))
        return offsets


class ItemResponseBuilder(ResponseBuilder):
    """The same for /v1/responses: the message becomes items, and a stream is of named events."""

    def __init__(self, generation: Generation, model: ServedModel) -> None:
        super().__init__(generation, model)
        self.id = f"resp_{uuid.uuid4().hex}"
        self.choice, self.items = self.choices[0], list[dict[str, Any]]()
        self.events = itertools.count()

    @property
    def status(self) -> str:
        end = self.choice.end
        return "in_progress" if not end else "completed" if end.reason == "stop" else "incomplete"

    def first_chunks(self) -> Iterator[bytes]:
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self._describe())

    def chunks(self, index: int, event: Event) -> Iterator[bytes]:
        self.add(index, event)
        yield from self._take()

    def last_chunks(self) -> Iterator[bytes]:
        yield self._event(f"response.{self.status}", response=self._describe())

    def body(self) -> bytes:
        for _ in self._take():
            pass
        return encode(self._describe())

    def failed(self, error: APIError) -> bytes:
        return self._event("error", code=error.code, message=error.message, param=error.param)

    def _take(self) -> Iterator[bytes]:
        """The events of the text that came since the last call, and of the end of the message."""
        for delta in self.choice.deltas():
            for name in PARTS.keys() & delta:
                kind, fields, empty = PARTS[name]
                if not self.items or self.items[-1]["type"] != fields["type"]:
                    part = {**empty}
                    yield from self._open(kind, **fields, content=[part])
                    yield self._event("response.content_part.added", content_index=0, part=part)
                self.items[-1]["content"][0]["text"] += delta[name]
                yield self._event(f"response.{empty['type']}.delta", content_index=0, logprobs=[],
                                  delta=delta[name])
            for call in delta.get("tool_calls", ()):
                function = call["function"]
                if "id" in call:
                    yield from self._open("fc", type="function_call", call_id=call["id"],
                                          **function)
                else:
                    self.items[-1]["arguments"] += function["arguments"]
                    yield self._event("response.function_call_arguments.delta",
                                      delta=function["arguments"])
        if self.choice.end:
            yield from self._close()

    def _open(self, kind: str, **fields: Any) -> Iterator[bytes]:
        yield from self._close()
        item = {"id": f"{kind}_{uuid.uuid4().hex}", "status": "in_progress", **fields}
        self.items.append(item)
        yield self._event("response.output_item.added", item=item)

    def _close(self) -> Iterator[bytes]:
        """The events after the latest item, if there is one."""
        if not self.items:
            return
        item = self.items[-1]
        item["status"] = "incomplete" if self.status == "incomplete" else "completed"
        for part in item.get("content", ()):
            yield self._event(f"response.{part['type']}.done", content_index=0, logprobs=[],
                              text=part["text"])
            yield self._event("response.content_part.done", content_index=0, part=part)
        if "arguments" in item:
            yield self._event("response.function_call_arguments.done", name=item["name"],
                              arguments=item["arguments"])
        yield self._event("response.output_item.done", item=item)

    def _event(self, kind: str, **fields: Any) -> bytes:
        place: dict[str, Any] = {}
        if self.items and "response" not in fields:
            place = {"output_index": len(self.items) - 1, "item_id": self.items[-1]["id"]}
        return f"event: {kind}\n".encode() + sse(
            {"type": kind, "sequence_number": next(self.events), **place, **fields})

    def _describe(self) -> dict[str, Any]:
        asked, usage = self.generation.asked, self.usage()
        assert asked
        given = asked.model_dump(by_alias=True, exclude={"input", "stream", "user", "include"})
        cut = {"reason": "max_output_tokens"} if self.status == "incomplete" else None
        return {**given, "id": self.id, "object": "response", "created_at": self.head["created"],
                "status": self.status, "error": None, "incomplete_details": cut,
                "model": self.model.name, "output": self.items, "metadata": {},
                "tools": given["tools"] or [], "tool_choice": given["tool_choice"] or "auto",
                "parallel_tool_calls": asked.parallel_tool_calls is not False,
                "usage": self.choice.end and {
                    "input_tokens": usage["prompt_tokens"],
                    "input_tokens_details": usage["prompt_tokens_details"],
                    "output_tokens": usage["completion_tokens"],
                    "output_tokens_details": usage["completion_tokens_details"],
                    "total_tokens": usage["total_tokens"]}}


def join(deltas: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that these deltas make."""
    calls: list[dict[str, Any]] = []
    content, thoughts = ("".join(delta.get(name, "") for delta in deltas)
                         for name in ("content", "reasoning"))
    for piece in (piece for delta in deltas for piece in delta.get("tool_calls", ())):
        if "id" in piece:
            calls.append({name: piece[name] for name in ("id", "type", "function")})
        else:
            calls[-1]["function"]["arguments"] += piece["function"]["arguments"]
    message = {"role": "assistant", "content": content or (None if calls else "")}
    if thoughts:
        message |= {"reasoning_content": thoughts, "reasoning": thoughts}
    return {**message, "tool_calls": calls} if calls else message


def sse(content: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + encode(content) + b"\n\n"


def encode(content: Mapping[str, Any]) -> bytes:
    """JSON in UTF-8."""
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
