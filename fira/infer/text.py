"""Text from a model and its tokenizer: the continuation of one prompt, or a conversation.

The window slides when it is full, so that a text may become longer than what the model reads at
once.
"""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any

from fira.data.chat import prompt_ids
from fira.data.tokenizer import TURN_END
from fira.infer.cache import DecodeStep
from fira.infer.engine import Engine
from fira.infer.request import End, SamplingParams, Token
from fira.infer.thought import limit_thought


def complete(model: Any, tokenizer: Any, prompt: str, params: SamplingParams,
             decode_step: DecodeStep | None = None,
             ended: Callable[[End], None] | None = None) -> Iterator[str]:
    """Yield the continuation of `prompt` as text, without the prompt, then call `ended`.

    As in training, the model reads the end-of-text token before the prompt. Raises ValueError at
    once, also for an empty prompt.
    """
    if not prompt:
        raise ValueError("the prompt is empty; give the text to continue, for example "
                         "'The state of the Union is'")
    engine = Engine(model, tokenizer, slots=1, slide=True, decode_step=decode_step)
    ids = [tokenizer.end_of_text, *tokenizer.encode(prompt)]
    return _closing(engine, _texts(engine.stream(ids, params), ended))


def _closing(engine: Engine, texts: Iterator[str]) -> Iterator[str]:
    with contextlib.closing(engine):
        yield from texts


def stream_text(engine: Engine, ids: Sequence[int], params: SamplingParams) -> Iterator[str]:
    """Yield what follows `ids` as text.

    Raises ValueError: at once for a request that cannot be run, later if no token can be chosen.
    """
    return _texts(engine.stream(ids, params))


class Thinking(str):
    """Text of the thought before an answer."""


def _texts(events: Generator[Token | End, None, None],
           ended: Callable[[End], None] | None = None) -> Iterator[str]:
    with contextlib.closing(events):
        for event in events:
            if event.text:
                thinks = isinstance(event, Token) and event.thought
                yield Thinking(event.text) if thinks else event.text
    if isinstance(event, End) and event.error:
        raise ValueError(event.error)
    if isinstance(event, End) and ended:
        ended(event)


class Conversation:
    """Messages so far, cut to what the model can read. `tuned`: the model knows chat turns."""

    def __init__(self, model: Any, tokenizer: Any, tuned: bool, params: SamplingParams,
                 system: str | None = None, decode_step: DecodeStep | None = None,
                 think: str | None = None) -> None:
        """Raises ValueError if params.max_new_tokens leave no room for a message, and as
        `limit_thought`."""
        self.direct, limit = limit_thought(model, think, params.max_thinking_tokens,
                                           params.max_new_tokens)
        self.engine = Engine(model, tokenizer, slots=1, slide=True, decode_step=decode_step)
        self.tokenizer, self.tuned = tokenizer, tuned
        ends = (tokenizer.special(TURN_END),) if tuned else ()
        self.params = replace(params, stop_ids=ends, max_thinking_tokens=limit)
        self.system = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, str]] = []
        self.replies = 0
        window = self.engine.capacity
        self.budget = window - params.max_new_tokens
        if self.budget < 1:
            raise ValueError(f"max_new_tokens={params.max_new_tokens} leaves no room in the window "
                             f"of {window} tokens; give at most {window - 1}")

    def reset(self) -> None:
        self.messages.clear()

    def ask(self, text: str) -> int:
        """Add a user message; returns how many old messages were dropped to make it fit.

        Raises ValueError if it does not fit even alone; the conversation is then as before.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        kept = messages
        while (length := len(self.prompt(kept))) > self.budget and len(kept) > 1:
            kept = kept[2:]  # a user's message and its reply
        if length > self.budget:
            raise ValueError(f"the message takes {length} tokens and {self.budget} fit beside a "
                             f"reply of {self.params.max_new_tokens}; shorten it or lower "
                             "max_new_tokens")
        self.messages = list(kept)
        return len(messages) - len(kept)

    def reply(self) -> Generator[str, None, None]:
        """Stream the model's message, a thought as Thinking; what was said when the stream ends or
        is closed is kept, without the thought."""
        said: list[str] = []
        params = self.params
        if params.seed is not None:  # each reply draws differently, and a conversation repeats
            params = replace(params, seed=params.seed + self.replies)
        self.replies += 1
        try:
            for text in stream_text(self.engine, self.prompt(self.messages), params):
                said += [] if isinstance(text, Thinking) else [text]
                yield text
        finally:
            self.messages.append({"role": "assistant", "content": "".join(said)})

    def prompt(self, messages: list[dict[str, str]]) -> list[int]:
        """The ids that the model reads, the system message first."""
        return prompt_ids(self.tokenizer, [*self.system, *messages], self.tuned,
                          direct=self.direct)
