"""The verbs that begin with a trained model: tune, distill, rl, trim, merge."""
from __future__ import annotations

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
    split_source,
    suite_options,
    thinking_options,
)
from fira.cli.training import run_training


@click.command(epilog=example(
    "fira tune out/quickstart/run --chat chats.jsonl --run out/chat"))
@click.argument("source", required=False, metavar="RUN", type=EXISTING)
@settings_argument
@click.option("--chat", multiple=True, metavar="FILES",
              help="Conversations: a file or folder of JSON lines, JSON or Parquet; may be "
                   "repeated.")
@click.option("--text", multiple=True, metavar="FILES",
              help="Text to go on training with, as for fira data; may be repeated.")
@click.option("--prefer", multiple=True, metavar="FILES",
              help="Pairs of answers (prompt, chosen, rejected) to learn a preference from, "
                   "instead of --chat and --text; may be repeated.")
@click.option("--beta", type=click.FloatRange(0, min_open=True),
              help="With --prefer: how strongly the model is held; 0.1, or 5 if length-normalized.")
@click.option("--length-normalized", is_flag=True,
              help="With --prefer: compare log-probabilities per token.")
@click.option("--held-out", multiple=True, metavar="FILES",
              help="Conversations or pairs to evaluate on, instead of a twentieth of the others.")
@click.option("--general", multiple=True, metavar="FILES",
              show_default="the text that RUN was trained on, if it is there",
              help="General text, or a folder that fira data wrote: for --replay, and to measure "
                   "what is forgotten; self is text that the model writes itself.")
@click.option("--skip-bad", is_flag=True, help="Leave out rows at fault, and count them.")
@click.option("--replay", type=click.FloatRange(0, 1, max_open=True), default=0.0,
              show_default=True, help="Share of general text in what is read.")
@click.option("--method", type=click.Choice(["full", "lora", "experts"]), default="lora",
              show_default=True, help="What is trained: every weight, low-rank adapters, or "
                                      "adapters of the experts that the data uses most.")
@click.option("--rank", type=click.IntRange(1), default=16, show_default=True,
              help="Rank of the adapters.")
@click.option("--experts", metavar="SHARE", show_default="0.25",
              help="With --method experts: the share of each layer's experts that is trained; "
                   "random:SHARE chooses them at random, as a control.")
@click.option("--router", type=click.Choice(["freeze", "train"]),
              show_default="freeze with adapters, train in full tuning",
              help="Whether routers are trained.")
@click.option("--epochs", type=click.FloatRange(0, min_open=True), default=2.0, show_default=True,
              help="How often the data is read.")
@click.option("--run", "--run-folder", "run", type=NEW_FOLDER,
              help="Folder of the new run.")
@click.option("--resume", is_flag=True, help="Continue from the newest checkpoint of --run.")
@click.option("--dry-run", is_flag=True,
              help="Only show what would be read and trained, and the memory needed.")
@suite_options
@click.option("--no-card", is_flag=True,
              help="Leave out the comparison with the model before, at the end.")
@device_option
def tune(source: Path | None, settings: tuple[str, ...], run: Path | None, device: str,
         resume: bool, dry_run: bool, epochs: float, method: str, rank: int, router: str | None,
         beta: float | None, length_normalized: bool, prefer: tuple[str, ...], experts: str | None,
         suites: tuple[str, ...], data: str, limit: int | None, no_card: bool,
         **files: Any) -> None:
    """Train a run further on conversations or text.

    RUN was trained here or imported. The loss is taken on assistant turns only. The base stays as
    it is: an adapter is a small run that needs it. At the end both models are compared: bits per
    byte, routing, answers, and the suites asked for.
    """
    from fira.runlog import console
    from fira.stages.dryrun import show
    from fira.stages.prefer import PREFER
    from fira.stages.start import open_tuning
    from fira.stages.start import tune as run_tune
    from fira.stages.tune import TUNE

    source, settings = split_source(source, settings)
    if source is None and (dry_run or not resume):
        raise click.UsageError("Missing argument 'RUN': only --resume --run FOLDER needs none")
    if not resume and bool(prefer) == bool(files["chat"] or files["text"]):
        raise click.UsageError("give --chat FILES or --text FILES, or else --prefer FILES")
    if experts is not None and method != "experts":
        raise click.UsageError("--experts SHARE needs --method experts: other methods train all")
    sections = {"tune": {"method": method, "rank": rank, "experts": experts or "0.25",
                         "router": router or ("train" if method == "full" else "freeze")}}
    if prefer:
        sections["prefer"] = {"beta": beta, "normalized": length_normalized}
        sections["data"] = {"chat": prefer} | {key: files[key] for key in ("held_out", "skip_bad")}
    else:
        sections["data"] = {key: list(value) if isinstance(value, tuple) else value
                            for key, value in files.items()}
    stage = PREFER if prefer else TUNE
    card = None if no_card else {"suites": suites, "data": data, "limit": limit}
    if dry_run and source:
        show(*open_tuning(source, sections, epochs, settings, None, device, stage), device,
             console(stderr=False))
    elif run is None:
        raise click.UsageError("Missing option '--run': only --dry-run needs none")
    else:
        run_training(lambda: run_tune(source, sections, epochs, settings, run, device, resume,
                                      console(), stage, card), run)
        _show_comparison(run if card else None)


def _show_comparison(run: Path | None) -> None:
    """Print what a tuning changed, on the first rank."""
    from fira.report.tuning import read_tuning, tuning_view
    from fira.runlog import console
    from fira.runtime import launch

    if run and launch().rank == 0:
        console().print(tuning_view(read_tuning(run)))


@click.command(epilog=example(
    "fira distill out/quickstart/run --student tiny --data out/quickstart/data --run out/student",
    PRESETS))
@click.argument("teacher", required=False, type=EXISTING)
@settings_argument
@click.option("--student", metavar="PRESET|RUN",
              help="A preset, for a new model, or a run to start from.")
@click.option("--data", "folder", metavar="FOLDER",
              help="Text that fira data prepared.")
@click.option("--text", multiple=True, metavar="FILES",
              help="Text, as for fira data; may be repeated.")
@click.option("--chat", multiple=True, metavar="FILES",
              help="Conversations, as for fira tune; may be repeated.")
@click.option("--held-out", multiple=True, metavar="FILES",
              help="Conversations or text to evaluate on, instead of a twentieth of the others.")
@click.option("--loss", type=click.Choice(["forward", "reverse", "jsd"]), show_default="forward",
              help="KL(teacher || student), KL(student || teacher), or what lies between.")
@click.option("--temperature", type=click.FloatRange(0, min_open=True), show_default="1",
              help="Divisor of the logits: of both models, or of the one that writes answers.")
@click.option("--ce", type=click.FloatRange(0, 1), show_default="0.5",
              help="Weight of the cross-entropy of given text; the divergence has the rest.")
@click.option("--on-policy", type=click.FloatRange(0, 1), show_default="0",
              help="With --chat: share of the answers that the student writes itself.")
@click.option("--sequence", is_flag=True,
              help="With --chat: the teacher writes the answers, and the student is trained on "
                   "them by cross-entropy alone.")
@click.option("--keep-right", is_flag=True,
              help="With --sequence: leave out answers that the row's checker finds wrong.")
@click.option("--max-new", type=click.IntRange(1), default=256, show_default=True,
              help="With --sequence: tokens of an answer, at most.")
@click.option("--run", "--run-folder", "run", type=NEW_FOLDER, required=True,
              help="Folder of the new run.")
@click.option("--resume", is_flag=True, help="Continue from the newest checkpoint of --run.")
@device_option
def distill(teacher: Path | None, settings: tuple[str, ...], student: str | None, run: Path,
            resume: bool, device: str, sequence: bool, keep_right: bool, max_new: int,
            **given: Any) -> None:
    """Train a student to predict what TEACHER predicts.

    TEACHER is a run folder, whose newest checkpoint is used, or one of its step-N folders. The
    student has any architecture and the same tokenizer.
    """
    from fira.runlog import console
    from fira.stages.distill import distill as run_distill

    teacher, settings = split_source(teacher, settings)
    if not resume and (teacher is None or student is None):
        raise click.UsageError("give TEACHER and --student; only --resume --run FOLDER needs none")
    if sequence and not (given["chat"] or resume) or keep_right and not sequence:
        raise click.UsageError("--sequence needs --chat FILES, and --keep-right needs --sequence")
    run_training(lambda: run_distill(teacher, student, given, settings, run, device, resume,
                                     console(), sequence, keep_right, max_new), run)


@click.command(epilog=example(
    "fira rl out/chat --tasks runsum:1-8 --max-new 64 --run out/rl train.steps=200"))
@click.argument("source", required=False, metavar="RUN", type=EXISTING)
@settings_argument
@click.option("--tasks", multiple=True, metavar="SPEC|FILE,...",
              help="Tasks that fira tasks lists, such as runsum:1-8, or files of rows with "
                   "messages and answers.")
@click.option("--held-out", multiple=True, metavar="SPEC|FILE,...",
              show_default="split test of the tasks, or a twentieth of the rows",
              help="Rows to evaluate on.")
@click.option("--reward", metavar="FILE.py:FUNCTION", show_default="the rows' checkers",
              help="What an answer is worth: called with lists prompts, completions and each of "
                   "the rows' columns; returns a list of numbers.")
@click.option("--prompts", type=click.IntRange(1), default=16, show_default=True,
              help="Number of prompts of a step.")
@click.option("--group", type=click.IntRange(2), default=8, show_default=True,
              help="Number of answers to each prompt, which are compared with each other.")
@click.option("--max-new", type=click.IntRange(1), default=128, show_default=True,
              help="Largest number of tokens of an answer; one that is cut off earns nothing.")
@click.option("--clip", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=0.2,
              show_default=True, help="How far a token's probability ratio may leave 1.")
@click.option("--kl", type=click.FloatRange(0), default=0.0, show_default=True,
              help="Weight of the divergence from RUN, which holds the model near it.")
@thinking_options
@click.option("--method", type=click.Choice(["full", "lora"]), default="full", show_default=True,
              help="What is trained: every weight, or low-rank adapters.")
@click.option("--run", "--run-folder", "run", type=NEW_FOLDER, required=True,
              help="Folder of the new run.")
@click.option("--resume", is_flag=True, help="Continue from the newest checkpoint of --run.")
@device_option
def rl(source: Path | None, settings: tuple[str, ...], run: Path, device: str, resume: bool,
       tasks: tuple[str, ...], held_out: tuple[str, ...], reward: str | None, method: str,
       **options: Any) -> None:
    """Train a chat model by the rewards of its own answers.

    At each step the model answers prompts, and answers that earn more than the others to the same
    prompt become likelier (GRPO). Settings such as train.steps=200 and optim.lr=1e-4 follow RUN.
    """
    from fira.runlog import console
    from fira.stages.rl import rl as run_rl

    source, settings = split_source(source, settings)
    if not resume and not (source and tasks):
        raise click.UsageError("give RUN and --tasks SPEC; only --resume --run FOLDER needs none")
    names = {key: [name for given in values for name in given.split(",")]
             for key, values in (("tasks", tasks), ("held_out", held_out))}
    sections = {"tune": {"method": method}, "rl": options, "data": {**names, "reward": reward}}
    run_training(lambda: run_rl(source, sections, settings, run, device, resume, console()), run)


@click.command(epilog=example(
    "fira trim out/quickstart/run out/half --keep 0.5 --text README.md"))
@click.argument("run", type=EXISTING)
@click.argument("folder", type=NEW_FOLDER, metavar="OUT")
@click.option("--keep", type=float, required=True, help="Share of each layer's experts that stay.")
@click.option("--text", multiple=True, metavar="FILES",
              help="Text that the model is to be good at; may be repeated.")
@click.option("--chat", multiple=True, metavar="FILES",
              help="Conversations that it is to be good at; may be repeated.")
@click.option("--general", multiple=True, metavar="FILES",
              help="Other text, to measure what is lost there; may be repeated.")
@click.option("--skip-bad", is_flag=True, help="Leave out conversations that cannot be read.")
def trim(run: Path, folder: Path, keep: float, text: tuple[str, ...], chat: tuple[str, ...],
         general: tuple[str, ...], skip_bad: bool) -> None:
    """Leave out the experts of RUN that contribute least to a text.

    OUT is created as a run folder with a smaller model. Bits per byte before and after are printed.
    """
    from fira.convert.trim import trim_run
    from fira.eval.tuning import bits_per_byte
    from fira.runlog import console

    if not text and not chat:
        raise click.UsageError("give --text or --chat, by which the experts are chosen")
    trim_run(run, folder, keep, text, chat, general, bits_per_byte, console(), skip_bad)


@click.command(epilog=example("fira merge out/chat out/chat-whole"))
@click.argument("run", type=EXISTING)
@click.argument("out", type=NEW_FOLDER)
@click.option("--share", type=click.FloatRange(0, 1, min_open=True, max_open=True),
              help="Keep this share of what the tuning changed, such as 0.8; RUN may be of any "
                   "method. The model forgets less.")
@click.option("--base", type=EXISTING, metavar="RUN", show_default="what RUN was trained from",
              help="With --share: the run that the rest is taken from.")
def merge(run: Path, out: Path, share: float | None, base: Path | None) -> None:
    """Write the adapter in RUN and its base as one whole model.

    OUT is created as a run folder with float32 weights. The logits of both are compared first.
    """
    from fira.convert.average import average_run
    from fira.convert.lora import merge_run
    from fira.runlog import console

    if base and share is None:
        raise click.UsageError("--base RUN needs --share, such as --share 0.5")
    if share is None:
        merge_run(run, out, console())
    else:
        average_run(run, out, share, base, console())
