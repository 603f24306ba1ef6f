"""The verbs that read a run: eval, show, report, card, check, generate, chat, serve."""
from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, TextIO

import click

from fira.cli.command import (
    EXISTING,
    PRESETS,
    RUN,
    adapter_option,
    device_option,
    example,
    precision_option,
    sampling_options,
    settings_argument,
    suite_options,
    thinking_options,
)


@click.command("eval", epilog=example("fira eval out/quickstart/run --text README.md", RUN))
@click.argument("run", type=EXISTING)
@click.option("--text", "texts", multiple=True, metavar="SOURCE",
              help="Text to score, given as for fira data; may be repeated.")
@suite_options
@click.option("--task", "files", multiple=True, type=click.Path(dir_okay=False),
              help="JSON lines with a task of your own (docs/evaluation.md), or questions "
                   "that are made, like runsum:1-8 (docs/reasoning.md); may be repeated.")
@click.option("--samples", type=click.IntRange(1), default=1, show_default=True,
              help="Answers to each row of messages, for pass@k and maj@k.")
@click.option("--temperature", type=click.FloatRange(0), show_default="1 if there are several",
              help="Temperature of these answers; a single one is greedy.")
@thinking_options
@click.option("--letters", is_flag=True, help="Let the model choose the letter of an option.")
@click.option("--general", multiple=True, metavar="SOURCE", show_default="the run's held-out text",
              help="Text to whose load of the experts that on the tasks is compared.")
@click.option("--resume", is_flag=True, help="Keep the finished tasks in the file of --json.")
@click.option("--against", type=EXISTING, metavar="RUN2",
              help="Run, or file of --json, whose results on the same tasks are subtracted.")
@click.option("--leak", type=EXISTING, metavar="DATA",
              help="Data folder in whose training text the items are searched.")
@click.option("--context", type=click.IntRange(2), show_default="the training length",
              help="Largest number of tokens in the model's context, for --text.")
@click.option("--routing", is_flag=True,
              help="Also measure how far the experts specialize on --text.")
@click.option("--json", "target", is_flag=False, flag_value="-", metavar="[FILE]",
              help="Write one JSON object into a file, or print it.")
@device_option
@adapter_option
def evaluate(run: Path, texts: tuple[str, ...], context: int | None, routing: bool,
             target: str | None, device: str, adapter: Path | None, **tasks: Any) -> None:
    """Measure a model on any text, or on standard tasks.

    Every byte of a text is scored exactly once, so models with different tokenizers can be
    compared.
    """
    from fira.files import write_json
    from fira.runlog import console, visible

    if bool(texts) == bool(tasks["suites"] or tasks["files"]):
        raise click.UsageError("give --text, or --suite and --task, to say what to measure")
    file = None if target in (None, "-") else Path(target)
    if texts:
        from fira.eval.bits_per_byte import evaluate as score_text

        result = score_text(run, list(texts), context, device, console(), adapter)
        if routing:
            from fira.eval.specialization import specialization

            result["routing"] = specialization(run, list(texts), device, adapter)
        if file:
            write_json(file, result)
    else:
        result = _measure_tasks(run, file, target != "-", device=device, adapter=adapter,
                                screen=console(), **tasks)
    if target == "-":
        click.echo(json.dumps(result))
    if target == "-" or not texts:
        return
    routed = result.pop("routing", {})
    layers = routed.pop("token_information", ())
    for name, value in {**routed, **result}.items():
        click.echo(visible(f"{name.replace('_', ' ')}: {value}"))
    for number, layer in enumerate(layers):
        click.echo(f"layer {number}: the token determines {layer['information']:.1%} of the "
                   f"expert, {layer['by_chance']:.1%} by chance")


def _measure_tasks(run: Path, file: Path | None, shown: bool, against: Path | None,
                   leak: Path | None, resume: bool, **options: Any) -> dict[str, Any]:
    from fira.data.shards import read_manifest
    from fira.eval.answers import Asking
    from fira.eval.compare import add_comparison
    from fira.eval.leak import add_leaks
    from fira.eval.measure import measure
    from fira.files import read_json, write_json
    from fira.report.results import show

    if leak:
        read_manifest(leak)  # refuses another folder before the long work
    options["asking"] = Asking(**{name: options.pop(name) for name in Asking._fields})
    other = (None if against is None else
             measure(against, **options | {"adapter": None}) if against.is_dir()
             else read_json(against, "give a run, or a file that fira eval --json wrote"))
    result = measure(run, target=file, resume=resume, **options)
    tables = [*([add_leaks(result, leak)] if leak else []),
              *([add_comparison(result, other)] if other else [])]
    if file:
        write_json(file, result)
    if shown:
        show(result, *tables)
    return result


@click.command(epilog=example("fira show fira-334m model.num_experts=8", PRESETS))
@click.argument("what")
@settings_argument
def show(what: str, settings: tuple[str, ...]) -> None:
    """Count the parameters, total and active, of a preset or a run.

    WHAT is a preset, whose settings can be changed, or a run folder, whose expert load is
    printed, too.
    """
    from fira.stages.show import show as print_model

    print_model(what, settings)
    if (Path(what) / "metrics.jsonl").is_file():
        from fira.report.read import read_run
        from fira.report.routing import routing_view
        from fira.runlog import console

        console(stderr=False).print(routing_view(read_run(Path(what))))


@click.command(epilog=example("fira check out/quickstart/run"))
@click.argument("path", type=EXISTING)
def check(path: Path) -> None:
    """Verify the files of a run, of data or of an export.

    PATH is a run, a step folder, a data or tokenizer folder, an exported folder or a GGUF file.
    The exit code is 1 if anything is wrong.
    """
    from fira.stages.check import check as check_all

    rows = check_all(path)
    width = max(len(name) for name, _, _ in rows)
    for name, rule, fault in rows:
        click.echo(f"{name:{width}}  {rule:16}  {fault or 'ok'}")
    if wrong := sum(bool(fault) for _, _, fault in rows):
        raise ValueError(f"{wrong} of {len(rows)} checks of {path} failed")


@click.command(epilog=example("fira report out/quickstart/run"))
@click.argument("run", type=EXISTING)
def report(run: Path) -> None:
    """Draw a run's progress and expert load as a report page.

    Writes training_progress.png, routing.png and report.html into the run folder.
    """
    from fira.report.page import print_summary
    from fira.report.page import report as write_report
    from fira.runlog import console, visible

    for path in write_report(run):
        click.echo(visible(str(path)))
    print_summary(run, console())


@click.command(epilog=example("fira card out/quickstart/run --license apache-2.0", RUN))
@click.argument("run", type=EXISTING)
@click.option("--license", "license_id", show_default="as on the present card, or unknown",
              help="License of the weights, by its name on the Hugging Face hub.")
def card(run: Path, license_id: str | None) -> None:
    """Write the model card of RUN, README.md, from its records.

    Results that fira eval RUN --suite NAME --json RUN/eval-NAME.json wrote are on the card.
    """
    from fira.report.card import write_card

    click.echo(write_card(run, license_id))


@click.command(epilog=example(
    'fira generate out/quickstart/run "Fellow citizens," --temperature 0.7', RUN))
@click.argument("run", type=EXISTING)
@click.argument("prompt", required=False)
@click.option("--file", type=click.File(encoding="utf-8-sig"), help="File with the prompt.")
@click.option("--json", "as_json", is_flag=True,
              help="Print one JSON object: text, finish_reason, prompt_tokens, completion_tokens.")
@sampling_options
def generate(run: Path, prompt: str | None, file: TextIO | None, as_json: bool, device: str,
             precision: str, adapter: Path | None, **sampling: Any) -> None:
    """Continue a prompt.

    PROMPT may be -, which reads standard input. A line break that ends an input or FILE is dropped.
    """
    from fira.infer.decode import open_step
    from fira.infer.load import load
    from fira.infer.request import End, SamplingParams
    from fira.infer.text import complete
    from fira.runlog import console, visible

    params = SamplingParams(**sampling)
    prompt = _prompt(prompt, file)
    loaded = load(run, device, adapter)
    step = open_step(loaded.model, precision, console().print)
    ends: list[End] = []
    text = complete(loaded.model, loaded.tokenizer, prompt, params, step, ends.append)
    if as_json:
        whole, end = "".join(text), ends[0]
        click.echo(json.dumps({"text": whole, "finish_reason": end.reason,
                               "prompt_tokens": end.prompt_tokens,
                               "completion_tokens": end.new_tokens}))
        return
    shown = visible if sys.stdout.isatty() else str  # a pipe gets the text as it is
    click.echo(shown(prompt), nl=False)
    for part in text:
        click.echo(shown(part), nl=False)
    click.echo()


def _prompt(prompt: str | None, file: TextIO | None) -> str:
    """The text of the argument, of standard input or of a file."""
    if (prompt is None) == (file is None):
        raise click.UsageError("give the prompt as PROMPT or by --file FILE, one of the two")
    source = click.open_file("-", encoding="utf-8-sig") if prompt == "-" else file
    try:
        return source.read().removesuffix("\n") if source else prompt or ""
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt is not UTF-8 text ({error.reason}); convert it with: "
                         "iconv -f ENCODING -t utf-8") from None


@click.command(epilog=example("fira chat out/quickstart/run", RUN))
@click.argument("run", type=EXISTING)
@click.option("--system", show_default="none", help="System message.")
@thinking_options
@sampling_options
def chat(run: Path, system: str | None, device: str, precision: str, adapter: Path | None,
         think: str | None, **sampling: Any) -> None:
    """Chat with a model in the terminal or through a pipe."""
    from fira.infer.chat import chat as run_chat
    from fira.infer.request import SamplingParams

    run_chat(run, SamplingParams(**sampling), system, device, precision, adapter, think)


@click.command(epilog=example("fira serve out/quickstart/run --port 8000", RUN))
@click.argument("run", type=EXISTING)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True,
              help="Port to listen on; 0 takes a free one.")
@click.option("--keys", type=click.Path(dir_okay=False, path_type=Path), show_default="none",
              help="File with the accepted API keys, one per line.")
@click.option("--cors", multiple=True, metavar="ORIGIN", show_default="none",
              help="Origin of web pages that may call the server; may be repeated.")
@click.option("--name", show_default="the run folder's name", help="The model's id in the API.")
@click.option("--slots", type=click.IntRange(1), default=8, show_default=True,
              help="Number of responses that are generated at the same time.")
@click.option("--queue", type=click.IntRange(1), default=256, show_default=True,
              help="Number of requests that may wait for a slot; further ones get status 429.")
@click.option("--context", type=click.IntRange(1), show_default="the longest trained on",
              help="Tokens that a prompt and its response may have together.")
@click.option("--cache", type=click.Choice(["float32", "float16"]), show_default="the model's",
              help="Precision of the keys and values that a response keeps.")
@click.option("--pause", type=click.IntRange(1), default=100, show_default=True,
              help="Milliseconds that an answer's next token may wait for other prompts.")
@precision_option
@device_option
@adapter_option
def serve(run: Path, **options: Any) -> None:
    """Serve a model over HTTP: OpenAI's API and a chat page."""
    try:
        from fira.serve.process import serve as run_server
    except ModuleNotFoundError as error:
        raise ValueError(f"serving needs {error.name}; install it with: "
                         "pip install 'fira-moe[serve]'") from None

    run_server(run, **options)
