"""What a training step of each arm costs, measured in turns so that a busy machine is fair to all.

On a shared machine seconds of separate runs do not compare. A step's cost does, if the arms take
turns: then *equal wall clock* means as many steps as the same time buys at that cost.
"""
from __future__ import annotations

import statistics
import time

import torch
from arms import Arm
from shared_expert import shared_expert

from fira.data.batches import Batch
from fira.loss.next_token import next_token_loss
from fira.model.balance import end_step
from fira.model.files import build
from fira.runtime import keep_large_blocks
from fira.train.optim import make_optimizer
from fira.train.step import accumulate, finish_step


class Trainee:
    """One arm's model and optimizer, stepped on random tokens."""

    def __init__(self, arm: Arm) -> None:
        self.config = config = arm.config()
        with shared_expert(arm.shared):
            self.model = build(config.model, seed=1)
        self.optimizer = make_optimizer(self.model, config.optim)
        self.model.train()

    def step(self, length: int) -> float:
        """Seconds of one optimizer step on sequences of `length`, its batch already made."""
        train = self.config.train
        ids = torch.randint(0, self.config.model.vocab_size,
                            (train.batch_tokens // length, length + 1))
        cuts = [Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
                for rows in ids.split(train.rows_of(length))]
        began = time.perf_counter()
        loss, count = accumulate(self.model, cuts, next_token_loss)
        finish_step(self.model, self.optimizer, loss, count, self.config.optim.clip)
        end_step(self.model)
        return time.perf_counter() - began


def step_seconds(arms: list[Arm], threads: int, repeats: int = 11) -> dict[str, float]:
    """Seconds of a step of each arm by its key: the least after two steps to warm up, which other
    users of the machine disturb least, and the mean over the lengths that a run's sequences have.
    Every round begins with another arm."""
    keep_large_blocks()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    trainees = {arm.key: Trainee(arm) for arm in arms}
    seconds: dict[str, dict[int, list[float]]] = {
        arm.key: {length: [] for length in arm.config().train.lengths} for arm in arms}
    for number in range(repeats + 2):
        first = number % len(arms)
        for arm in arms[first:] + arms[:first]:
            for length, found in seconds[arm.key].items():
                found.append(trainees[arm.key].step(length))
    torch.set_num_threads(before)
    return {name: statistics.mean(
                min(seconds[name][trainee.config.train.length_at(tenth / 10)][2:])
                for tenth in range(10)) for name, trainee in trainees.items()}
