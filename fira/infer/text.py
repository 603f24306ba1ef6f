"""Text from a model and its tokenizer, without the engine: one prompt, or one conversation.

A window that is full slides (`fira.model.generate`), so that a text may become longer than what the
model reads at once.
"""
from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from fira.data.chat import prompt_ids
from fira.data.tokenizer import TURN_END
from fira.infer.request import Release
from fira.infer.sample import SamplingParams
from fira.model.generate import Step, stream, window_length

ENGINE_ONLY = ("min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias",
               "logprobs", "prompt_logprobs", "experts")


def complete(model: Any, tokenizer: Any, prompt: str, params: SamplingParams,
             step: Step | None = None) -> Iterator[str]:
    """Yield the continuation of `prompt` as text, without the prompt.

    As in training, the model reads the end-of-text token before the prompt. Raises ValueError at
    once, also for an empty prompt.
    """
    if not prompt:
        raise ValueError("the prompt is empty; give the text to continue, for example "
                         "'The state of the Union is'")
    ids = [tokenizer.end_of_text, *tokenizer.encode(prompt)]
    return stream_text(model, tokenizer, ids, params, step)


def stream_text(model: Any, tokenizer: Any, ids: Sequence[int], params: SamplingParams,
                step: Step | None = None) -> Iterator[str]:
    """Yield what follows `ids` as text. `step` reads a token in the model's place.

    Raises ValueError at once for ids outside the vocabulary and for what only the engine can do.
    """
    for name in ENGINE_ONLY:
        value = getattr(params, name)
        if value != getattr(SamplingParams(), name):
            raise ValueError(f"{name}={value} is not supported by plain generation; leave it out, "
                             "or use fira.infer.engine.Engine")
    top_p = params.top_p if params.top_p < 1 else None
    tokens = stream(model, ids, params.max_new_tokens, params.temperature, params.top_k, top_p,
                    params.seed, end_of_text=-1, step=step)
    ends = {*params.stop_ids} | (set() if params.ignore_end else {tokenizer.end_of_text})
    return decode((int(token_B[0]) for token_B in tokens), tokenizer.token_bytes(), params.stop,
                  ends)


def decode(ids: Iterable[int], token_bytes: Sequence[bytes], stop: Sequence[str] = (),
           ends: Iterable[int] = ()) -> Iterator[str]:
    """Text of a stream of ids as `Release` releases it, until an id of `ends` or a `stop` string.
    """
    release, ends = Release(token_bytes, stop), set(ends)
    for token in ids:
        if token in ends:
            break
        text = release.push(token)
        if text:
            yield text
        if release.stopped:
            return
    if text := release.finish():
        yield text


class Conversation:
    """Messages so far, cut to what the model can read. `tuned`: the model knows chat turns."""

    def __init__(self, model: Any, tokenizer: Any, tuned: bool, params: SamplingParams,
                 system: str | None = None, step: Step | None = None) -> None:
        """Raises ValueError if params.max_new_tokens leave no room for a message."""
        self.model, self.tokenizer, self.tuned, self.step = model, tokenizer, tuned, step
        ends = (tokenizer.special(TURN_END),) if tuned else ()
        self.params = replace(params, stop_ids=ends)
        self.system = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, str]] = []
        self.replies = 0
        window = window_length(model)
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
        """Stream the model's message; what was said when the stream ends or is closed is kept."""
        said: list[str] = []
        params = self.params
        if params.seed is not None:  # each reply draws differently, and a conversation repeats
            params = replace(params, seed=params.seed + self.replies)
        self.replies += 1
        try:
            for text in stream_text(self.model, self.tokenizer, self.prompt(self.messages), params,
                                    self.step):
                said.append(text)
                yield text
        finally:
            self.messages.append({"role": "assistant", "content": "".join(said)})

    def prompt(self, messages: list[dict[str, str]]) -> list[int]:
        """The ids that the model reads, the system message first."""
        return prompt_ids(self.tokenizer, [*self.system, *messages], self.tuned)
