"""The verbs from text to a trained model: tokenizer, data, quickstart, train, plan."""
from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from fira.cli.command import (
    EXISTING,
    NEW_FOLDER,
    PRESETS,
    device_option,
    example,
    settings_argument,
)
from fira.data.sources import Reading


def reading_options(command: Any) -> Any:
    """The options of every verb that reads text for training."""
    for field in reversed(fields(Reading)):
        command = click.option("--" + field.name.replace("_", "-"), default=field.default,
                               is_flag=field.default is False, show_default=bool(field.default),
                               help=field.metadata["help"])(command)
    return command


@click.group(epilog=example("fira tokenizer train corpus/ --vocab-size 32768 --out tok"))
def tokenizer() -> None:
    """Learn the vocabulary of a tokenizer from text."""


@tokenizer.command("train", epilog=example(
    "fira tokenizer train sotu --vocab-size 4096 --out out/tok"))
@click.argument("sources", nargs=-1, required=True)
@click.option("--out", type=NEW_FOLDER, required=True, help="Folder to write the tokenizer to.")
@click.option("--vocab-size", type=int, default=50304, show_default=True,
              help="Number of tokens, including special tokens; small text gives fewer.")
@click.option("--max-bytes", type=click.IntRange(1, 2_000_000_000), default=1_000_000_000,
              show_default=True,
              help="Number of bytes of text to learn from; the rest is not read.")
@reading_options
def tokenizer_train(sources: tuple[str, ...], out: Path, vocab_size: int, max_bytes: int,
                    **reading: Any) -> None:
    """Learn a byte-level BPE vocabulary from SOURCES, which are given as for fira data."""
    from fira.data.prepare import learn_tokenizer
    from fira.runlog import console

    learn_tokenizer(list(sources), out, vocab_size, max_bytes, console(), Reading(**reading))


@click.command(epilog=example(
    "fira data hub:HuggingFaceFW/fineweb-edu:sample-10BT --tokenizer tok --out data/edu"))
@click.argument("sources", nargs=-1, required=True)
@click.option("--tokenizer", "tokenizer_path", type=EXISTING, required=True,
              help="tokenizer.json or a known vocabulary (docs/training.md), or its folder.")
@click.option("--out", type=NEW_FOLDER, required=True, help="Folder to write the shards to.")
@click.option("--validation-every", type=click.IntRange(2), metavar="N", default=20,
              show_default=True, help="Use every N-th document for validation, or the last N-th of "
                                      "the text if there are fewer documents.")
@click.option("--validation", multiple=True, metavar="SOURCE",
              help="Use this source for validation and the rest of SOURCES for training; may be "
                   "repeated.")
@click.option("--workers", type=click.IntRange(1), show_default="one per core",
              help="Number of processes.")
@reading_options
def data(sources: tuple[str, ...], tokenizer_path: Path, out: Path, validation_every: int,
         validation: tuple[str, ...], workers: int | None, **reading: Any) -> None:
    """Tokenize text and write it as shards for training.

    SOURCES are files (.txt, .md, .jsonl, .ndjson, .json, .csv, .tsv, source code; also with .gz,
    .bz2, .xz or .zst; .parquet), folders and globs of them, - (standard input),
    hub:OWNER/NAME[@REVISION][:CONFIG[:SPLIT]] (streamed from the Hugging Face hub), or sotu (249
    State of the Union addresses, which are installed with FIRA).

    If the command is interrupted, the same command continues it.
    """
    from fira.data.prepare import prepare
    from fira.data.tokenizer import Tokenizer
    from fira.runlog import console

    prepare(sources, out, Tokenizer.load(tokenizer_path), validation_every=validation_every,
            validation_sources=validation, workers=workers, screen=console(),
            reading=Reading(**reading))


@click.command(epilog=example(
    "fira tasks runsum:1-8 swap:4 --rows 2000 --out steps.jsonl",
    "SPEC is NAME:DEPTH or NAME:FIRST-LAST; without one the tasks are listed, each with a question."
    ))
@click.argument("specs", metavar="[SPEC]...", nargs=-1)
@click.option("--rows", type=click.IntRange(1), default=1000, show_default=True,
              help="Number of rows for each SPEC, equally many of each depth.")
@click.option("--split", type=click.Choice(["train", "test"]), default="train", show_default=True,
              help="No row of one split is in the other, under other names or in another order.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the questions.")
@click.option("--direct", is_flag=True, help="Leave the thoughts empty.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="JSON lines to write, for fira tune --chat and fira eval --task.")
def tasks(specs: tuple[str, ...], out: Path | None, **options: Any) -> None:
    """Write questions that need steps, with these steps as thoughts."""
    from fira.eval.tasks.write import list_tasks, write_tasks
    from fira.runlog import console

    if bool(specs) != bool(out):
        raise click.UsageError("give SPEC and --out FILE, or neither to list the tasks")
    if out:
        write_tasks(specs, out, console(), **options)
    else:
        list_tasks(console(stderr=False))


@click.command(epilog=example("fira quickstart train.minutes=2"))
@click.option("--out", type=NEW_FOLDER, default=Path("out/quickstart"), show_default=True,
              help="Folder to write the tokenizer, the data and the run to.")
@click.option("--chat", is_flag=True, help="Then tune the model on conversations for a minute and "
                                           "a half, and talk with it.")
@settings_argument
def quickstart(out: Path, chat: bool, settings: tuple[str, ...]) -> None:
    """Train a small model on example text in about five minutes.

    Learns a tokenizer from 249 State of the Union addresses, which are installed with FIRA, trains
    the preset tiny on them, and prints samples and what to try next. What is done already in the
    folder is not done again.
    """
    from fira.report.page import report as write_report
    from fira.report.read import read_run
    from fira.report.routing import routing_view
    from fira.runlog import console
    from fira.stages.quickstart import next_steps, quickstart_chat
    from fira.stages.quickstart import quickstart as run_quickstart

    run = run_training(lambda: run_quickstart(out, settings, console()), out / "run")
    console().print(routing_view(read_run(run)))
    for path in write_report(run):
        console().print(f"wrote {path}")
    if chat:
        run_training(lambda: quickstart_chat(out, console()), out / "chat")
    console().print(next_steps(out), soft_wrap=True)
    if chat and sys.stdin.isatty():
        from fira.infer.chat import chat as run_chat
        from fira.infer.request import SamplingParams

        run_chat(out / "chat", SamplingParams(max_new_tokens=60))


@click.command(epilog=example("fira reason --tasks runsum,swap --depth 4"))
@click.option("--run", "--run-folder", "run", type=NEW_FOLDER, default=Path("out/reason"),
              show_default=True, help="Folder of all runs and of the card, reason.json.")
@click.option("--tasks", metavar="NAMES", help="Names of tasks (see fira tasks), with commas.",
              show_default="runsum,swap,add,word")
@click.option("--depth", type=click.IntRange(1), show_default="4",
              help="Largest number of steps that is trained on.")
@click.option("--base", type=EXISTING, metavar="RUN",
              help="Run to start from, instead of a new base.")
@click.option("--quick", is_flag=True, help="Only try the path, in two minutes, at depth 2: no "
                                            "model learns much.")
@click.option("--resume", is_flag=True, help="Go on with what is missing in --run.")
@settings_argument
@device_option
def reason(run: Path, tasks: str | None, depth: int | None, base: Path | None, quick: bool,
           resume: bool, settings: tuple[str, ...], device: str) -> None:
    """Train a small model to think in steps, and measure it.

    In about 25 minutes: a base, the model that thinks, a student a quarter of its size that learns
    from it, reinforcement, controls, and a card. SECTION.KEY=VALUE are settings of the base;
    train.seed is that of all.
    """
    from fira.report.page import report as write_report
    from fira.report.reasoning import card_view, read_card
    from fira.runlog import console
    from fira.stages.reason import reason as run_reason

    names = tasks.split(",") if tasks else []
    run_training(lambda: run_reason(run, names, depth, base, quick, settings, device, resume,
                                    console()), run)
    card = read_card(run)
    console(stderr=False).print(card_view(card))
    for path in write_report(run / "think"):
        console().print(f"wrote {path}")


@click.command(epilog=example(
    "fira train tiny data.folder=out/quickstart/data train.steps=500 optim.lr=1e-3", PRESETS))
@click.argument("preset", required=False)
@settings_argument
@click.option("--run", "--run-folder", "run", type=NEW_FOLDER, show_default="out/PRESET",
              help="Run folder. Under torchrun use --run-folder, because torchrun has an option "
                   "--run of its own.")
@click.option("--resume", is_flag=True,
              help="Continue from the run's newest checkpoint; PRESET may be left out.")
@click.option("--step", type=click.IntRange(0), metavar="N",
              help="With --resume: continue from the checkpoint of step N. Later checkpoints and "
                   "their record are moved into RUN/after-N-1.")
@click.option("--from", "source", type=EXISTING, metavar="RUN",
              help="Start with the weights of this run, which was trained or imported, instead of "
                   "random weights.")
@click.option("--dry-run", is_flag=True,
              help="Only print the settings, and mark those that differ from the preset.")
@device_option
def train(preset: str | None, settings: tuple[str, ...], run: Path | None, resume: bool,
          step: int | None, source: Path | None, dry_run: bool, device: str) -> None:
    """Train the model of a preset on data that fira data prepared.

    PRESET is a name or a .toml file. SECTION.KEY=VALUE changes a setting; --dry-run lists all.
    """
    if preset and "=" in preset:  # a setting: there is no preset
        settings, preset = (preset, *settings), None
    if preset is None and (dry_run or not resume or run is None):
        raise click.UsageError("Missing argument 'PRESET': only --resume --run FOLDER needs none")
    from fira.stages.config import describe
    from fira.stages.pretrain import PRETRAIN, pretrain

    if dry_run and preset:
        click.echo(describe(PRETRAIN, preset, settings, source))
        return
    from fira.runlog import console

    run = run or Path("out") / Path(preset or "").stem
    run_training(lambda: pretrain(preset, settings, run, device, resume, console(), source, step),
                 run)


@click.command(epilog=example(
    "fira plan fira2-7b --gpus 64 --device h100-80g --tokens 500e9", PRESETS))
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

    Prints every parallel layout that fits into the devices' memory, the fastest first: memory per
    GPU by part, bytes sent, tokens per second, time and cost. Nothing is trained.
    """
    from fira.config import load_preset
    from fira.parallel.plan import show_plan
    from fira.stages.config import configure
    from fira.stages.pretrain import PRETRAIN

    show_plan(preset, configure(PRETRAIN, load_preset(preset), settings), **options)


def run_training(stage: Callable[[], Any], run: Path) -> Path:
    """Run a training stage and plot the progress of `run`, or of the runs inside, also if a signal
    stopped it."""
    from fira import runtime
    from fira.report.plot import save_progress
    from fira.runlog import METRICS
    from fira.train.loop import Stopped

    first = runtime.launch().rank == 0

    def draw() -> None:
        whole = (run / METRICS).exists()
        for one in [run] if whole else sorted(path.parent for path in run.glob(f"*/{METRICS}")):
            save_progress(one)

    try:
        stage()
    except Stopped as stop:
        if first:
            draw()
            click.echo(f"stopped by {stop}; everything is saved in {run}, and --resume continues "
                       "it", err=True)
        sys.exit(stop.code)
    if first:
        draw()
    return run
