"""The only training loop: a stage brings a recipe, the loop trains, records, saves and evaluates.

A run is never lost: it is saved before every evaluation and when it is asked to stop. What it did
after its newest checkpoint is done again, to the bit, when it is resumed on one CPU. A save is
written while the evaluation and the next step's gradient are computed.
"""
from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from rich.console import Console

from fira.checkpoint import Checkpoints
from fira.model.router import routers, set_progress
from fira.parallel.layout import Layout, LossFn
from fira.runlog import NoLog, ProgressLine, Row, RunLog
from fira.train.config import LoopConfig
from fira.train.optim import ScheduleConfig, rate_factor, set_rates, swap_average, update

SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1  # SLURM can send the last before the limit
TIME_LIMIT = 124  # exit code after train.stop_after_minutes, as that of GNU timeout
MAX_SKIPS = 5  # skipped steps in a row before a run gives up
COLLAPSE_STEPS = 50  # of collapsed routing before it is reported: the first steps recover alone
COLLAPSE_CV = 0.75  # collapsed: above this part of the imbalance with which only K experts work
COLLAPSE_DEAD = 0.25  # or with more than this part of a layer's experts without a token


class BatchSource(Protocol):
    """Where training batches come from. It owns their lengths, row counts and mixture."""

    def batch(self, state: LoopState, fraction: float) -> tuple[list[Any], dict[str, Any], Row]:
        """This rank's micro-batches of the next step, `state.position` after it, more for the row.

        A micro-batch is a NamedTuple of CPU tensors with a `weight`. `fraction` (0..1) of the run
        is done. The result depends on nothing but these numbers, so that a run can be resumed.
        """

    def describe(self, state: LoopState) -> str:
        """What is read, in one line. Raises ValueError if the run of `state` cannot continue."""


class Score(NamedTuple):
    """The number that decides which checkpoint is best; `refused`: why this one is not, in words.
    """

    name: str
    value: float
    lower_is_better: bool = True
    refused: str = ""

    def beats(self, other: float | None) -> bool:
        if other is None or math.isnan(other):
            return True
        return self.value < other if self.lower_is_better else self.value > other


Probe = Callable[[], "tuple[dict[str, float], Score]"]


class Recipe(NamedTuple):
    """What a stage brings to the loop.

    loss_fn(model, batch) returns a mean loss and metrics by name, which are averaged by the
    batches' weights. probe() evaluates the model: a row for the record, and its score. begin(run,
    fresh) is called when the model has its weights; `fresh`: those of the start, before any step.
    """

    batches: BatchSource
    loss_fn: LossFn
    probe: Probe
    begin: Callable[[Path, bool], None] = lambda run, fresh: None


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
    position: dict[str, Any] = field(default_factory=dict)  # of the batch source, in numbers
    worse_in_a_row: int = 0  # evaluations since the best


class Stopped(Exception):
    """A signal or TIME_LIMIT ended this launch, whose exit code is `code`; all is saved."""

    def __init__(self, number: int) -> None:
        limit = number == TIME_LIMIT
        super().__init__("train.stop_after_minutes" if limit else signal.Signals(number).name)
        self.code = number if limit else 128 + number


@dataclass
class Loop:
    """One run. On many ranks each of them runs this loop on its own part of every batch."""

    layout: Layout
    optimizer: torch.optim.Optimizer
    config: LoopConfig
    schedule: ScheduleConfig
    recipe: Recipe
    log: RunLog | NoLog
    checkpoints: Checkpoints
    screen: Console
    state: LoopState = field(default_factory=LoopState)
    stop_signal: int | None = None  # what this rank received
    agreed_signal: int | None = None  # what any rank received, known to all of them
    launched: float = 0.0
    started: float = 0.0
    fraction: float = 0.0
    score: Score | None = None

    def run(self) -> LoopState:
        """Train to the end of the run.

        Raises Stopped on one of SIGNALS or at the launch's time limit, and ValueError after
        MAX_SKIPS skipped steps in a row; in either case the newest checkpoint is whole.
        """
        self.launched = time.perf_counter()
        self.started = self.launched - self.state.seconds
        self._update_fraction()
        patience = self.config.patience or math.inf
        try:
            if self.state.step and self._checkpoint_due():
                self._evaluate()  # the evaluation that followed this checkpoint may have been lost
            with self._signals(), ProgressLine("train", self.screen) as line:
                while self.fraction < 1 and self.state.worse_in_a_row < patience:
                    try:
                        self._step(line)
                    except Stopped:
                        self.optimizer.zero_grad(set_to_none=True)
                        self._save()
                        raise
                    if self._checkpoint_due():
                        self._save()
                        self._evaluate()
        finally:
            self.checkpoints.wait()
        self._end()
        self.checkpoints.prune(self.state.best_step)
        self.screen.print(self.recipe.batches.describe(self.state), soft_wrap=True)
        return self.state

    def _end(self) -> None:
        """Report an early end; evaluate and write the averaged weights, if the run keeps them."""
        state = self.state
        if self.fraction < 1:
            best = f"that of step {state.best_step}" if state.best_step else "the start"
            self._report("stop", f"stopped early at step {state.step}: {state.worse_in_a_row} "
                         f"evaluations were not better than {best}")
        if swap_average(self.optimizer):
            row, score = self.recipe.probe()
            self.log.write("average", state.step, **row, score=score.name)
            self.screen.print(f"averaged weights: {score.name} {score.value:.4f}", soft_wrap=True)
            self.checkpoints.save(state.step, self.layout, None, asdict(state))
            self.checkpoints.wait()
            swap_average(self.optimizer)

    def _report(self, kind: str, text: str, style: str | None = None) -> None:
        """A line on the screen and a row of the record."""
        self.log.write(kind, self.state.step, text=text)
        self.screen.print(text, style=style, soft_wrap=True)

    def _seconds(self) -> float:
        """Time spent on this run, over all its resumptions."""
        return time.perf_counter() - self.started

    def _update_fraction(self) -> None:
        """All ranks use the largest clock value and learn of a signal that any of them received."""
        mesh = self.layout.mesh
        seconds, number = self._seconds(), float(self._request() or 0)
        if mesh.size > 1:
            seconds, number = mesh.agree(seconds, number)
        self.agreed_signal = int(number) or None
        self.fraction = fraction_done(self.config, self.state.step, seconds)
        set_progress(self.layout.model, self.fraction)

    def _checkpoint_due(self) -> bool:
        return self.state.step % self.config.save_every == 0 or self.fraction >= 1

    def _request(self) -> int | None:
        """The signal that this rank received, or TIME_LIMIT if the launch has reached it."""
        minutes = (time.perf_counter() - self.launched) / 60
        late = minutes >= (self.config.stop_after_minutes or math.inf)
        return self.stop_signal or (TIME_LIMIT if late else None)

    def _check_signal(self) -> None:
        """Raises Stopped. One rank may stop between micro-batches; many stop before a step."""
        if number := self._request() if self.layout.mesh.size == 1 else self.agreed_signal:
            raise Stopped(number)

    def _step(self, line: ProgressLine) -> None:
        state, layout, began = self.state, self.layout, time.perf_counter()
        factor = rate_factor(self.schedule, self.fraction)
        set_rates(self.optimizer, state.step, factor)
        seed_step(self.config.seed, state.step, layout.mesh.rank)
        layout.model.train()
        batches, position, read = self.recipe.batches.batch(state, self.fraction)
        tokens = sum(batch.tokens_BT.numel() for batch in batches) * layout.mesh.batch_ranks
        loss, metrics = layout.forward_backward(batches, self.recipe.loss_fn, self._check_signal)
        norm = layout.gradient_norm()
        if layout.mesh.size == 1:
            self.checkpoints.wait()  # its save reads the weights where they are
        updated = update(self.optimizer, loss, norm)
        state.step += 1
        state.tokens += tokens
        state.position = position
        self._update_fraction()
        health = layout.end_step()
        state.skipped += not updated
        row = {"loss": _finite(loss), **{name: _finite(value) for name, value in metrics.items()},
               "lr": self.optimizer.param_groups[0]["peak_lr"] * factor,
               "grad_norm": _finite(norm), "tokens": state.tokens,
               "tokens_per_second": round(tokens / (time.perf_counter() - began), 1),
               "seconds": round(self._seconds(), 3), "imbalance": None, "dead": 0,
               "skipped": state.skipped, **read}
        if health:
            row |= {"imbalance": sum(health["cv"]) / len(health["cv"]), "dead": sum(health["dead"])}
        self.log.write("step", state.step, **row)
        if health and self._checkpoint_due():
            self.log.write("routing", state.step, **health)
        line.update(min(self.fraction, 1.0), self._note(row), self._seconds())
        if health:
            self._watch_routing(health)
        self._limit_skips(updated, loss, norm)

    def _note(self, row: dict[str, Any]) -> str:
        """The newest step in a few words, for the progress line."""
        loss = "not finite" if row["loss"] is None else f"{row['loss']:.3f}"
        parts = [f"step {self.state.step} loss {loss}"]
        if self.score is not None:
            parts.append(f"{self.score.name.replace('_', ' ')} {self.score.value:.3f}")
        parts.append(f"{row['tokens_per_second']:,.0f} tok/s")
        if row["imbalance"] is not None:
            parts.append(f"cv {row['imbalance']:.2f}")
        for name in ("dead", "skipped"):
            if row[name]:
                parts.append(f"{name} {row[name]}")
        return " ".join(parts)

    def _watch_routing(self, health: dict[str, Any]) -> None:
        """Report once, in a line and a row, that routing has been collapsed for a while."""
        state, text = self.state, describe_collapse(health, routers(self.layout.model)[0].top_k)
        state.collapsed_in_a_row = state.collapsed_in_a_row + 1 if text else 0
        if state.collapsed_in_a_row == COLLAPSE_STEPS:
            text = (f"routing has been collapsed for {COLLAPSE_STEPS} steps up to {state.step}: "
                    f"{text}")
            self._report("event", text, "yellow")

    def _limit_skips(self, updated: bool, loss: float, norm: float) -> None:
        state = self.state
        if updated:
            state.skipped_in_a_row = 0
            return
        state.skipped_in_a_row += 1
        self._report("event", f"step {state.step} skipped: loss {loss}, gradient norm {norm}",
                     "red")
        if state.skipped_in_a_row == MAX_SKIPS:
            raise ValueError(f"{MAX_SKIPS} steps in a row up to step {state.step} had a loss or "
                             "gradient that is not finite; the newest checkpoint was saved before "
                             "them: lower optim.lr or look at the data, then continue with "
                             "--resume")

    def _save(self) -> None:
        self.state.seconds = self._seconds()
        self.log.sync()
        self.checkpoints.save(self.state.step, self.layout, self.optimizer, asdict(self.state))

    def _evaluate(self) -> None:
        """Score the model, remember the best step, delete older checkpoints."""
        state = self.state
        row, self.score = self.recipe.probe()
        self.log.write("validation", state.step, tokens=state.tokens,
                       seconds=round(self._seconds(), 3), **row, score=self.score.name,
                       lower_is_better=self.score.lower_is_better)
        state.worse_in_a_row += 1
        if self.score.refused:
            self._report("event", f"step {state.step}: {self.score.refused}", "yellow")
        elif self.score.beats(state.best_score):
            state.best_score, state.best_step = self.score.value, state.step
            state.worse_in_a_row = 0
        self.checkpoints.prune(state.best_step)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Turn the first signal into a request; a second SIGINT or SIGTERM ends the process."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        def request(received: int, _: Any) -> None:
            self.stop_signal = received
            for number in SIGNALS[:2]:
                signal.signal(number, before[number])

        before = {number: signal.signal(number, request) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Seed dropout for one step from its number alone: a resumed run needs no saved state."""
    torch.manual_seed((seed * 0x9E3779B97F4A7C15 + step + rank * 0xD1B54A32D192ED03) % 2**63)


def fraction_done(config: LoopConfig, step: int, seconds: float) -> float:
    """The fraction of the run that is done, 0..1: by steps or by the clock, the larger."""
    by_steps = step / config.steps if config.steps else 0.0
    by_clock = seconds / (60 * config.minutes) if config.minutes else 0.0
    return max(by_steps, by_clock)


def describe_collapse(health: dict[str, Any], top_k: int) -> str | None:
    """Which layers' routing has collapsed and what to try; None if none has.

    `health` is a routing row. The largest possible imbalance (CV) is sqrt(E/K - 1).
    """
    experts = len(health["load"][0])
    worst = math.sqrt(experts / top_k - 1)
    layers = [layer for layer, (cv, dead) in enumerate(zip(health["cv"], health["dead"],
                                                           strict=True))
              if cv > COLLAPSE_CV * worst or dead > COLLAPSE_DEAD * experts]
    if not layers:
        return None
    return (f"layers {', '.join(map(str, layers))} have an imbalance (cv) of up to "
            f"{max(health['cv'][layer] for layer in layers):.2f} of at most {worst:.2f} and up to "
            f"{max(health['dead'][layer] for layer in layers)} of {experts} experts without a "
            "token; try a larger model.balance_weight, model.balance=handover or a lower "
            "optim.router_lr")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
