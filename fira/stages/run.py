"""Open a run, whatever stage it is of: claim, resume, train, close.

All about runs that is not a setting (fira/stages/config.py) or a stage's own stands here, once.
"""
from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from fira import files, runtime
from fira.checkpoint import Checkpoints, read_weights, restore
from fira.config import ConfigError
from fira.data.tokenizer import Tokenizer
from fira.model import build_meta
from fira.model.adapter import adapters
from fira.model.files import CONFIG, knows_chat, read_config
from fira.model.moe import grouping_obstacle
from fira.model.transformer import count_parameters
from fira.parallel.layout import Layout
from fira.parallel.mesh import Mesh, check_fit, joined
from fira.runlog import NoLog, RunLog, tracker
from fira.stages.config import Opened, Plan, Stage, Start, make_plan
from fira.train.loop import Loop, LoopState, fraction_done
from fira.train.optim import make_optimizer, rate_factor
from fira.train.recompute import recompute_blocks


def train_run(stage: Stage, preset: str | None, settings: Iterable[str], run: Path,
              device_name: str, resume: bool, screen: Console, source: Path | None = None,
              step: int | None = None) -> LoopState:
    """Train into the folder `run`, or continue there. Raises ValueError on bad input.

    With `source`, a run or step folder, the model and its first weights are taken from there. To
    resume no preset is needed. With `step`, a run is continued from that checkpoint, and what came
    after it is set aside. Every rank that a launcher started calls this; the first writes.
    """
    resume = resume or step is not None or runtime.launch().restarts > 0
    plan = make_plan(stage, preset, settings, run, resume, source, screen)
    config = plan.config
    if config.parallel.shard == 1:  # sharded layers come and go: kept memory would be twice as much
        runtime.keep_large_blocks()
    with joined(config.parallel, device_name) as mesh, contextlib.ExitStack() as held:
        if mesh.rank:
            screen = Console(quiet=True)
        check_fit(mesh.sizes, config.model, config.train.batch_size, config.train.micro_batch,
                  config.train.sequence_length)
        opened = stage.open(config)
        tokenizer, model = Tokenizer.load(opened.folder), build_meta(config.model)
        check_vocabulary(tokenizer, config.model)
        stage.adapt(config, model, tokenizer)

        def claim() -> None:
            files.make_folder(run)
            held.enter_context(runtime.claim(run))
            if plan.before is None and (run / CONFIG).exists():
                raise ValueError(f"another process has just begun a run in {run}; try again")

        mesh.first(claim)
        loop = _open(stage, plan, run, mesh, opened, tokenizer, model, screen, step)
        held.callback(loop.log.close)
        return loop.run()


def _open(stage: Stage, plan: Plan, run: Path, mesh: Mesh, opened: Opened, tokenizer: Tokenizer,
          model: Any, screen: Console, step: int | None) -> Loop:
    """The loop of a run that this process has claimed, at its newest checkpoint or at `step`."""
    say = partial(screen.print, soft_wrap=True)
    config, start, folder = plan.config, plan.start, opened.folder
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    base = start.folder if start and adapters(model) else None
    checkpoints = Checkpoints(run, folder, mesh, base, config.train.keep_every)
    newest = mesh.first(lambda: checkpoints.newest_whole(say, step))
    origin = newest or (start.folder if start else None)
    if origin is not None:
        _check_same_tokenizer(origin, tokenizer, folder)

    layout = Layout(mesh, model, config.train.seed)
    _note(layout.model, stage, tokenizer, origin)
    recipe = stage.recipe(config, opened.data, tokenizer, layout)
    optimizer = make_optimizer(layout.model, config.optim, stage.weight_decay)
    state = LoopState(**restore(newest, layout, optimizer)) if newest else LoopState()
    _check_length(plan, state)
    text = recipe.batches.describe(state)
    for kept in optimizer.state.values() if config.optim.average is None else ():
        kept.pop("average", None)
    if start and not newest:
        read_weights(start.folder, layout)
    recipe.begin(run, not newest)
    _speed_up(layout.model, config.train.recompute, mesh, screen)
    log: RunLog | NoLog = NoLog()
    if mesh.rank == 0:
        _write_config(run, stage, plan, opened.about, trained)
        sinks = tracker(run, state.step, config.model_dump())
        log = RunLog.resume(run, state.step, say, sinks=sinks)
    for line in opened.lines:
        screen.print(line, soft_wrap=True, markup=False)
    _introduce(config, state, start, trained, mesh, screen)
    if text:
        screen.print(text, soft_wrap=True)
    return Loop(layout, optimizer, config.train, config.schedule, recipe, log, checkpoints, screen,
                state)


def _check_length(plan: Plan, state: LoopState) -> None:
    """Raises ConfigError if the new length of a resumed run is already past."""
    train, before = plan.config.train, plan.before and plan.before.train
    done = fraction_done(train, state.step, state.seconds)
    if done > 1 and before and (train.steps, train.minutes) != (before.steps, before.minutes):
        raise ConfigError(f"{state.step} steps and {state.seconds / 60:.4g} minutes of the run are "
                          f"done, {done:.4g} times the length given now; give a longer one, for "
                          f"example train.steps={2 * state.step}")


def _note(model: Any, stage: Stage, tokenizer: Tokenizer, origin: Path | None) -> None:
    """What the step folders of this run say of their model, besides its spec."""
    model.stage, model.end_of_text = stage.name, tokenizer.end_of_text
    model.chat = bool(origin and knows_chat(origin))
    # 0: nothing read yet. A model made elsewhere has no such note: it reads its whole context.
    notes = read_config(origin / CONFIG)[1] if origin else {"trained_length": 0}
    model.trained_length, model.think = notes["trained_length"], notes.get("think")


def _speed_up(model: Any, recompute: bool, mesh: Mesh, screen: Console) -> None:
    """Recompute blocks to save memory, or compile them on CUDA (compiled code would keep them)."""
    if reason := grouping_obstacle(model, mesh.device):
        screen.print(f"experts are multiplied one after the other: {reason}", soft_wrap=True)
    if recompute:
        recompute_blocks(model)
    elif mesh.device.type == "cuda" and mesh.size == mesh.sizes["data"]:
        for block in model.blocks:  # the same graph for every block, so it is made once
            block.compile(fullgraph=True)


def check_vocabulary(tokenizer: Tokenizer, spec: Any) -> None:
    """Raises ConfigError if the model has no row for some token of `tokenizer`."""
    if tokenizer.vocab_size > spec.vocab_size:
        raise ConfigError(f"model.vocab_size={spec.vocab_size} is smaller than the "
                          f"tokenizer's {tokenizer.vocab_size}; "
                          f"try model.vocab_size={tokenizer.vocab_size}")


def _check_same_tokenizer(step: Path, tokenizer: Tokenizer, folder: Path) -> None:
    trained_with = Tokenizer.load(step).hash
    if trained_with != tokenizer.hash:
        raise ValueError(f"{folder} was made with tokenizer {tokenizer.hash[:12]}, "
                         f"but {step} was trained with {trained_with[:12]}; prepare the text again "
                         f"with --tokenizer {step}")


def _write_config(run: Path, stage: Stage, plan: Plan, about: dict[str, Any], trained: int) -> None:
    count = count_parameters(build_meta(plan.config.model))
    files.write_json(run / CONFIG, {
        "preset": plan.preset, "stage": stage.name,
        **({"from": str(plan.start.folder.resolve())} if plan.start else {}),
        "config": plan.config.model_dump(), "argv": sys.argv,
        "parameters": {"total": count.total, "active": count.active, "trained": trained},
        "versions": runtime.versions(), "commit": runtime.commit(),
        "machine": runtime.machine(), "data": about,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")})


def _introduce(config: Any, state: LoopState, start: Start | None, trained: int, mesh: Mesh,
               screen: Console) -> None:
    """Say what is about to run, and where a resumed run continues."""
    count = count_parameters(build_meta(config.model))
    screen.print(f"{config.model.architecture}: {count.total / 1e6:.2f}M parameters, "
                 f"{count.active / 1e6:.2f}M active per token, on {mesh}", soft_wrap=True)
    if trained != count.total:
        screen.print(f"{trained / 1e6:.3f}M parameters are trained", soft_wrap=True)
    if start and not state.step:
        screen.print(f"starting from the weights in {start.folder}", soft_wrap=True)
    if state.step:
        fraction = fraction_done(config.train, state.step, state.seconds)
        if fraction >= 1:
            screen.print(f"the run is done after step {state.step}; to train on, give a longer "
                         "train.steps or train.minutes", soft_wrap=True)
            return
        rate = config.optim.lr * rate_factor(config.schedule, fraction)
        screen.print(f"resuming after step {state.step}: {fraction:.0%} of the run is done, "
                     f"the learning rate continues at {rate:.2e}", soft_wrap=True)
