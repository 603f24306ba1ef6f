"""From one row of logits to one token, as a request's parameters say.

The draw itself is `fira.model.generate.sample`; here stand what a single request adds: penalties
and biases that depend on its own tokens, a generator of its own, and log-probabilities. Nothing
depends on other requests.
"""
from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from fira.infer.request import SamplingParams, TokenScore
from fira.model.generate import sample


class Sampler:
    """Chooses one request's tokens, one after the other."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int], device: torch.device) -> None:
        self.params = params
        self.seen = set(prompt)
        self.answer: Counter[int] = Counter()
        self.generator = torch.Generator(device)
        if params.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(params.seed)

    def choose(self, logits_V: Tensor) -> int:
        """The next token. Raises ValueError if the logits are no numbers."""
        params = self.params
        logits_V = penalize(logits_V, self.seen, self.answer, params)
        peak = float(logits_V.max())
        if not -math.inf < peak < math.inf:  # NaN too: no comparison with it holds
            raise ValueError(f"the largest logit is {peak}; the model's weights are damaged, or "
                             "logit_bias forbids every token")
        top_p = params.top_p if params.top_p < 1 else None
        token = int(sample(logits_V[None], params.temperature, params.top_k, top_p, self.generator,
                           params.min_p))
        self.seen.add(token)
        self.answer[token] += 1
        return token


def penalize(logits_V: Tensor, seen: Collection[int], answer: Mapping[int, int],
             params: SamplingParams) -> Tensor:
    """Logits after penalties and biases; the same tensor if there are none.

    Repetition (Keskar et al. 2019, equation 2): the logit of every token in `seen`, prompt and
    answer, is divided by the penalty if positive and multiplied if not. Then, for the tokens of the
    answer, count * frequency_penalty + presence_penalty is taken off. Then biases are added.
    """
    repetition = params.repetition_penalty != 1 and bool(seen)
    counted = bool(params.presence_penalty or params.frequency_penalty) and bool(answer)
    if not (repetition or counted or params.logit_bias):
        return logits_V
    logits_V = logits_V.float().clone()
    if repetition:
        ids = logits_V.new_tensor(sorted(seen), dtype=torch.long)
        old = logits_V[ids]
        factor = params.repetition_penalty
        logits_V[ids] = torch.where(old > 0, old / factor, old * factor)
    if counted:
        ids = logits_V.new_tensor(list(answer), dtype=torch.long)
        counts = logits_V.new_tensor(list(answer.values()))
        logits_V[ids] -= counts * params.frequency_penalty + params.presence_penalty
    if params.logit_bias:
        ids = logits_V.new_tensor(list(params.logit_bias), dtype=torch.long)
        logits_V[ids] += logits_V.new_tensor(list(params.logit_bias.values()))
    return logits_V


def score(logits_V: Tensor, token: int, rivals: int) -> TokenScore:
    """The token's log-probability under the model itself, and the likeliest tokens'."""
    return scores(logits_V[None], [token], rivals)[0]


def scores(logits_NV: Tensor, tokens: Sequence[int], rivals: int) -> list[TokenScore]:
    """`score` of one token for each row."""
    logprobs_NV = logits_NV.float().log_softmax(dim=-1)
    ids_N1 = torch.tensor(tokens, device=logits_NV.device)[:, None]
    own = logprobs_NV.gather(-1, ids_N1)[:, 0].tolist()
    best = logprobs_NV.topk(min(rivals, logprobs_NV.shape[-1]), dim=-1)
    return [TokenScore(token, logprob, tuple(zip(ids, values, strict=True)))
            for token, logprob, ids, values in zip(tokens, own, best.indices.tolist(),
                                                   best.values.tolist(), strict=True)]
