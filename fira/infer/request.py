"""One request to the engine, from its prompt to its last event.

The engine calls a request's listener with one `Token` per generated token, including the one that
ends the text, and then exactly once with an `End`. Text is released as soon as its characters are
complete and no stop string can begin in it. So a token's text may be empty; the texts of all
tokens and of the end, joined, are the whole text.
"""
from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fira.infer.sample import SamplingParams, TokenScore, choose_token, score_tokens

__all__ = ["End", "Listener", "QueueFull", "Reason", "Release", "Request", "SamplingParams",
           "Token", "TokenScore", "check_request"]
Reason = Literal["stop", "length", "cancelled", "error"]
SCORED_ROWS = 64  # prompt tokens whose logits over the whole vocabulary are in memory together


@dataclass(frozen=True)
class Token:
    """One generated token and the text it released."""

    id: int
    text: str
    score: TokenScore | None = None  # if asked for
    experts: tuple[tuple[int, ...], ...] | None = None  # [layer][rank] if asked for


@dataclass(frozen=True)
class End:
    """The last event of a request. `text` is what was still held back."""

    reason: Reason
    text: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens whose keys and values another request had computed
    new_tokens: int = 0
    stop: str | None = None  # the stop string that ended the text
    prompt: Sequence[TokenScore] = ()  # if prompt_logprobs was given
    error: str = ""  # one line, if reason is "error"


Listener = Callable[[Token | End], None]


class QueueFull(Exception):
    """The engine takes no more waiting requests; try again later."""


class Request:
    """`ids` are the prompt and then the generated tokens.

    While it runs, a request owns a `slot` of the engine's cache, which holds the keys and values of
    its first `read` tokens. `cancelled` is set by whoever no longer wants it.
    """

    def __init__(self, id: int, prompt: list[int], params: SamplingParams, listener: Listener,
                 token_bytes: list[bytes], end_of_text: int, device: torch.device) -> None:
        self.id, self.params, self.listener = id, params, listener
        self.ids, self.prompt_tokens = prompt, len(prompt)
        self.cancelled = False
        self.slot = -1  # none until its prompt is read
        self.read = self.cached = 0
        self.scores_prompt = params.prompt_logprobs is not None  # such a prompt is read in full
        self.prompt_scores = [TokenScore(prompt[0], None)] if self.scores_prompt else []
        self.ends = {*params.stop_ids} | (set() if params.ignore_end else {end_of_text})
        self.text = Release(token_bytes, params.stop)
        self.generator = torch.Generator(device)
        if params.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(params.seed)

    @property
    def new_tokens(self) -> int:
        return len(self.ids) - self.prompt_tokens

    @property
    def unread(self) -> int:
        return len(self.ids) - self.read

    def score_prompt(self, model: Any, x_ND: Tensor) -> None:
        """Score, if asked for, the prompt tokens that these rows predict; `read` tokens precede."""
        if self.params.prompt_logprobs is None:
            return
        targets = self.ids[self.read + 1:self.read + 1 + len(x_ND)]
        for start in range(0, len(targets), SCORED_ROWS):
            tokens = targets[start:start + SCORED_ROWS]
            logits_NV = model.logits(x_ND[start:start + len(tokens)])
            self.prompt_scores += score_tokens(logits_NV, tokens, self.params.prompt_logprobs)

    def add_token(self, logits_V: Tensor, experts_LK: Tensor | None) -> Token:
        """Choose the next token. Raises ValueError if no logit is finite."""
        params, size = self.params, self.prompt_tokens
        token = choose_token(logits_V, self.ids[:size], self.ids[size:], params, self.generator)
        self.ids.append(token)
        text = "" if token in self.ends else self.text.push(token)
        experts = None
        if params.experts and experts_LK is not None:
            experts = tuple(map(tuple, experts_LK.tolist()))
        score = (None if params.logprobs is None else
                 score_tokens(logits_V[None], [token], params.logprobs)[0])
        return Token(token, text, score, experts)

    def end_reason(self, capacity: int) -> Reason | None:
        """Why the text ends with its latest token; None if it goes on."""
        if self.ids[-1] in self.ends or self.text.stopped:
            return "stop"
        full = self.new_tokens >= self.params.max_new_tokens or len(self.ids) > capacity
        return "length" if full else None

    def end(self, reason: Reason, error: str = "") -> End:
        return End(reason, self.text.finish(), self.prompt_tokens, self.cached, self.new_tokens,
                   self.text.stopped, tuple(self.prompt_scores), error)


def check_request(prompt: Sequence[int], params: SamplingParams, vocab_size: int,
                  capacity: int) -> None:
    """Raises ValueError for a request that can never be run."""
    if not prompt:
        raise ValueError("the prompt is empty; give at least one token, for example the "
                         "end-of-text id")
    for what, ids in (("prompt", prompt), ("logit_bias", params.logit_bias),
                      ("stop_ids", params.stop_ids)):
        odd = next((token for token in ids if not 0 <= token < vocab_size), None)
        if odd is not None:
            raise ValueError(f"token id {odd} in {what} is outside the vocabulary of {vocab_size}; "
                             "encode with this model's own tokenizer")
    if len(prompt) > capacity:
        raise ValueError(f"prompt of {len(prompt)} tokens leaves no room: {capacity} fit; "
                         "shorten it")


class Release:
    """Turns a stream of token ids into text, released once no stop string can begin in it.

    Characters are released whole; bytes that are not UTF-8 become U+FFFD. Ids without text (special
    tokens, and rows that only pad the vocabulary) give none; neither does a character that the end
    of the stream cuts off. Of several stop strings the one that is complete first ends the text,
    and the longest of those complete at once, so that the cut into tokens makes no difference.
    """

    def __init__(self, token_bytes: Sequence[bytes], stop: Sequence[str] = ()) -> None:
        self.token_bytes, self.stop = token_bytes, stop
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.pending = ""
        self.stopped: str | None = None  # the stop string that ended the text

    def push(self, token: int) -> str:
        """The text that this token releases."""
        data = self.token_bytes[token] if token < len(self.token_bytes) else b""
        self.pending += self.decoder.decode(data)
        found = [(self.pending.find(stop) + len(stop), -len(stop), stop)
                 for stop in self.stop if stop in self.pending]
        if found:
            end, _, self.stopped = min(found)
            text, self.pending = self.pending[:end - len(self.stopped)], ""
            return text
        keep = max((_overlap(self.pending, stop) for stop in self.stop), default=0)
        cut = len(self.pending) - keep
        text, self.pending = self.pending[:cut], self.pending[cut:]
        return text

    def finish(self) -> str:
        """What was held back, at an end that no stop string made."""
        text, self.pending = self.pending, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest beginning of `stop` that `text` ends with."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1)
                 if text.endswith(stop[:size])), 0)
