"""The verbs `fira eval`, `fira show` and `fira report`."""
from __future__ import annotations

from pathlib import Path

import click

from fira.cli.command import EXISTING, PRESETS, device_option, settings_argument


@click.command("eval")
@click.argument("run", type=EXISTING)
@click.option("--text", "texts", multiple=True, required=True, metavar="SOURCE",
              help="Text to score, given as for fira data; may be repeated.")
@click.option("--context", type=click.IntRange(2), show_default="its training length",
              help="Largest number of tokens in the model's context.")
@click.option("--routing", is_flag=True, help="Also measure how far the experts specialize.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@device_option
def evaluate(run: Path, texts: tuple[str, ...], context: int | None, routing: bool, as_json: bool,
             device: str) -> None:
    """Measure bits per byte and loss of a model on any text.

    Every byte is scored exactly once, so models with different tokenizers can be compared. RUN is
    a run folder (its newest checkpoint is used) or a step folder in it.

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
    if as_json:
        click.echo(json.dumps(result))
        return
    routed = result.pop("routing", {})
    layers = routed.pop("token_information", ())
    for name, value in {**routed, **result}.items():
        click.echo(f"{name.replace('_', ' ')}: {value}")
    for number, layer in enumerate(layers):
        click.echo(f"layer {number}: the token determines {layer['information']:.1%} of the "
                   f"expert, {layer['by_chance']:.1%} by chance")


@click.command(epilog=PRESETS)
@click.argument("what")
@settings_argument
def show(what: str, settings: tuple[str, ...]) -> None:
    """Count the parameters, total and active, of a preset or a run.

    WHAT is a preset, whose settings can be changed, or a run folder, whose expert load is shown
    too.

    \b
    Example: fira show fira-334m model.num_experts=8
    """
    from fira.stages.show import show as print_model

    print_model(what, settings)
    if (Path(what) / "metrics.jsonl").is_file():
        from rich.console import Console

        from fira.report.read import read_run
        from fira.report.routing import routing_view

        Console(highlight=False).print(routing_view(read_run(Path(what))))


@click.command()
@click.argument("run", type=EXISTING)
def report(run: Path) -> None:
    """Draw a run's progress and expert load as a report page.

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
