"""The verbs that use a model: `fira generate`, `fira chat` and `fira serve`."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fira.command import FOLDER, device_option, precision_option, sampling_options


@click.command()
@click.argument("run", type=FOLDER)
@click.argument("prompt")
@sampling_options
def generate(run: Path, prompt: str, device: str, precision: str, **sampling: Any) -> None:
    """Continue PROMPT with the model in RUN.

    RUN is a run folder (its newest checkpoint is used) or a step folder in it.

    \b
    Example: fira generate out/quickstart/run "Fellow citizens," --temperature 0.7
    """
    from fira.infer.fused import open_step
    from fira.infer.load import load
    from fira.infer.sample import SamplingParams
    from fira.infer.text import complete
    from fira.runlog import console

    params = SamplingParams(**_given(sampling))
    loaded = load(run, device)
    step = open_step(loaded.model, precision, console().print)
    text = complete(loaded.model, loaded.tokenizer, prompt, params, step)
    click.echo(prompt, nl=False)
    for part in text:
        click.echo(part, nl=False)
    click.echo()


@click.command()
@click.argument("run", type=FOLDER)
@click.option("--system", help="System message.")
@sampling_options
def chat(run: Path, system: str | None, device: str, precision: str, **sampling: Any) -> None:
    """Talk with the model in RUN, in the terminal or through a pipe.

    RUN is a run folder (its newest checkpoint is used) or a step folder in it.

    \b
    Example: fira chat out/quickstart/run
    """
    from fira.infer.chat import chat as chat_with_run
    from fira.infer.sample import SamplingParams

    chat_with_run(run, SamplingParams(**_given(sampling)), system, device, precision)


@click.command()
@click.argument("run", type=FOLDER)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True,
              help="0 takes a free one.")
@click.option("--keys", type=click.Path(dir_okay=False, path_type=Path),
              help="File of API keys, one a line; without it none is asked for.")
@click.option("--name", help="The model's id.  [default: the run folder's name]")
@click.option("--slots", type=click.IntRange(1), default=8, show_default=True,
              help="Answers written at the same time.")
@click.option("--queue", type=click.IntRange(1), default=256, show_default=True,
              help="Requests that may wait for a slot; more are told to come back.")
@precision_option
@device_option
def serve(run: Path, **options: Any) -> None:
    """Serve the model in RUN: OpenAI's API and a chat page.

    RUN is a run folder (its newest checkpoint is used) or a step folder in it.

    \b
    Example: fira serve out/quickstart/run --port 8000
    """
    try:
        from fira.serve.process import serve as run_server
    except ModuleNotFoundError as error:
        raise ValueError(f"serving needs {error.name}; install it with: "
                         "pip install 'fira-moe[serve]'") from None

    run_server(run, **options)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """Without the options left out; `SamplingParams` has their defaults."""
    return {name: value for name, value in options.items() if value is not None}


VERBS = (generate, chat, serve)
