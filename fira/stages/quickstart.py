"""The whole path on real text: train a tokenizer, tokenize, train `tiny`, print samples; then, if
asked for, tune it into one that converses."""
from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from fira.config import load_preset
from fira.data.prepare import learn_tokenizer, prepare
from fira.infer.load import load
from fira.infer.request import SamplingParams
from fira.infer.text import Conversation, complete
from fira.runlog import RunLog
from fira.stages.config import configure
from fira.stages.pretrain import PRETRAIN, pretrain
from fira.stages.start import tune

CORPUS = "sotu"
PROMPTS = ("The state of the Union is", "Fellow citizens, our trade with foreign nations",
           "To our children")
# Conversations of up to 256 tokens for a minute and a half, at half of the rates of `tiny`: at a
# tenth, the default of a full tuning, the answers have the right form and the wrong facts.
CHAT = ("train.minutes=1.5", "train.sequence_length=256", "optim.lr=5e-3", "optim.router_lr=2.5e-3",
        "optim.embedding_lr=2e-2")
QUESTIONS = ("Hello", "Who spoke in 1863?", "And in the year after?", "Thank you")


def quickstart(out: Path, settings: Iterable[str], screen: Console) -> Path:
    """Make a tokenizer, data and a trained run in `out`; returns the run folder."""
    settings = [*settings, f"data.folder={out / 'data'}"]
    vocab_size = configure(PRETRAIN, load_preset("tiny"), settings).model.vocab_size
    screen.print("text: 249 State of the Union addresses, 1790 to today (public domain; from the "
                 "package sotu, MIT license)", soft_wrap=True)
    if (out / "data" / "manifest.json").exists():
        screen.print(f"using the tokenizer and data already in {out}")
    else:
        learned = learn_tokenizer([CORPUS], out / "tokenizer", vocab_size, 1 << 30, screen)
        prepare([CORPUS], out / "data", learned, screen=screen)
    run = out / "run"
    pretrain("tiny", settings, run, "auto", (run / "config.json").exists(), screen)
    _print_samples(run, screen)
    return run


def quickstart_chat(out: Path, screen: Console) -> Path:
    """Tune the run in `out` on conversations about the same addresses; returns the new run."""
    run = out / "chat"
    screen.print("conversations: questions on the same addresses, made by rule", soft_wrap=True)
    data = {"chat": [CORPUS], "general": [str(out / "data")], "replay": 0.1}
    sections: dict[str, dict[str, Any]] = {
        "data": data, "tune": {"method": "full", "router": "train"}}
    tune(out / "run", sections, 1.0, CHAT, run, "auto",
         (run / "config.json").exists(), screen)
    _print_conversation(run, screen)
    return run


def _print_samples(run: Path, screen: Console) -> None:
    """Print three samples and put them on record."""
    loaded = load(run)
    step = int(loaded.folder.name.partition("-")[2])
    log = RunLog(run)
    for seed, prompt in enumerate(PROMPTS):
        params = SamplingParams(max_new_tokens=60, temperature=0.8, seed=seed)
        text = "".join(complete(loaded.model, loaded.tokenizer, prompt, params))
        log.write("sample", step, prompt=prompt, text=text)
        screen.print(Text.assemble("\n", (prompt, "bold"), text), soft_wrap=True)
    log.close()


def _print_conversation(run: Path, screen: Console) -> None:
    loaded = load(run)
    params = SamplingParams(max_new_tokens=60, temperature=0.0)
    conversation = Conversation(loaded.model, loaded.tokenizer, True, params)
    for question in QUESTIONS:
        conversation.ask(question)
        screen.print(Text.assemble("\n", (question, "bold"), "\n", "".join(conversation.reply())),
                     soft_wrap=True)


def next_steps(out: Path) -> str:
    """What to try after the quickstart."""
    run, chat = out / "run", out / "chat"
    tuned = [f"  fira chat {chat}", f"  fira serve {chat}"] if chat.is_dir() else [
        f"  fira quickstart --chat --out {out}"]
    return "\n".join([
        "\nnext:", *tuned,
        f'  fira generate {run} "My fellow Americans," --max-new-tokens 100',
        f"  fira eval {run} --text README.md",
        f"  fira train tiny data.folder={out / 'data'} train.minutes=30 --run out/longer",
        "  fira show fira-334m",
    ])
