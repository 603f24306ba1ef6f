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
    from fira.infer.decode import open_step
    from fira.infer.load import load
    from fira.infer.text import complete
    from fira.runlog import console

    loaded = load(run, device)
    step = open_step(loaded.model, precision, console().print)
    pieces = complete(loaded.model, loaded.tokenizer, prompt, step=step, **sampling)
    click.echo(prompt, nl=False)
    for piece in pieces:
        click.echo(piece, nl=False)
    click.echo()


@click.command()
@click.argument("run", type=FOLDER)
@click.option("--system", help="System message.")
@sampling_options
def chat(run: Path, system: str | None, **options: Any) -> None:
    """Talk with the model in RUN, in the terminal or through a pipe.

    RUN is a run folder (its newest checkpoint is used), a step folder in it, or a .gguf file, which
    llama.cpp runs (pip install 'fira-moe[edge]').

    \b
    Example: fira chat out/quickstart/run
    """
    if run.suffix == ".gguf":
        from fira.infer.edge import chat as chat_with_file

        if (precision := options.pop("precision")) != "float32":
            raise ValueError(f"precision={precision} is for runs; a .gguf file has its own: "
                             "leave it out")
        chat_with_file(run, system=system, **options)
    else:
        from fira.infer.chat import chat as chat_with_run

        chat_with_run(run, system=system, **options)


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

    RUN is a run folder (its newest checkpoint is used), a step folder in it, or a .gguf file, which
    llama.cpp's own server serves, without page and keys (pip install 'fira-moe[edge]').

    \b
    Example: fira serve out/quickstart/run --port 8000
    """
    if run.suffix == ".gguf":
        from fira.serve.edge import serve as serve_file

        for option in ("keys", "queue", "precision", "device"):
            _check_not_given(option, options.pop(option))
        serve_file(run, **options)
        return
    try:
        from fira.serve.process import serve as run_server
    except ModuleNotFoundError as error:
        raise ValueError(f"serving needs {error.name}; install it with: "
                         "pip install 'fira-moe[serve]'") from None

    run_server(run, **options)


def _check_not_given(option: str, value: Any) -> None:
    source = click.get_current_context().get_parameter_source(option)
    if source == click.core.ParameterSource.COMMANDLINE:
        raise ValueError(f"--{option} {value} is for runs; llama.cpp's server has none: leave it "
                         "out for a .gguf file")


VERBS = (generate, chat, serve)
