"""What the pages and the help texts show works: commands parse, blocks run, links lead somewhere.

Every fenced bash and python block of a page runs, in order, in a folder that holds a small finished
quickstart (out/quickstart) and README.md. A block marked `no-run` (```bash no-run) is only checked:
it is valid, and each `fira` command in it has a verb, options, preset and settings that exist.
"""
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from rich.console import Console

from fira.cli import fira
from fira.config import ConfigError, load_preset
from fira.stages.config import configure
from fira.stages.pretrain import PRETRAIN, pretrain

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MISTAKES = (click.UsageError, ConfigError)


def shell_commands(text):
    """The commands of a shell text, each a list of words without its variable assignments."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = []
        for word in [*lexer, ";"]:
            if word and set(word) <= set("();<>|&"):
                if words:
                    yield words
                words = []
            elif words or not re.match(r"\w+=", word):
                words.append(word)


def find_verb(words):
    """The click command that `fira WORDS` reaches, its name and the words left for it."""
    name, command = "fira", fira
    while isinstance(command, click.Group):
        context = click.Context(command, info_name=name)
        _, rest, _ = command.make_parser(context).parse_args(list(words))
        if not rest:
            return name, command, []
        name, command, words = command.resolve_command(context, rest)
    return name, command, words


def check_fira(words):
    """Raise what the command line would raise for `fira WORDS`, without running it."""
    name, command, rest = find_verb(words)
    if isinstance(command, click.Group):
        return
    try:
        given = command.make_context(name, list(rest)).params
    except click.exceptions.Exit:  # --help
        return
    presets = {"train": given.get("preset"), "show": given.get("what"), "quickstart": "tiny"}
    preset = presets.get(name)
    if preset and "/" not in preset and not preset.endswith(".toml"):  # else the reader's own
        configure(PRETRAIN, load_preset(preset), given["settings"])


def check_command(words):
    if words[0] == "fira":
        check_fira(words[1:])
    elif words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:2]) <= set(targets), f"make has no target {words[1]}"
    elif words[0].startswith("python") and words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file(), f"{words[1]} does not exist"


def verbs(command=fira):
    for inner in command.commands.values():
        yield from verbs(inner) if isinstance(inner, click.Group) else [inner]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_on_the_page_exist(page):
    text = page.read_text(encoding="utf-8")
    for language, _, block in FENCE.findall(text):
        if language == "python":
            compile(block, page.name, "exec")
        if language == "bash":
            subprocess.run(["bash", "-n"], input=block, text=True, check=True)
            for words in shell_commands(block):
                check_command(words)
    for span in re.findall(r"`fira ([a-z][^`]*)`", FENCE.sub("", text)):
        words = span.replace("...", "").split()
        _, command, _ = find_verb([word for word in words if not word.startswith("-")])
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= known | {"--help"}, span


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    links = re.findall(r"\]\(([^)\s]+)\)", prose)
    ours = [link.partition("#")[0] for link in links if not re.match(r"\w+:", link)]
    assert [link for link in ours if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("verb", list(verbs()), ids=lambda verb: verb.callback.__name__)
def test_the_help_shows_an_example_that_parses_and_explains_every_option(verb):
    examples = re.findall(r"Example: (.*)", verb.epilog)
    assert examples
    for words in shell_commands("\n".join(examples)):
        check_command(words)
    assert all(option.help for option in verb.params if isinstance(option, click.Option))


@pytest.mark.parametrize("line", [
    "fira trian tiny", "fira train tiny --stepz 3", "fira train tinny", "fira show fira-335m",
    "fira train tiny optim.lrr=1", "fira quickstart train.minuets=1", "fira tokenizer learn sotu",
    "fira data sotu --out x", "X=1 true && fira eval", "fira chat out/run --top-k none",
])
def test_a_wrong_command_is_found(line):
    with pytest.raises(MISTAKES):
        for words in shell_commands(line):
            check_command(words)


@pytest.fixture(scope="module")
def finished(preset, data_folder, tmp_path_factory):
    """What a quickstart leaves, small."""
    folder = tmp_path_factory.mktemp("finished")
    quickstart = folder / "out" / "quickstart"
    shutil.copytree(data_folder, quickstart / "data")
    settings = [f"data.folder={quickstart / 'data'}", "train.steps=5"]
    pretrain(str(preset), settings, quickstart / "run", "cpu", False, Console(quiet=True))
    return folder


@pytest.fixture
def workplace(finished, tmp_path):
    """A copy of the finished quickstart, and an environment whose `fira` is this checkout."""
    folder = tmp_path / "work"
    shutil.copytree(finished, folder)
    shutil.copy(ROOT / "README.md", folder)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, words in {"fira": "-m fira", "python": ""}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        (programs / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
                   "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return folder, environment


START = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}
RUNNING = {page: blocks for page in PAGES if (blocks := [
    [*START[language], block]
    for language, flags, block in FENCE.findall(page.read_text(encoding="utf-8"))
    if language in START and "no-run" not in flags.split()])}


@pytest.mark.parametrize("page", RUNNING, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_of_the_page_run(page, workplace):
    folder, environment = workplace
    for words in RUNNING[page]:
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True,
                              timeout=120)
        assert done.returncode == 0, f"{words[-1]}\n{done.stdout}\n{done.stderr}"
