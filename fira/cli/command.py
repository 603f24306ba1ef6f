"""What all verbs share: parameters, the end of their help, errors as one line."""
from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from fira.runtime import let_mps_fall_back

EXISTING = click.Path(path_type=Path)  # a file or folder; the reader says why it cannot be read
NEW_FOLDER = click.Path(file_okay=False, path_type=Path)
PRESETS = "Presets: " + ", ".join(sorted(
    path.stem for path in (Path(__file__).parents[1] / "presets").glob("*.toml"))) + "."
RUN = "RUN is a run folder, whose newest checkpoint is used, or one of its step-N folders."
settings_argument = click.argument("settings", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
device_option = click.option("--device", default="auto", show_default=True,
                             help="Device to compute on: auto, cpu, cuda, cuda:N or mps.")
precision_option = click.option(
    "--precision", type=click.Choice(["float32", "int8", "int4"]), default="float32",
    show_default=True, help="Precision to which a float32 run's weights are rounded for decoding "
                            "on a CPU; int8 and int4 need numba.")
adapter_option = click.option(
    "--adapter", type=EXISTING, metavar="DIR",
    help="Run or step folder with an adapter that was tuned on RUN, to apply to it.")


def example(command: str, *paragraphs: str) -> str:
    """The end of a verb's help: paragraphs, and an example, which is not wrapped."""
    return "\n\n".join([*paragraphs, f"\b\nExample: {command}"])


def split_source(source: Path | None, settings: tuple[str, ...]
                 ) -> tuple[Path | None, tuple[str, ...]]:
    """A run and settings. Where the run is left out, the first setting stands in its place."""
    if source is not None and "=" in str(source) and not source.exists():
        return None, (str(source), *settings)
    return source, settings


def sampling_options(command: Any) -> Any:
    """The options of every verb that samples text."""
    for option in reversed([
        click.option("--max-new-tokens", type=click.IntRange(0), default=200, show_default=True,
                     help="Largest number of tokens to generate."),
        click.option("--temperature", type=click.FloatRange(0), default=0.8, show_default=True,
                     help="Divisor of the logits; 0 always takes the likeliest token."),
        click.option("--top-k", type=click.IntRange(1), show_default="all",
                     help="Sample only among the k likeliest tokens."),
        click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0,
                     help="Sample only among the likeliest tokens of total probability p."),
        click.option("--stop", multiple=True, metavar="TEXT",
                     help="Text that ends the output, which does not contain it; may be repeated."),
        click.option("--seed", type=int, show_default="random",
                     help="Seed of the random choices; the same seed gives the same text."),
        precision_option,
        device_option,
        adapter_option,
    ]):
        command = option(command)
    return command


def thinking_options(command: Any) -> Any:
    """The options of every verb in which a model may think before it answers."""
    for option in (
        click.option("--max-thinking", "max_thinking_tokens", type=click.IntRange(0), metavar="N",
                     show_default="no limit", help="Tokens after which a thought is closed."),
        click.option("--think", type=click.Choice(["on", "off"]), show_default="as it was tuned",
                     help="Whether the model writes a thought before its answer."),
    ):
        command = option(command)
    return command


def suite_options(command: Any) -> Any:
    """The options of every verb that measures a model on suites."""
    for option in reversed([
        click.option("--suite", "suites", multiple=True, metavar="NAME",
                     help="Suite of standard sets (docs/evaluation.md); may be repeated."),
        click.option("--data", default=".", metavar="FOLDER", show_default="here",
                     help="Folder with the files of the suites, or hub."),
        click.option("--limit", type=click.IntRange(1), show_default="all",
                     help="Number of rows of each task to use."),
    ]):
        command = option(command)
    return command


def run_command(command: click.Command, name: str) -> None:
    """Run a command and exit. An error is one line; its exit code is 2 for wrong usage and
    settings, and 1 otherwise."""
    let_mps_fall_back()
    words = sys.argv[1:]
    debug = "--debug" in (words[:words.index("--")] if "--" in words else words)
    try:
        code = command.main([word for word in words if not (debug and word == "--debug")],
                            prog_name=name, standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.Abort:
        _fail(name, "stopped", 130)
    except getattr(click.exceptions, "NoArgsIsHelpError", ()) as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        path = context.command_path if context else name
        _fail(name, f"{error.format_message()} (see {path} --help)", error.exit_code)
    except (ValueError, OSError) as error:
        if debug:
            raise
        from fira.config import ConfigError

        line = str(error)
        if isinstance(error, OSError) and error.filename and error.strerror:
            line = f"{error.filename}: {error.strerror}; check the path and its permissions"
        _fail(name, line, 2 if isinstance(error, ConfigError) else 1)


def _fail(name: str, message: str, code: int) -> None:
    from fira.runlog import visible

    click.echo(visible(f"{name}: {' '.join(message.split())}"), err=True)
    sys.exit(code)
