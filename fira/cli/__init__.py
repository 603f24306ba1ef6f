"""The command line. The table VERBS lists every verb; a verb's module imports what it needs when it
runs, so that `fira --help` answers at once."""
from __future__ import annotations

import click

from fira.cli.command import run_command
from fira.cli.move import export, import_
from fira.cli.training import data, plan, quickstart, reason, tasks, tokenizer, train
from fira.cli.tuning import distill, merge, rl, trim, tune
from fira.cli.use import card, chat, check, evaluate, generate, report, serve, show

VERBS: dict[str, tuple[click.Command, ...]] = {
    "Prepare": (tokenizer, data, tasks),
    "Train": (quickstart, reason, train, tune, distill, rl, trim, merge, plan),
    "Measure": (evaluate, show, report, card, check),
    "Use": (generate, chat, serve),
    "Move": (export, import_),
}


class VerbGroup(click.Group):
    """The group of all verbs; its help lists them under the headings of VERBS."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, self.commands))
        for heading, verbs in VERBS.items():
            with formatter.section(heading):
                formatter.write_dl([
                    ((verb.name or "").ljust(width),
                     verb.get_short_help_str(formatter.width - width - 4)) for verb in verbs])


@click.group(cls=VerbGroup,
             commands={verb.name or "": verb for verbs in VERBS.values() for verb in verbs},
             context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="fira-moe", prog_name="fira")
@click.option("--debug", is_flag=True,
              help="Show the traceback of an error; may also follow the command.")
def fira(debug: bool) -> None:
    """Train, measure and use small Mixture-of-Experts language models.

    Begin with fira quickstart. fira COMMAND --help explains a command and shows an example.
    """


def main() -> None:
    """Entry point of `fira`."""
    run_command(fira, "fira")
