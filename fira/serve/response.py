"""The engine's events become one JSON response or the chunks of a stream. No input or output."""
from __future__ import annotations

import base64
import codecs
import json
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fira.infer.request import End, Token, TokenScore
from fira.serve.api import Generation, ServedModel
from fira.serve.schema import ChatRequest, Usage
from fira.serve.structure import CallParser

MIN_LOGPROB = -9999.0  # replaces minus infinity, which JSON cannot express
DONE = b"data: [DONE]\n\n"
KEEPALIVE = b": keepalive\n\n"
Event = Token | End


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
        if self.parser:
            return list(self.parser.push(text, last=self.end is not None))
        return [{"content": text}] if text else []


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

    def usage(self) -> Usage:
        ends = [choice.end for choice in self.choices if choice.end]
        prompt, new = self.generation.prompt_tokens, sum(end.new_tokens for end in ends)
        cached = min(sum(end.cached_tokens for end in ends), prompt)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new,
                "prompt_tokens_details": {"cached_tokens": cached}}

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


def join(deltas: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that these deltas make."""
    calls: list[dict[str, Any]] = []
    content = "".join(delta.get("content", "") for delta in deltas)
    for piece in (piece for delta in deltas for piece in delta.get("tool_calls", ())):
        if "id" in piece:
            calls.append({name: piece[name] for name in ("id", "type", "function")})
        else:
            calls[-1]["function"]["arguments"] += piece["function"]["arguments"]
    message = {"role": "assistant", "content": content or (None if calls else "")}
    return {**message, "tool_calls": calls} if calls else message


def sse(content: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + encode(content) + b"\n\n"


def encode(content: Mapping[str, Any]) -> bytes:
    """JSON in UTF-8."""
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
