"""Chat keeps what fits, says what it drops, and survives Ctrl-C."""
from __future__ import annotations

import copy
import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

from fira.data.chat import prompt_ids, render
from fira.infer import text as module
from fira.infer.chat import UNTUNED, chat, talk
from fira.infer.request import SamplingParams
from fira.infer.text import Conversation
from fira.runlog import console


def conversation(model, tokenizer, tuned=True, system=None, max_new_tokens=16) -> Conversation:
    params = SamplingParams(max_new_tokens=max_new_tokens, seed=1)
    return Conversation(model, tokenizer, tuned, params, system)


def say(monkeypatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def test_messages_are_kept_as_chat(model, tokenizer) -> None:
    talker = conversation(model, tokenizer, system="Be brief.")
    assert talker.ask("Hi") == 0
    reply = "".join(talker.reply())
    assert talker.messages == [{"role": "user", "content": "Hi"},
                            {"role": "assistant", "content": reply}]
    messages = [{"role": "system", "content": "Be brief."}, *talker.messages]
    assert talker.prompt(talker.messages) == render(tokenizer, messages)


def test_the_same_seed_gives_the_same_conversation(model, tokenizer) -> None:
    def run() -> list[dict[str, str]]:
        talker = conversation(model, tokenizer, max_new_tokens=8)
        for text in ("a", "b"):
            talker.ask(text)
            list(talker.reply())
        return talker.messages
    first = run()
    assert first == run() and first[1] != first[3]


def test_the_oldest_messages_are_dropped_when_the_context_is_full(model, tokenizer) -> None:
    talker = conversation(model, tokenizer)
    dropped = []
    for _ in range(6):
        dropped.append(talker.ask("The Union"))
        assert len(talker.prompt(talker.messages)) <= model.spec.context - 16
        assert talker.messages[0]["role"] == talker.messages[-1]["role"] == "user"
        talker.messages.append({"role": "assistant", "content": "The state"})
    assert dropped[0] == 0 and 2 in dropped


def test_a_message_too_long_is_refused_and_changes_nothing(model, tokenizer) -> None:
    talker = conversation(model, tokenizer)
    talker.ask("Hi")
    list(talker.reply())
    before = list(talker.messages)
    with pytest.raises(ValueError, match="shorten it"):
        talker.ask("x" * 500)
    assert talker.messages == before
    with pytest.raises(ValueError, match="leaves no room"):
        conversation(model, tokenizer, max_new_tokens=64)


def test_an_untuned_model_reads_plain_text(model, tokenizer) -> None:
    talker = conversation(model, tokenizer, tuned=False)
    talker.messages = [{"role": "user", "content": "The"},
                       {"role": "assistant", "content": " state"}]
    talker.ask("of")
    expected = [tokenizer.end_of_text, *tokenizer.encode("The state\nof")]
    assert talker.prompt(talker.messages) == expected
    continued = prompt_ids(tokenizer, talker.messages[:2], tuned=False, continue_final=True)
    assert continued == expected[:1] + tokenizer.encode("The state")


def test_thoughts_are_shown_apart_and_leave_the_history(model, tokenizer, monkeypatch,
                                                        capsys) -> None:
    think = tokenizer.special("<think>")
    model = copy.copy(model)
    model.think = True
    for limits, thinks in (({"max_thinking_tokens": 4}, True), ({"max_thinking_tokens": 0}, False)):
        params = SamplingParams(max_new_tokens=12, temperature=0, ignore_end=True, **limits)
        talker = Conversation(model, tokenizer, True, params)
        assert talker.prompt([]) == render(tokenizer, [], direct=not thinks)
        monkeypatch.setattr(talker, "prompt", lambda _, ids=[7, think][:1 + thinks]: ids)
        say(monkeypatch, "The state\n")
        talk(talker, console(stderr=False), console())
        out, notes = capsys.readouterr()
        assert bool(notes.strip()) == thinks and talker.messages[1]["content"] == out[:-1]
    model.think = None
    with pytest.raises(ValueError, match="not tuned to think; leave out --think on and --max-th"):
        Conversation(model, tokenizer, True, params, think="on")


def test_a_pipe_gets_answers_alone(step_folder: Path, monkeypatch, capsys) -> None:
    say(monkeypatch, "The state\n\n/reset\n/wat\nThe state\n/exit\nnever read\n")
    chat(step_folder.parent, SamplingParams(max_new_tokens=8, temperature=0), device="cpu")
    out, notes = capsys.readouterr()
    first, second = out[:len(out) // 2], out[len(out) // 2:]
    assert out.strip() and first == second  # greedy, and forgotten in between
    assert notes.count(UNTUNED) == 1
    assert "starts anew" in notes and "/wat is no command" in notes


def test_control_c_stops_the_answer_and_keeps_what_was_said(model, tokenizer, monkeypatch) -> None:
    def interrupted(*_: object, **__: object):
        yield "half"
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "stream_text", interrupted)
    say(monkeypatch, "one\ntwo\n")
    out, notes = io.StringIO(), io.StringIO()
    talker = conversation(model, tokenizer)
    talk(talker, Console(file=out), Console(file=notes))
    assert out.getvalue() == "half\nhalf\n" and notes.getvalue().count("(stopped)") == 2
    assert [message["content"] for message in talker.messages] == ["one", "half", "two", "half"]


def test_at_a_terminal_a_pasted_block_is_one_message_and_control_d_leaves_but_not_control_c(
        model, tokenizer, monkeypatch) -> None:
    typed, arrived = iter([KeyboardInterrupt, "/Hi", "there", EOFError]), iter([[1], [], []])

    def type_next(_: str = "") -> str:
        event = next(typed)
        if isinstance(event, str):
            return event
        raise event

    monkeypatch.setattr("builtins.input", type_next)
    monkeypatch.setattr("select.select", lambda *_: (next(arrived),))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    talker = conversation(model, tokenizer)
    talk(talker, Console(file=io.StringIO()), Console(file=io.StringIO()))
    assert talker.messages[0]["content"] == "/Hi\nthere"
