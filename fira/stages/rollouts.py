"""Rollouts: answers that the model being trained writes, for a policy gradient or a divergence.

Every answer has a seed of its own, made of numbers, and requests are read together in an order that
does not depend on the clock. So the same weights give the same answers and log-probabilities to the
bit, which a run that is resumed relies on.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from fira.data.conversations import Row
from fira.data.packs import Packs
from fira.data.tokenizer import THINK, THINK_END, TURN_END, Tokenizer
from fira.infer.engine import Engine
from fira.infer.request import End, SamplingParams, Token
from fira.parallel.pipeline import autocast

SLOTS = 128  # answers that are written at a time


class Rollout(NamedTuple):
    """A prompt of P tokens and an answer of A; `row` has the ids of both, and trains the answer.

    logs_A: each token's log-probability when it was sampled; experts_LSK: the experts of the last S
    of the tokens that were read, which are all but the last one, if the params ask for experts. A
    thought stands in `text` between <think> and </think>. Tokens that close a thought at its limit
    were not the model's choice and are not trained on.
    """

    row: Row
    logs_A: np.ndarray
    experts_LSK: np.ndarray | None
    text: str
    truncated: bool


def draw_seed(*numbers: int) -> int:
    """A seed of 63 bits that depends on all the numbers, which are not negative."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def write_answers(model: Any, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]],
                  seeds: Sequence[int], params: SamplingParams) -> list[Rollout]:
    """An answer to each prompt by `params`, but with the prompt's own seed.

    The engine lives for this call only: its cache takes no memory while the model trains, and holds
    nothing of older weights. Raises ValueError, one line, for weights that are damaged.
    """
    if not prompts:
        return []
    known = {name: tokenizer.added[name] for name in (THINK, THINK_END) if name in tokenizer.added}
    params = replace(params, stop_ids=(tokenizer.special(TURN_END),), logprobs=0,
                     named={number: name.encode() for name, number in known.items()})
    longest = max(map(len, prompts)) + params.max_new_tokens
    training, found = model.training, list[list[Token | End]]()
    engine = Engine(model, tokenizer, slots=min(SLOTS, len(prompts)), max_waiting=len(prompts),
                    capacity=min(model.spec.context, longest), prefill_tokens=1 << 30,
                    pause=math.inf)
    try:
        # a compiled block would be compiled again for every number of tokens
        with torch.compiler.set_stance("force_eager"), autocast():
            for ids, seed in zip(prompts, seeds, strict=True):
                found.append([])
                engine.add(ids, replace(params, seed=seed), found[-1].append)
            while engine.step():
                pass
    finally:
        engine.close()
        model.train(training)
    return [_rollout(ids, events) for ids, events in zip(prompts, found, strict=True)]


def _rollout(prompt: Sequence[int], events: Sequence[Token | End]) -> Rollout:
    end, tokens = events[-1], [event for event in events if isinstance(event, Token)]
    assert isinstance(end, End), events
    if end.reason == "error":
        raise ValueError(end.error)
    ids = np.array([*prompt, *(token.id for token in tokens)], np.int32)
    experts = None if end.experts_LSK is None else end.experts_LSK.cpu().numpy().astype(np.int16)
    trained = np.array([*[False] * len(prompt), *(not token.forced for token in tokens)])
    thought = "".join(token.text for token in tokens if token.thought)
    said = "".join(event.text for event in events if not getattr(event, "thought", False))
    return Rollout(Row(ids, trained),
                   np.array([token.score.logprob for token in tokens if token.score], np.float32),
                   experts,
                   f"{THINK}{thought}{THINK_END}{said}" if thought else said,
                   end.reason == "length")


def pack_rollouts(rollouts: Sequence[Rollout], advantages: Sequence[float], length: int,
                  layers: int = 0, top_k: int = 1) -> list[torch.Tensor]:
    """The fields of a `PolicyBatch`, without a reference's log-probabilities (0): [B, T = length].

    With `layers` above 0 the experts are there too. The first three fields are a `PackedBatch`.
    """
    packs = Packs([one.row for one in rollouts], length)
    ids, targets, positions = packs.read(np.arange(len(packs)))
    sampled, values = (np.zeros(ids.shape, np.float32) for _ in range(2))
    experts = np.full((*ids.shape, layers, top_k), -1, np.int64)
    for sequence, numbers in enumerate(packs.packs):
        end = 0
        for one, value in ((rollouts[number], advantages[number]) for number in numbers):
            end += len(one.row.ids) - 1
            answer = slice(end - len(one.logs_A), end)
            sampled[sequence, answer], values[sequence, answer] = one.logs_A, value
            if layers and one.experts_LSK is not None:
                read = one.experts_LSK.transpose(1, 0, 2)
                experts[sequence, end - len(read):end] = read
    return [torch.from_numpy(field) for field in (ids, targets, positions, sampled, values,
                                                  np.zeros_like(sampled), experts)]
