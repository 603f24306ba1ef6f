"""The engine's events become responses: one JSON object, or the chunks of a stream. No I/O."""
from __future__ import annotations

import codecs
import json
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fira.infer.request import End, Token, TokenScore
from fira.serve.api import Job, Served
from fira.serve.schema import Refused

LEAST = -9999.0  # stands for a log-probability of minus infinity, which JSON has no number for
DONE = b"data: [DONE]\n\n"
KEEPALIVE = b": keepalive\n\n"


@dataclass
class Choice:
    """One answer as far as it has come."""

    text: str = ""  # without the echo
    sent: int = 0  # characters of it already in chunks
    pieces: list[Token] = field(default_factory=list)  # in a stream those not yet in a chunk
    offsets: list[int] = field(default_factory=list)  # where each piece's text begins
    end: End | None = None


class Answer:
    """Collects a job's events; `whole` is the response, or `first`, `feed`, `last` its chunks."""

    def __init__(self, job: Job, served: Served) -> None:
        self.job, self.served = job, served
        self.choices = [Choice() for _ in job.choices]
        chat = job.kind == "chat"
        kind = "chat.completion" if chat else "text_completion"
        self.head = {"id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
                     "object": kind + (".chunk" if chat and job.stream else ""),
                     "created": int(time.time()), "model": served.name}

    def hear(self, index: int, event: Token | End) -> None:
        """Take one event. Raises Refused(500) if the engine failed or was closed."""
        choice = self.choices[index]
        if isinstance(event, Token):
            choice.pieces.append(event)
            choice.offsets.append(len(self.job.echoes[index]) + len(choice.text))
        else:
            if event.reason in ("error", "cancelled"):
                why = event.error or "the server is shutting down; ask again later"
                raise Refused(500 if event.error else 503, why, code=event.reason)
            choice.end = event
        choice.text += event.text

    def first(self) -> Iterator[bytes]:
        """What a stream begins with: the role, or the echo."""
        for index, echo in enumerate(self.job.echoes):
            if self.job.kind == "chat":
                yield self._chunk(index, {"role": "assistant", "content": ""}, None, [])
            elif echo:
                yield self._chunk(index, {"text": echo}, None, [])

    def feed(self, index: int, event: Token | End) -> Iterator[bytes]:
        """The chunks an event sets free: text as soon as there is some, with its tokens."""
        self.hear(index, event)
        choice = self.choices[index]
        text = choice.text[choice.sent:]
        if not text and choice.end is None:
            return
        key = "content" if self.job.kind == "chat" else "text"
        if text or choice.pieces:
            yield self._chunk(index, {key: text}, None, choice.pieces, choice.offsets)
        choice.sent, choice.pieces, choice.offsets = len(choice.text), [], []
        if choice.end:
            yield self._chunk(index, {} if key == "content" else {"text": ""}, choice.end.reason,
                              [])

    def last(self) -> Iterator[bytes]:
        """What a stream closes with."""
        if self.job.include_usage:
            yield sse({**self.head, "choices": [], "usage": self.usage()})
        yield DONE

    def whole(self) -> dict[str, Any]:
        """The response of a request that does not stream."""
        choices = []
        for index, choice in enumerate(self.choices):
            assert choice.end, f"choice {index} has not ended"
            text = self.job.echoes[index] + choice.text
            said = ({"message": {"role": "assistant", "content": text}}
                    if self.job.kind == "chat" else {"text": text})
            choices.append({"index": index, **said, "finish_reason": choice.end.reason,
                            **self._details(index, choice.pieces, choice.offsets)})
        return {**self.head, "choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        ends = [choice.end for choice in self.choices if choice.end]
        new = sum(end.new_tokens for end in ends)
        cached = min(sum(end.cached_tokens for end in ends), self.job.prompt_tokens)
        return {"prompt_tokens": self.job.prompt_tokens, "completion_tokens": new,
                "total_tokens": self.job.prompt_tokens + new,
                "prompt_tokens_details": {"cached_tokens": cached}}

    def _chunk(self, index: int, said: dict[str, Any], reason: str | None,
               pieces: Sequence[Token], offsets: Sequence[int] = ()) -> bytes:
        content = {"delta": said} if self.job.kind == "chat" else said
        choice = {"index": index, **content, "finish_reason": reason,
                  **(self._details(index, pieces, offsets) if pieces else {"logprobs": None})}
        usage = {"usage": None} if self.job.include_usage else {}
        return sse({**self.head, "choices": [choice], **usage})

    def _details(self, index: int, pieces: Sequence[Token],
                 offsets: Sequence[int]) -> dict[str, Any]:
        """What was asked to be told of each token."""
        details: dict[str, Any] = {"logprobs": None}
        if self.job.logprobs:
            scores = [piece.score for piece in pieces if piece.score]
            if self.job.kind == "chat":
                details["logprobs"] = {"content": [self._chat_score(s) for s in scores]}
            else:
                details["logprobs"] = self._text_scores(index, scores, list(offsets))
        if self.job.experts:
            details["experts"] = [piece.experts for piece in pieces]
        return details

    def _chat_score(self, score: TokenScore) -> dict[str, Any]:
        return {**self._scored(score.id, score.logprob),
                "top_logprobs": [self._scored(id, value) for id, value in score.top]}

    def _scored(self, id: int, value: float | None) -> dict[str, Any]:
        return {"token": self.served.name_of(id), "logprob": _finite(value),
                "bytes": list(self.served.bytes_of(id))}

    def _text_scores(self, index: int, scores: list[TokenScore],
                     offsets: list[int]) -> dict[str, Any]:
        end = self.choices[index].end
        if self.job.echoes[index] and end:
            prompt = list(end.prompt)[self.job.begun:]
            scores = prompt + scores
            offsets = self._prompt_offsets(prompt) + offsets
        name = self.served.name_of
        tops: list[dict[str, float] | None] = []
        for score in scores:
            top: dict[str, float] = {}
            for id, value in score.top:
                top.setdefault(name(id), _finite(value) or 0.0)
            if score.logprob is not None:
                top.setdefault(name(score.id), _finite(score.logprob) or 0.0)
            tops.append(top or None)
        return {"tokens": [name(score.id) for score in scores],
                "token_logprobs": [_finite(score.logprob) for score in scores],
                "top_logprobs": tops, "text_offset": offsets}

    def _prompt_offsets(self, prompt: Sequence[TokenScore]) -> list[int]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        offsets, length = [], 0
        for score in prompt:
            offsets.append(length)
            length += len(decoder.decode(self.served.bytes_of(score.id)))
        return offsets


def _finite(value: float | None) -> float | None:
    return None if value is None else max(value, LEAST)


def sse(content: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(content, ensure_ascii=False, allow_nan=False,
                                  separators=(",", ":")).encode() + b"\n\n"
