"""`fira chat RUN`: a conversation in the terminal, or through a pipe.

Answers go to standard output and everything else, also thoughts, to standard error, so that a pipe
carries only answers.
"""
from __future__ import annotations

import contextlib
import select
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from fira.infer.decode import open_step
from fira.infer.load import load
from fira.infer.request import SamplingParams
from fira.infer.text import Conversation, Thinking
from fira.model.files import knows_chat
from fira.model.generate import window_length
from fira.runlog import console

HELP = "/reset forgets the conversation, /help shows this, /exit or Ctrl-D leaves; " \
       "Ctrl-C stops a reply."
PASTE_SECONDS = 0.03  # more than between the lines of a paste, less than between two keys
UNTUNED = "This model was not tuned for chat: it continues your text instead of answering it."


def chat(run: str | Path, params: SamplingParams, system: str | None = None, device: str = "auto",
         precision: str = "float32", adapter: Path | None = None,
         think: str | None = None) -> None:
    """Load a run and talk until end of input. Raises ValueError, one line, as loading does."""
    notes, out = console(), console(stderr=False)
    loaded = load(run, device, adapter)
    tuned = knows_chat(loaded.folder)
    longest = max(1, window_length(loaded.model) // 2)
    if params.max_new_tokens > longest:
        notes.print(Text(f"Replies are at most {longest} tokens long: half of what the model "
                         "reads.", style="dim"))
        params = replace(params, max_new_tokens=longest)
    conversation = Conversation(loaded.model, loaded.tokenizer, tuned, params, system,
                                open_step(loaded.model, precision, notes.print), think)
    if not tuned:
        notes.print(Text(UNTUNED, style="yellow"), soft_wrap=True)
    talk(conversation, out, notes)


def talk(conversation: Conversation, out: Console, notes: Console) -> None:
    """Reply to each line, or block pasted at a terminal, until the input ends or says /exit."""
    live = sys.stdin.isatty()
    if live:
        notes.print(Text(HELP, style="dim"))
    for line in _lines(live, notes):
        if line == "/exit":
            return
        if line == "/reset":
            conversation.reset()
            notes.print(Text("The conversation starts anew.", style="dim"))
        elif line.startswith("/") and "\n" not in line:
            unknown = "" if line == "/help" else f"{line.split()[0]} is no command. "
            notes.print(Text(unknown + HELP, style="dim"))
        elif line:
            _exchange(conversation, line, out, notes)


def _exchange(conversation: Conversation, line: str, out: Console, notes: Console) -> None:
    try:
        dropped = conversation.ask(line)
    except ValueError as error:
        notes.print(Text(str(error), style="red"), soft_wrap=True)
        return
    if dropped:
        notes.print(Text(f"The context is full: the oldest {dropped} messages were dropped.",
                         style="dim"))
    thought = False
    with contextlib.closing(conversation.reply()) as reply:
        try:
            for text in reply:
                thinks = isinstance(text, Thinking)
                if thought and not thinks:
                    notes.print()
                thought, place = thinks, notes if thinks else out
                place.print(Text(text, style="dim" * thinks), end="", soft_wrap=True)
                place.file.flush()
        except KeyboardInterrupt:
            notes.print(Text(" (stopped)", style="dim"), end="")
    out.print()


def _lines(live: bool, notes: Console) -> Iterator[str]:
    if not live:
        yield from (line.strip() for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):  # line editing and recall, where the platform has them
        import readline
        readline.parse_and_bind("set enable-bracketed-paste on")  # a paste waits for Enter
    while True:
        try:
            yield _typed().strip()
        except EOFError:
            notes.print()
            return
        except KeyboardInterrupt:
            notes.print(Text("\nCtrl-D or /exit leaves.", style="dim"))


def _typed() -> str:
    """One line; or, where no bracketed paste marks them, all lines that arrive together."""
    lines = [input("> ")]
    with contextlib.suppress(OSError, EOFError):  # Windows cannot ask whether more has arrived
        while select.select([sys.stdin], [], [], PASTE_SECONDS)[0]:
            lines.append(input())
    return "\n".join(lines)
