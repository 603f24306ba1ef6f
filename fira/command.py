"""What all commands share: options, the order of verbs, and mistakes as one line."""
from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

OUT = click.Path(file_okay=False, path_type=Path)
FOLDER = click.Path(path_type=Path)
settings_argument = click.argument("settings", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
device_option = click.option("--device", default="auto", show_default=True,
                             help="auto, cpu, cuda, cuda:N or mps.")


precision_option = click.option(
    "--precision", type=click.Choice(["float32", "int8", "int4"]), default="float32",
    show_default=True,
    help="Weights of a float32 run while decoding on a CPU; the smaller ones need numba.")


def sampling_options(command: Any) -> Any:
    """The options of every verb that samples text."""
    for option in reversed([
        click.option("--max-new-tokens", type=click.IntRange(0), default=200, show_default=True,
                     help="Most tokens to write."),
        click.option("--temperature", type=click.FloatRange(0), default=0.8, show_default=True,
                     help="0 is greedy, 1 the model's own distribution."),
        click.option("--top-k", type=click.IntRange(1),
                     help="Sample among the k likeliest tokens."),
        click.option("--top-p", type=click.FloatRange(0, 1, min_open=True),
                     help="Sample among the likeliest that reach p together."),
        click.option("--seed", type=int, help="Repeat the same draw."),
        precision_option,
        device_option,
    ]):
        command = option(command)
    return command


class InOrder(click.Group):
    """A group that lists its verbs in the order one uses them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def run_command(command: click.Command, name: str) -> None:
    """Run a command: a mistake is one line, exit code 2 for usage and settings, 1 for all else."""
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


def _fail(name: str, words: str, code: int) -> None:
    click.echo(f"{name}: {' '.join(words.split())}", err=True)
    sys.exit(code)
