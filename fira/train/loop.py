"""The only training loop: every stage brings its own batches and loss.

A run is never lost: it is saved before every evaluation, on Ctrl-C and on SIGTERM; what it did
after its newest checkpoint is done again, to the bit, when it is resumed on one CPU.
"""
from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from rich.console import Console

from fira.checkpoint import Checkpoints
from fira.model.moe import fade, routers
from fira.parallel.accumulate import LossFn
from fira.parallel.layout import Layout
from fira.runlog import NoLog, ProgressLine, RunLog
from fira.runtime import seed_step
from fira.train.collapse import PATIENCE, collapse
from fira.train.horizon import TrainConfig, fraction_done
from fira.train.optim import set_step
from fira.train.schedule import ScheduleConfig, factor
from fira.train.step import finish_step

MAX_SKIPS = 5  # non-finite steps in a row before a run gives up


@dataclass
class LoopState:
    """What a resumed run must know besides weights and optimizer state."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    collapsed_in_a_row: int = 0
    best_step: int | None = None
    best_score: float | None = None


class BatchSource(Protocol):
    def batch(self, index: int, length: int) -> Any:
        """The batch of optimizer step `index`, counted from 0: a NamedTuple of tensors [B, length]
        of as many tokens whatever the length."""


class Stopped(Exception):
    """SIGINT or SIGTERM asked the run to end; everything is saved. `number` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@dataclass
class Loop:
    """One run: a stage fills in the parts, `run` does the rest.

    `probe` scores the model on held-out text, read in sequences of the length it is given, and
    returns a validation row (with bits_per_byte);  On many ranks each of them runs
    this loop on its own rows of every batch; `layout` knows what they do together.
    """

    layout: Layout
    optimizer: torch.optim.Optimizer
    clip: float
    config: TrainConfig
    schedule: ScheduleConfig
    batches: BatchSource  # with the rows of this rank
    loss_fn: LossFn
    probe: Callable[[int], dict[str, float]]
    log: RunLog | NoLog
    checkpoints: Checkpoints
    screen: Console
    state: LoopState = field(default_factory=LoopState)
    stop_signal: int | None = None
    started: float = 0.0
    agreed_stop: int | None = None
    fraction: float = 0.0
    length: int = 0  # tokens per sequence of the newest step
    score: float | None = None  # newest validation bits per byte

    def __post_init__(self) -> None:
        self.model = self.layout.model

    def run(self) -> LoopState:
        """Train to the end of the horizon.

        Raises Stopped on SIGINT or SIGTERM, and ValueError after MAX_SKIPS non-finite steps in a
        row; what the newest checkpoint holds is whole in either case.
        """
        self.started = time.perf_counter() - self.state.seconds
        self._update_fraction()
        self.length = min(self.config.length_at(self.fraction),  # or what the last step read
                          self.model.trained_length or self.config.sequence_length)
        if self.state.step and self._checkpoint_due():
            self._evaluate()  # the evaluation that followed this checkpoint may have been lost
        with self._signals(), ProgressLine("train", self.screen) as line:
            while self.fraction < 1:
                try:
                    self._step(line)
                except Stopped:
                    self.optimizer.zero_grad(set_to_none=True)
                    self._save()
                    self.checkpoints.wait()
                    raise
                if self._checkpoint_due():
                    self._save()
                    self._evaluate()
        self.checkpoints.wait()
        self.checkpoints.prune(self.state.best_step)
        return self.state

    def _seconds(self) -> float:
        """Time spent on this run, over all its resumptions."""
        return time.perf_counter() - self.started

    def _update_fraction(self) -> None:
        """All ranks go by the slowest clock and hear of a signal that any of them got."""
        mesh = self.layout.mesh
        seconds, number = mesh.agree(self._seconds(), self.stop_signal or 0)
        if mesh.size > 1:
            self.agreed_stop = int(number) or None
        self.fraction = fraction_done(self.config, self.state.step, seconds)
        fade(self.model, self.fraction)

    def _checkpoint_due(self) -> bool:
        return self.state.step % self.config.save_every == 0 or self.fraction >= 1

    def _step(self, line: ProgressLine) -> None:
        state, began = self.state, time.perf_counter()
        rate = factor(self.schedule, self.fraction)
        set_step(self.optimizer, state.step, rate)
        seed_step(self.config.seed, state.step, self.layout.mesh.rank)
        self.model.train()
        self._lengthen()
        batch = self.batches.batch(state.step, self.length)
        loss, _ = self.layout.forward_backward(self._micro_batches(batch), self.loss_fn,
                                               self._check)
        norm, updated = finish_step(self.model, self.optimizer, loss, self.clip,
                                    self.layout.gradient_norm())
        state.step += 1
        state.tokens += self.config.batch_tokens
        self._update_fraction()
        health = self.layout.end_step()
        speed = self.config.batch_tokens / (time.perf_counter() - began)
        if not updated:
            state.skipped += 1
        self._record(line, loss, norm, rate, speed, health)
        if health:
            self._watch_routing(health)
        self._limit_skips(updated, loss, norm)

    def _lengthen(self) -> None:
        """The model knows the longest sequence it was trained on; None is its whole context."""
        self.length = self.config.length_at(self.fraction)
        if self.model.trained_length is not None:
            self.model.trained_length = max(self.model.trained_length, self.length)

    def _micro_batches(self, batch: Any) -> list[Any]:
        """Cut this rank's batch."""
        count = self.config.rows_of(self.length)
        return [type(batch)(*(part[first:first + count] for part in batch))
                for first in range(0, len(batch[0]), count)]

    def _check(self) -> None:
        """A signal ends a step; many ranks stop together, before one."""
        number = self.stop_signal if self.layout.mesh.size == 1 else self.agreed_stop
        if number is not None:
            raise Stopped(number)

    def _record(self, line: ProgressLine, loss: float, norm: float, rate: float, speed: float,
                health: dict[str, Any] | None) -> None:
        state = self.state
        imbalance = sum(health["cv"]) / len(health["cv"]) if health else None
        dead = sum(health["dead"]) if health else 0
        self.log.write("step", state.step, loss=_finite(loss), lr=self._peak() * rate,
                       grad_norm=_finite(norm), tokens=state.tokens,
                       tokens_per_second=round(speed, 1), seconds=round(self._seconds(), 3),
                       imbalance=imbalance, dead=dead, skipped=state.skipped)
        if health and self._checkpoint_due():
            self.log.write("routing", state.step, **health)
        note = f"step {state.step} loss {loss:.3f}"
        if self.score is not None:
            note += f" val {self.score:.3f} bits/byte"
        note += f" {speed:,.0f} tok/s"
        if imbalance is not None:
            note += f" cv {imbalance:.2f}" + (f" dead {dead}" if dead else "")
        if state.skipped:
            note += f" skipped {state.skipped}"
        line.update(self.fraction, note, self._seconds())

    def _watch_routing(self, health: dict[str, Any]) -> None:
        """Say once, in a line and a row, that routing has been collapsed for a while."""
        state, text = self.state, collapse(health, routers(self.model)[0].top_k)
        state.collapsed_in_a_row = state.collapsed_in_a_row + 1 if text else 0
        if state.collapsed_in_a_row == PATIENCE:
            text = f"routing has been collapsed for {PATIENCE} steps up to {state.step}: {text}"
            self.log.write("event", state.step, text=text)
            self.screen.print(text, style="yellow", soft_wrap=True)

    def _peak(self) -> float:
        return self.optimizer.param_groups[0]["peak_lr"]

    def _limit_skips(self, updated: bool, loss: float, norm: float) -> None:
        state = self.state
        if updated:
            state.skipped_in_a_row = 0
            return
        state.skipped_in_a_row += 1
        text = f"step {state.step} skipped: loss {loss}, gradient norm {norm}"
        self.log.write("event", state.step, text=text)
        self.screen.print(text, style="red", soft_wrap=True)
        if state.skipped_in_a_row == MAX_SKIPS:
            raise ValueError(f"{MAX_SKIPS} steps in a row up to step {state.step} had a non-finite "
                             "loss or gradient; the newest checkpoint is from before them: "
                             "lower optim.lr or look at the data, then continue with --resume")

    def _save(self) -> None:
        self.state.seconds = self._seconds()
        self.log.sync()
        self.checkpoints.save(self.state.step, self.layout, self.optimizer, asdict(self.state))

    def _evaluate(self) -> None:
        """Score the model, remember the best, let older checkpoints go."""
        state, result = self.state, self.probe(self.length)
        self.log.write("validation", state.step, tokens=state.tokens,
                       seconds=round(self._seconds(), 3), **result)
        self.score = result["bits_per_byte"]
        if state.best_score is None or self.score < state.best_score:
            state.best_score, state.best_step = self.score, state.step
        self.checkpoints.prune(state.best_step)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Turn the first SIGINT or SIGTERM into a request; a second ends the process at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.getsignal(number) for number in numbers}

        def request(number: int, _: Any) -> None:
            self.stop_signal = number
            for each in numbers:
                signal.signal(each, before[each])

        for number in numbers:
            signal.signal(number, request)
        try:
            yield
        finally:
            for number in numbers:
                signal.signal(number, before[number])


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
