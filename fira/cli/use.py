"""The verbs `fira generate`, `fira chat` and `fira serve`."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fira.cli.command import EXISTING, device_option, precision_option, sampling_options


@click.command()
@click.argument("run", type=EXISTING)
@click.argument("prompt")
@sampling_options
def generate(run: Path, prompt: str, device: str, precision: str, **sampling: Any) -> None:
    """Continue a prompt.

    RUN is a run folder (its newest checkpoint is used) or a step folder in it.

    \b
    Example: fira generate out/quickstart/run "Fellow citizens," --temperature 0.7
    """
    from fira.infer.decode import open_step
    from fira.infer.load import load
    from fira.infer.request import SamplingParams
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
@click.argument("run", type=EXISTING)
@click.option("--system", show_default="none", help="System message.")
@sampling_options
def chat(run: Path, system: str | None, device: str, precision: str, **sampling: Any) -> None:
    """Chat with a model in the terminal or through a pipe.

    RUN is a run folder (its newest checkpoint is used) or a step folder in it.

    \b
    Example: fira chat out/quickstart/run
    """
    from fira.infer.chat import chat as run_chat
    from fira.infer.request import SamplingParams

    run_chat(run, SamplingParams(**_given(sampling)), system, device, precision)


@click.command()
@click.argument("run", type=EXISTING)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True,
              help="Port to listen at; 0 takes a free one.")
@click.option("--keys", type=click.Path(dir_okay=False, path_type=Path),
              show_default="no key is required",
              help="File with the accepted API keys, one per line.")
@click.option("--name", show_default="the run folder's name", help="The model's id in the API.")
@click.option("--slots", type=click.IntRange(1), default=8, show_default=True,
              help="Number of responses that are generated at the same time.")
@click.option("--queue", type=click.IntRange(1), default=256, show_default=True,
              help="Number of requests that may wait for a slot; further ones get status 429.")
@precision_option
@device_option
def serve(run: Path, **options: Any) -> None:
    """Serve a model over HTTP: OpenAI's API and a chat page.

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
    """The options that were given; `SamplingParams` holds the defaults of the others."""
    return {name: value for name, value in options.items() if value is not None}
