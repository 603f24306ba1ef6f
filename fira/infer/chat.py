"""`fira chat RUN`: talk with a model in the terminal, or through a pipe.

The conversation knows no terminal; the terminal is a thin shell around it. Answers go to standard
output and everything else to standard error, so that a pipe carries the model's words alone.
"""
from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from fira.data.chat import render
from fira.data.tokenizer import TURN_END
from fira.infer.decode import open_step
from fira.infer.load import load
from fira.infer.text import pieces
from fira.model.generate import window_length
from fira.runlog import console

HELP = "/reset forgets the conversation, /help shows this, /exit or Ctrl-D leaves; " \
       "Ctrl-C stops an answer."
BASE = "This model was not tuned for chat: it continues your text instead of answering it."
PRETRAIN = "pretrain"  # the stage whose models have never seen a chat turn


class Conversation:
    """Turns so far, cut to what the model can read. `tuned` says that it knows chat turns."""

    def __init__(self, model: Any, tokenizer: Any, tuned: bool, system: str | None = None,
                 max_new_tokens: int = 256, seed: int | None = None, **sampling: Any) -> None:
        self.model, self.tokenizer, self.tuned = model, tokenizer, tuned
        self.max_new_tokens, self.seed, self.sampling = max_new_tokens, seed, sampling
        self.system = [{"role": "system", "content": system}] if system else []
        self.turns: list[dict[str, str]] = []
        self.answers = 0
        window = window_length(model)
        self.budget = window - max_new_tokens
        if self.budget < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} leaves no room in the window of "
                             f"{window} tokens; give at most {window - 1}")

    def reset(self) -> None:
        self.turns.clear()

    def ask(self, text: str) -> int:
        """Add a user turn; returns how many old turns had to be dropped to make it fit.

        Raises ValueError if it does not fit even alone; the conversation is then as before.
        """
        turns = [*self.turns, {"role": "user", "content": text}]
        kept = turns
        while (length := len(self.prompt(kept))) > self.budget and len(kept) > 1:
            kept = kept[2:]  # a question and its answer
        if length > self.budget:
            raise ValueError(f"the message takes {length} tokens and {self.budget} fit beside an "
                             f"answer of {self.max_new_tokens}; shorten it or lower max_new_tokens")
        self.turns = list(kept)
        return len(turns) - len(kept)

    def answer(self) -> Generator[str, None, None]:
        """Stream the model's turn; whatever was said when the stream ends or is closed is kept."""
        said: list[str] = []
        seed = None if self.seed is None else self.seed + self.answers
        self.answers += 1
        stop = (self.tokenizer.special(TURN_END),) if self.tuned else ()
        stream = pieces(self.model, self.tokenizer, self.prompt(self.turns), self.max_new_tokens,
                        seed=seed, stop=stop, **self.sampling)
        try:
            for piece in stream:
                said.append(piece)
                yield piece
        finally:
            self.turns.append({"role": "assistant", "content": "".join(said)})

    def prompt(self, turns: list[dict[str, str]]) -> list[int]:
        return prompt_ids(self.tokenizer, [*self.system, *turns], self.tuned)


def prompt_ids(tokenizer: Any, turns: Sequence[Mapping[str, str]], tuned: bool) -> list[int]:
    """What the model reads: chat turns, or for an untuned model the plain text so far."""
    if tuned:
        return render(tokenizer, turns)
    texts = [turn["content"] + "\n" * (turn["role"] != "user") for turn in turns]
    return [tokenizer.end_of_text, *tokenizer.encode("".join(texts))]


def chat(run: str | Path, system: str | None = None, temperature: float = 0.8,
         top_k: int | None = 50, top_p: float | None = None, max_new_tokens: int = 256,
         seed: int | None = None, device: str = "auto",
         precision: str = "float32") -> None:
    """Load a run and talk until end of input. Raises ValueError, one line, as loading does."""
    notes, out = console(), Console(highlight=False)
    loaded = load(run, device)
    tuned = knows_chat(loaded.folder)
    fits = max(1, window_length(loaded.model) // 2)
    if max_new_tokens > fits:
        notes.print(Text(f"Answers are at most {fits} tokens long: half of what the model reads.",
                         style="dim"))
    conversation = Conversation(loaded.model, loaded.tokenizer, tuned, system,
                                min(max_new_tokens, fits), seed,
                                temperature=temperature, top_k=top_k, top_p=top_p,
                                step=open_step(loaded.model, precision, notes.print))
    if not tuned:
        notes.print(Text(BASE, style="yellow"), soft_wrap=True)
    talk(conversation, out, notes)


def talk(conversation: Conversation, out: Console, notes: Console) -> None:
    """Read lines from standard input and answer each, until it ends or says /exit."""
    live = sys.stdin.isatty()
    if live:
        notes.print(Text(HELP, style="dim"))
    for line in _lines(live, notes):
        if line == "/exit":
            return
        if line == "/reset":
            conversation.reset()
            notes.print(Text("The conversation starts anew.", style="dim"))
        elif line.startswith("/"):
            unknown = "" if line == "/help" else f"{line.split()[0]} is no command. "
            notes.print(Text(unknown + HELP, style="dim"))
        elif line:
            _exchange(conversation, line, out, notes)


def knows_chat(step: Path) -> bool:
    """Whether the run that a step folder belongs to says it was trained on chat turns."""
    record = step.resolve().parent / "config.json"
    if not record.is_file():
        return False
    return bool(json.loads(record.read_text(encoding="utf-8")).get("stage", PRETRAIN) != PRETRAIN)


def _exchange(conversation: Conversation, line: str, out: Console, notes: Console) -> None:
    try:
        dropped = conversation.ask(line)
    except ValueError as error:
        notes.print(Text(str(error), style="red"), soft_wrap=True)
        return
    if dropped:
        notes.print(Text(f"The context is full: the oldest {dropped} turns were dropped.",
                         style="dim"))
    with contextlib.closing(conversation.answer()) as answer:
        try:
            for piece in answer:
                out.print(Text(piece), end="", soft_wrap=True)
                out.file.flush()
        except KeyboardInterrupt:
            notes.print(Text(" (stopped)", style="dim"), end="")
    out.print()


def _lines(live: bool, notes: Console) -> Iterator[str]:
    if not live:
        yield from (line.strip() for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):  # line editing and recall, where the platform has them
        import readline  # noqa: F401
    while True:
        try:
            yield input("> ").strip()
        except EOFError:
            notes.print()
            return
        except KeyboardInterrupt:
            notes.print(Text("\nCtrl-D or /exit leaves.", style="dim"))
