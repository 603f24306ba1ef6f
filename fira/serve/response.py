"""The engine's events become one JSON response or the chunks of a stream. No input or output."""
from __future__ import annotations

import codecs
import json
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fira.infer.request import End, Token, TokenScore
from fira.serve.api import Generation, ServedModel
from fira.serve.schema import (
    APIError,
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    Head,
    TextChoice,
    TextCompletion,
    TextLogprobs,
    TokenLogprob,
    Usage,
)

MIN_LOGPROB = -9999.0  # replaces minus infinity, which JSON cannot express
DONE = b"data: [DONE]\n\n"
KEEPALIVE = b": keepalive\n\n"
Event = Token | End


@dataclass
class ChoiceState:
    """What one choice has received so far."""

    text: str = ""  # without the echo
    sent: int = 0  # characters of the text that are already in chunks
    tokens: list[Token] = field(default_factory=list)  # when streaming, those not yet in a chunk
    offsets: list[int] = field(default_factory=list)  # where the text of each token begins
    end: End | None = None


class ResponseBuilder:
    """Collects a generation's events.

    Either `add` takes every event and `response` returns the whole response, or the stream is
    `first_chunks`, `chunks` of every event, and `last_chunks`.
    """

    def __init__(self, generation: Generation, model: ServedModel) -> None:
        self.generation, self.model = generation, model
        self.choices = [ChoiceState() for _ in generation.choices]
        self.request, self.is_chat = generation.request, generation.is_chat
        options = self.request.stream_options
        self.include_usage = bool(options and options.include_usage)
        kind = "chat.completion" if self.is_chat else "text_completion"
        chunk = ".chunk" if self.is_chat and self.request.stream else ""
        self.head: Head = {
            "id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": kind + chunk, "created": int(time.time()), "model": model.name}

    def add(self, index: int, event: Event) -> None:
        """Take one event of a choice. Raises APIError if the engine failed or was closed."""
        choice = self.choices[index]
        if isinstance(event, Token):
            choice.tokens.append(event)
            choice.offsets.append(len(self.generation.echoes[index]) + len(choice.text))
        else:
            if event.reason in ("error", "cancelled"):
                message = event.error or "the server is shutting down; ask again later"
                raise APIError(500 if event.error else 503, message, code=event.reason)
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
        text = choice.text[choice.sent:]
        if not text and choice.end is None:
            return
        key = "content" if self.is_chat else "text"
        if text or choice.tokens:
            yield self._chunk(index, {key: text}, None, choice.tokens, choice.offsets)
        choice.sent, choice.tokens, choice.offsets = len(choice.text), [], []
        if choice.end:
            yield self._chunk(index, {} if self.is_chat else {"text": ""}, choice.end.reason)

    def last_chunks(self) -> Iterator[bytes]:
        """The chunks after every choice has ended."""
        if self.include_usage:
            yield sse({**self.head, "choices": [], "usage": self.usage()})
        yield DONE

    def response(self) -> ChatCompletion | TextCompletion:
        """The response to a request that does not stream."""
        indices = range(len(self.choices))
        if self.is_chat:
            return {**self.head, "choices": [self._chat_choice(index) for index in indices],
                    "usage": self.usage()}
        return {**self.head, "choices": [self._text_choice(index) for index in indices],
                "usage": self.usage()}

    def usage(self) -> Usage:
        ends = [choice.end for choice in self.choices if choice.end]
        prompt, new = self.generation.prompt_tokens, sum(end.new_tokens for end in ends)
        cached = min(sum(end.cached_tokens for end in ends), prompt)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new,
                "prompt_tokens_details": {"cached_tokens": cached}}

    def _chat_choice(self, index: int) -> ChatChoice:
        choice = self.choices[index]
        assert choice.end, f"choice {index} has not ended"
        built: ChatChoice = {
            "index": index, "message": {"role": "assistant", "content": choice.text},
            "finish_reason": choice.end.reason, "logprobs": self._chat_logprobs(choice.tokens)}
        if self.request.experts:
            built["experts"] = [token.experts or () for token in choice.tokens]
        return built

    def _text_choice(self, index: int) -> TextChoice:
        choice = self.choices[index]
        assert choice.end, f"choice {index} has not ended"
        built: TextChoice = {
            "index": index, "text": self.generation.echoes[index] + choice.text,
            "finish_reason": choice.end.reason,
            "logprobs": self._text_logprobs(index, choice.tokens, choice.offsets)}
        if self.request.experts:
            built["experts"] = [token.experts or () for token in choice.tokens]
        return built

    def _chunk(self, index: int, content: dict[str, str], reason: str | None = None,
               tokens: Sequence[Token] = (), offsets: Sequence[int] = ()) -> bytes:
        choice: dict[str, Any] = {"index": index}
        if self.is_chat:
            choice["delta"] = content
        else:
            choice.update(content)
        choice |= {"finish_reason": reason, "logprobs": None}
        if tokens:
            choice["logprobs"] = (self._chat_logprobs(tokens) if self.is_chat else
                                  self._text_logprobs(index, tokens, offsets))
            if self.request.experts:
                choice["experts"] = [token.experts or () for token in tokens]
        usage = {"usage": None} if self.include_usage else {}
        return sse({**self.head, "choices": [choice], **usage})

    def _chat_logprobs(self, tokens: Sequence[Token]) -> ChatLogprobs | None:
        if not self.generation.logprobs:
            return None
        scores = [token.score for token in tokens if token.score]
        return {"content": [{**self._logprob(score.id, score.logprob), "top_logprobs": [
            self._logprob(id, value) for id, value in score.top]} for score in scores]}

    def _logprob(self, id: int, value: float | None) -> TokenLogprob:
        assert value is not None, "only a prompt's first token has no log-probability"
        return {"token": self.model.name_of(id), "logprob": max(value, MIN_LOGPROB),
                "bytes": list(self.model.bytes_of(id))}

    def _text_logprobs(self, index: int, tokens: Sequence[Token],
                       offsets: Sequence[int]) -> TextLogprobs | None:
        if not self.generation.logprobs:
            return None
        scores = [token.score for token in tokens if token.score]
        end = self.choices[index].end
        if self.generation.echoes[index] and end:
            prompt = list(end.prompt)[self.generation.hidden_tokens:]
            scores = prompt + scores
            offsets = [*self._prompt_offsets(prompt), *offsets]
        return {"tokens": [self.model.name_of(score.id) for score in scores],
                "token_logprobs": [None if score.logprob is None else
                                   max(score.logprob, MIN_LOGPROB) for score in scores],
                "top_logprobs": [self._top_logprobs(score) for score in scores],
                "text_offset": list(offsets)}

    def _top_logprobs(self, score: TokenScore) -> dict[str, float] | None:
        """The likeliest tokens and the chosen one. Two tokens may have one name: the likelier."""
        top: dict[str, float] = {}
        own = [] if score.logprob is None else [(score.id, score.logprob)]
        for id, value in [*score.top, *own]:
            top.setdefault(self.model.name_of(id), max(value, MIN_LOGPROB))
        return top or None

    def _prompt_offsets(self, prompt: Sequence[TokenScore]) -> list[int]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        offsets, length = [], 0
        for score in prompt:
            offsets.append(length)
            length += len(decoder.decode(self.model.bytes_of(score.id)))
        return offsets


def sse(content: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(content, ensure_ascii=False, allow_nan=False,
                                  separators=(",", ":")).encode() + b"\n\n"
