"""What is asked of the engine and what it answers: plain values, no torch.

The engine calls a request's listener with one `Piece` per generated token, the one that ended the
answer included, and then, exactly once, with an `End`. Text is released as soon as its characters
are whole and no stop string can begin in it, so the text of a piece may be empty, and the text of
all pieces and the end together is the answer.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Reason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens. Raises ValueError, one line, on a value out of range."""

    max_new_tokens: int = 128
    temperature: float = 1.0  # 0 is greedy
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0  # drops tokens below this share of the likeliest one's probability
    repetition_penalty: float = 1.0  # over prompt and answer (Keskar et al. 2019)
    presence_penalty: float = 0.0  # over the answer, as OpenAI defines both
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added to a token's logit
    stop: tuple[str, ...] = ()  # the answer ends before the one that is complete first
    stop_ids: tuple[int, ...] = ()  # ids that end the answer, beside the end of text
    ignore_end: bool = False  # go on after the end of text
    seed: int | None = None  # None: another answer each time
    logprobs: int | None = None  # with every token its log-probability and this many rivals
    prompt_logprobs: int | None = None  # the same for the prompt, in `End.prompt`
    experts: bool = False  # with every token the experts that spoke for it, per layer

    def __post_init__(self) -> None:
        rules = {
            "max_new_tokens": (self.max_new_tokens >= 0, "0 or more"),
            "temperature": (0 <= self.temperature < math.inf, "a number of at least 0"),
            "top_k": (self.top_k is None or self.top_k >= 1, "at least 1, or left out"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "above 0; 1 is none"),
            "presence_penalty": (math.isfinite(self.presence_penalty), "a finite number"),
            "frequency_penalty": (math.isfinite(self.frequency_penalty), "a finite number"),
            "logit_bias": (all(bias < math.inf for bias in self.logit_bias.values()),
                           "numbers, or -inf to forbid a token"),
            "stop": ("" not in self.stop, "strings that are not empty"),
            "logprobs": (self.logprobs is None or self.logprobs >= 0, "0 or more, or left out"),
            "prompt_logprobs": (self.prompt_logprobs is None or self.prompt_logprobs >= 0,
                                "0 or more, or left out"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)} must be {rule}")


@dataclass(frozen=True)
class TokenScore:
    """One token, its log-probability under the model, and its likeliest rivals, best first.

    Log-probabilities are of the model itself, before temperature, penalties and cuts.
    """

    id: int
    logprob: float | None  # None for a prompt's first token, which nothing predicts
    rivals: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
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
    cached_tokens: int = 0  # of the prompt, read from another request's prefix
    new_tokens: int = 0
    stop: str | None = None  # the stop string or None
    prompt: Sequence[TokenScore] = ()  # if prompt_logprobs was given
    error: str = ""  # one line, if reason is "error"


Listener = Callable[[Piece | End], None]


class QueueFull(Exception):
    """The engine holds as many waiting requests as it may; try again later."""
