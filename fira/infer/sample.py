"""How one token is chosen: the parameters of a request, and from a row of logits to a token.

The draw itself is `fira.model.generate.sample`. What a request adds stands here: penalties and
biases that depend on its own tokens, and log-probabilities. Nothing depends on other requests.
"""
from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fira.model.generate import sample


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens. Raises ValueError, one line, on a value out of range."""

    max_new_tokens: int = 128
    temperature: float = 1.0  # 0 is greedy
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0  # drops tokens below this fraction of the likeliest token's probability
    repetition_penalty: float = 1.0  # over prompt and new tokens (Keskar et al. 2019)
    presence_penalty: float = 0.0  # over new tokens, as OpenAI defines both
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added to a token's logit
    stop: tuple[str, ...] = ()  # strings that end the text, which does not contain them
    stop_ids: tuple[int, ...] = ()  # ids that end the text, as the end-of-text id does
    ignore_end: bool = False  # go on after the end-of-text id
    seed: int | None = None  # None: different tokens each time
    logprobs: int | None = None  # report each token's log-probability and this many likeliest ones
    prompt_logprobs: int | None = None  # the same for the prompt's tokens, in `End.prompt`
    experts: bool = False  # report the experts that processed each token, per layer

    def __post_init__(self) -> None:
        rules = {
            "max_new_tokens": (self.max_new_tokens >= 0, "0 or more"),
            "temperature": (0 <= self.temperature < math.inf,
                            "a number of at least 0; 0 is greedy"),
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
    """One token's log-probability, and the likeliest tokens in its place, best first.

    Log-probabilities are the model's own, before temperature, penalties and cuts.
    """

    id: int
    logprob: float | None  # None for a prompt's first token, which nothing predicts
    top: tuple[tuple[int, float], ...] = ()


def choose_token(logits_V: Tensor, prompt: Sequence[int], new: Sequence[int],
                 params: SamplingParams, generator: torch.Generator) -> int:
    """The token after `prompt` and the `new` tokens. Raises ValueError if no logit is finite."""
    logits_V = penalize(logits_V, prompt, new, params)
    largest = float(logits_V.max())
    if not math.isfinite(largest):  # NaN too
        raise ValueError(f"the largest logit is {largest}; the model's weights are damaged, or "
                         "logit_bias forbids every token")
    top_p = params.top_p if params.top_p < 1 else None
    return int(sample(logits_V[None], params.temperature, params.top_k, top_p, generator,
                      params.min_p))


def penalize(logits_V: Tensor, prompt: Sequence[int], new: Sequence[int],
             params: SamplingParams) -> Tensor:
    """Logits after penalties and biases; the same tensor if there are none.

    Repetition (Keskar et al. 2019, equation 2): the logit of every token of prompt and `new` is
    divided by the penalty if positive and multiplied by it if not. Then, for the tokens in `new`,
    count * frequency_penalty + presence_penalty is subtracted. Then biases are added.
    """
    repetition = params.repetition_penalty != 1
    counted = bool((params.presence_penalty or params.frequency_penalty) and new)
    if not (repetition or counted or params.logit_bias):
        return logits_V
    logits_V = logits_V.float().clone()
    if repetition:
        ids = logits_V.new_tensor(sorted({*prompt, *new}), dtype=torch.long)
        old = logits_V[ids]
        factor = params.repetition_penalty
        logits_V[ids] = torch.where(old > 0, old / factor, old * factor)
    if counted:
        counter = Counter(new)
        ids = logits_V.new_tensor(list(counter), dtype=torch.long)
        counts = logits_V.new_tensor(list(counter.values()))
        logits_V[ids] -= counts * params.frequency_penalty + params.presence_penalty
    if params.logit_bias:
        ids = logits_V.new_tensor(list(params.logit_bias), dtype=torch.long)
        logits_V[ids] += logits_V.new_tensor(list(params.logit_bias.values()))
    return logits_V


def score_tokens(logits_NV: Tensor, tokens: Sequence[int], top: int) -> list[TokenScore]:
    """One token's score for each row, with its `top` likeliest tokens."""
    logprobs_NV = logits_NV.float().log_softmax(dim=-1)
    ids_N1 = torch.tensor(tokens, device=logits_NV.device)[:, None]
    own = logprobs_NV.gather(-1, ids_N1)[:, 0].tolist()
    best = logprobs_NV.topk(min(top, logprobs_NV.shape[-1]), dim=-1)
    return [TokenScore(token, logprob, tuple(zip(ids, values, strict=True)))
            for token, logprob, ids, values in zip(tokens, own, best.indices.tolist(),
                                                   best.values.tolist(), strict=True)]
