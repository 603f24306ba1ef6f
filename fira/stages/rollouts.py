"""Rollouts: answers that the model being trained writes, for a policy gradient or a divergence.

Every answer has a seed of its own, made of numbers, and requests are read together in an order that
does not depend on the clock. So the same weights give the same answers and log-probabilities to the
bit, which a run that is resumed relies on.
"""
from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from fira.data.batches import permute
from fira.data.conversations import Row
from fira.data.packs import Packs
from fira.data.tokenizer import THINK, THINK_END, TURN_END, Tokenizer
from fira.infer.engine import Engine
from fira.infer.load import load
from fira.infer.request import End, SamplingParams, Token
from fira.infer.thought import limit_thought
from fira.loss.policy import PolicyBatch
from fira.loss.preference import log_probabilities
from fira.model.router import routers
from fira.parallel.layout import Layout, read, to_device
from fira.parallel.pipeline import autocast
from fira.stages.reward import Question

SLOTS = 128  # answers that are written at a time
TRIES = 4  # prompts of a place in the batch until one has answers of different rewards
DRY = 5  # steps in a row without any such prompt end the run


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
                chosen = one.experts_LSK.transpose(1, 0, 2)
                experts[sequence, end - len(chosen):end] = chosen
    return [torch.from_numpy(field) for field in (ids, targets, positions, sampled, values,
                                                  np.zeros_like(sampled), experts)]


class Rollouts:
    """Batches of answers to prompts in the order of the run's seed, with their advantages."""

    def __init__(self, config: Any, data: Any, tokenizer: Tokenizer, layout: Layout) -> None:
        self.config, self.data, self.tokenizer, self.layout = config, data, tokenizer, layout
        self.reference: Any = None
        rl = config.rl
        _, limit = limit_thought(layout.model, rl.think, rl.max_thinking_tokens, rl.max_new)
        self.params = SamplingParams(rl.max_new, experts=rl.replay, max_thinking_tokens=limit)
        digest = hashlib.sha256(repr([one.columns for one in data.train]).encode())
        self.key = digest.hexdigest()[:16]

    def answer(self, numbers: Sequence[int], questions: Sequence[Question], size: int,
               temperature: float = 1.0) -> tuple[list[Rollout], np.ndarray]:
        """`size` answers to each question, with seeds made of its number, and their rewards
        [questions, size]. An answer that was cut off is worth nothing."""
        answers = write_answers(
            self.layout.model, self.tokenizer, [one.ids for one in questions for _ in range(size)],
            [draw_seed(self.config.train.seed, number, place) for number in numbers
             for place in range(size)], replace(self.params, temperature=temperature))
        rewards_PG = np.zeros((len(questions), size))
        for question, rewards_G, first in zip(questions, rewards_PG, range(0, len(answers), size),
                                              strict=True):
            some = answers[first:first + size]
            rewards_G[:] = self.data.reward(question, [one.text for one in some])
            np.minimum(rewards_G, 0.0, out=rewards_G, where=[one.truncated for one in some])
        return answers, rewards_PG

    def batch(self, state: Any, fraction: float) -> tuple[list[Any], dict[str, Any], Any]:
        """This rank's micro-batches; the checksum of the prompts and the number of steps without a
        group to learn from; metrics over all ranks."""
        rl, step = self.config.rl, state.step
        missing = list(range(rl.prompts))[self.layout.rows(rl.prompts)]
        answers, advantages, sums = list[Rollout](), list[float](), np.zeros(6)
        for attempt in range(TRIES):
            numbers = [(step * TRIES + attempt) * rl.prompts + place for place in missing]
            found, rewards_PG = self.answer(numbers, list(map(self._draw, numbers)), rl.group)
            useful_P = np.ptp(rewards_PG, axis=1) > 0
            kept_P = useful_P | (attempt == TRIES - 1)
            for index in np.flatnonzero(kept_P):
                answers += found[index * rl.group:(index + 1) * rl.group]
                advantages += (rewards_PG[index] - rewards_PG[index].mean()).tolist()
            sums += (rewards_PG.sum(), sum(len(one.logs_A) for one in found),
                     sum(one.truncated for one in found), rewards_PG.size, useful_P.sum(),
                     len(numbers))
            missing = [place for place, kept in zip(missing, kept_P, strict=True) if not kept]
            if not missing:
                break
        reward, tokens, cut, count, useful, groups = self.layout.sum(
            torch.from_numpy(sums)).tolist()
        dry = 0 if useful else state.position.get("dry", 0) + 1
        if dry == DRY:
            raise ValueError(f"in {DRY} steps up to {step + 1} no prompt had answers of different "
                             f"rewards (mean reward {reward / count:.3g}), so there is nothing to "
                             "learn: give harder tasks if it is near 1; if it has fallen, train "
                             "again from the start with a lower optim.lr")
        row = {"reward": reward / count, "signal": useful / groups, "truncated": cut / count,
               "answer_tokens": tokens / count}
        return self._pack(answers, advantages), {self.key: step + 1, "dry": dry}, row

    def _draw(self, number: int) -> Question:
        """The prompt at a place in the order of all epochs."""
        size = len(self.data.train)
        epoch, place = divmod(number, size)
        return self.data.train[permute(np.array([place]), size, self.config.train.seed, epoch)[0]]

    def _pack(self, answers: list[Rollout], advantages: list[float]) -> list[PolicyBatch]:
        train, spec = self.config.train, self.config.model
        layers = len(routers(self.layout.model)) if self.config.rl.replay else 0
        fields = pack_rollouts(answers, advantages, train.sequence_length, layers, spec.top_k)
        batches = [PolicyBatch(*parts) for parts in zip(*(
            field.split(train.micro_batch) for field in fields), strict=True)]
        if self.config.rl.kl:
            self.reference = self.reference or load(self.config.data.start, str(
                self.layout.mesh.device)).model.eval()
            with torch.no_grad():
                batches = [one._replace(reference_BT=log_probabilities(read(
                    self.reference, on), on).cpu()) for one in batches
                    for on in [to_device(one, self.layout.mesh.device)]]
        return batches

    def describe(self, state: Any) -> str:
        """Raises ValueError if the run of `state` has learned from other tasks."""
        if state.position and self.key not in state.position:
            raise ValueError(f"this run was begun with other tasks (their checksum is not "
                             f"{self.key}); put the files back as they were, or start anew into "
                             "another --run folder")
        return ""
