"""The verbs `fira quickstart`, `fira train` and `fira plan`."""
from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from fira.cli.command import EXISTING, NEW_FOLDER, PRESETS, device_option, settings_argument


@click.command()
@click.option("--out", type=NEW_FOLDER, default=Path("out/quickstart"), show_default=True,
              help="Folder to write the tokenizer, the data and the run to.")
@settings_argument
def quickstart(out: Path, settings: tuple[str, ...]) -> None:
    """Train a small model on example text in about five minutes.

    Learns a tokenizer from 249 State of the Union addresses, which are installed with FIRA, trains
    the preset tiny on them, and prints samples and what to try next.

    \b
    Example: fira quickstart train.minutes=2
    """
    from fira.report.page import report as write_report
    from fira.report.read import read_run
    from fira.report.routing import routing_view
    from fira.runlog import console
    from fira.stages.quickstart import next_steps
    from fira.stages.quickstart import quickstart as run_quickstart

    run = run_training(lambda: run_quickstart(out, settings, console()), out / "run")
    console().print(routing_view(read_run(run)))
    for path in write_report(run):
        console().print(f"wrote {path}")
    console().print(next_steps(out), soft_wrap=True)


@click.command(epilog=PRESETS)
@click.argument("preset")
@settings_argument
@click.option("--run", "--run-folder", "run", type=NEW_FOLDER, show_default="out/PRESET",
              help="Run folder. Under torchrun use --run-folder, because torchrun has an option "
                   "--run of its own.")
@click.option("--resume", is_flag=True, help="Continue from the run's newest checkpoint.")
@click.option("--from", "source", type=EXISTING, metavar="RUN",
              help="Start with the weights of this run, which was trained or imported, instead of "
                   "random weights.")
@click.option("--dry-run", is_flag=True,
              help="Only print the settings, and mark those that differ from the preset.")
@device_option
def train(preset: str, settings: tuple[str, ...], run: Path | None, resume: bool,
          source: Path | None, dry_run: bool, device: str) -> None:
    """Train the model of a preset on data that fira data prepared.

    PRESET is a name or a .toml file. SECTION.KEY=VALUE changes a setting; --dry-run lists them.

    \b
    Example: fira train tiny data.folder=out/quickstart/data train.steps=500 optim.lr=1e-3
    """
    from fira.stages.pretrain import PRETRAIN, pretrain
    from fira.stages.run import describe

    if dry_run:
        click.echo(describe(PRETRAIN, preset, settings, source))
        return
    from fira.runlog import console

    run = run or Path("out") / Path(preset).stem
    run_training(lambda: pretrain(preset, settings, run, device, resume, console(), source), run)


@click.command(epilog=PRESETS)
@click.argument("preset")
@settings_argument
@click.option("--gpus", type=click.IntRange(1), default=8, show_default=True,
              help="Number of devices in total.")
@click.option("--device", "device_name", default="h100-80g", show_default=True,
              help="Device type: h100-80g, a100-80g, a100-40g, l40s-48g or rtx4090-24g.")
@click.option("--tokens", type=click.FloatRange(0, min_open=True),
              show_default="from the preset",
              help="Number of training tokens for which time and cost are estimated.")
@click.option("--price", type=click.FloatRange(0), show_default="typical for the device",
              help="Dollars per device and hour.")
def plan(preset: str, settings: tuple[str, ...], **options: Any) -> None:
    """Estimate memory, speed and cost of training on many GPUs.

    Prints every layout that fits into the devices' memory, the fastest first: memory per GPU by
    part, bytes sent, tokens per second, time and cost. Nothing is trained.

    \b
    Example: fira plan fira2-7b --gpus 64 --device h100-80g --tokens 500e9
    """
    from fira.config import load_preset
    from fira.parallel.plan import show_plan
    from fira.stages.pretrain import PRETRAIN
    from fira.stages.run import configure

    show_plan(preset, configure(PRETRAIN, load_preset(preset), settings), **options)


def run_training(stage: Callable[[], Any], run: Path) -> Path:
    """Run a training stage and plot its progress, also if a signal stopped it."""
    from fira import runtime
    from fira.report.plot import save_progress
    from fira.train.loop import Stopped

    first = runtime.launch().rank == 0
    try:
        stage()
    except Stopped as stop:
        if first:
            save_progress(run)
            click.echo(f"stopped by {stop}; everything is saved in {run}, and --resume continues "
                       "it", err=True)
        sys.exit(128 + stop.number)
    if first:
        save_progress(run)
    return run
