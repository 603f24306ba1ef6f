"""A thought is told apart from the answer and closed at its limit, whoever else is in the batch."""
from __future__ import annotations

import json

import pytest
import torch

from fira.data.tokenizer import Tokenizer
from fira.infer.constraint import Grammars
from fira.infer.engine import Engine
from fira.infer.request import Request, SamplingParams
from tests.infer.test_engine import GREEDY, ids, naive, run

SAID = "<think>\nWell, 🙂\nthen.\n</think>\n\nThe state.\nIs it?\n<|im_end|>"


def follow(tokenizer, said, prompt=(5, 6), **params):
    """The events of a request whose model wants to write the text `said`, wherever it stands."""
    script = tokenizer.encode(said, allow_special=True)
    params = {"max_new_tokens": 60, "max_thinking_tokens": 50, "temperature": 0.0, **params}
    params["stop_ids"] = (tokenizer.special("<|im_end|>"),)
    request = Request(1, list(prompt), SamplingParams(**params), print, tokenizer,
                      tokenizer.token_bytes(), torch.device("cpu"))
    events, place = [], 0
    while not events or not request.end_reason():
        logits_V = torch.zeros(320)
        logits_V[script[min(place, len(script) - 1)]] = 9.0
        token = request.add_token(logits_V)
        events.append(token)
        if token.id == script[min(place, len(script) - 1)]:
            place += 1
        elif token.forced and tokenizer.special("</think>") == token.id:
            place = script.index(token.id) + 1  # it goes on with its answer
    return [*events, request.end(request.end_reason())]


def parts(events):
    """The texts of thought and answer."""
    return tuple("".join(event.text for event in events if getattr(event, "thought", 0) == of)
                 for of in (True, False))


@pytest.mark.parametrize("said, limit, thought, answer", [
    (SAID, 50, "Well, 🙂\nthen.", "The state.\nIs it?\n"),
    ("The state.<|im_end|>", 50, "", "The state."),
    ("The <think>state.<|im_end|>", 50, "", "The state."),
    ("<think>\n\n</think>\n\nThe state.<|im_end|>", 50, "", "The state."),
    (SAID, 0, "", "The state.\nIs it?\n"),
    ("<think>\nWell<|im_end|>", 50, "Well", ""),
])
def test_thought_and_answer_are_told_apart(tokenizer, said, limit, thought, answer):
    found = follow(tokenizer, said, max_thinking_tokens=limit)
    assert parts(found) == (thought, answer)
    assert found[-1].reason == "stop" and not any(event.forced for event in found[:1])


def test_at_every_limit_the_thought_is_closed_as_in_training_and_counted(tokenizer):
    inside = tokenizer.encode("\nWell, 🙂\nthen.\n")
    closing = (tokenizer.encode("\n"), tokenizer.special("</think>"), tokenizer.encode("\n\n"))
    for limit in range(len(inside) + 1):
        found = follow(tokenizer, SAID, max_thinking_tokens=limit)
        written = tokenizer.decode([token.id for token in found[:-1]])
        head, _, rest = written.partition("</think>")
        assert head.endswith("\n") and not head.endswith("\n\n") or limit < 2, (limit, head)
        assert rest.startswith("\n\n") and found[-1].thinking_tokens == limit
        forced = [token.id for token in found[:-1] if token.forced]
        assert forced in ([*closing[0], closing[1], *closing[2]], [closing[1], *closing[2]],
                          [*closing[2], closing[1], *closing[2]], [*closing[2]])
    assert follow(tokenizer, SAID)[-1].thinking_tokens == len(inside)


def test_stop_strings_are_those_of_the_answer(tokenizer):
    found = follow(tokenizer, SAID, stop=("\n", "Well"))
    assert parts(found) == ("Well, 🙂\nthen.", "The state.") and found[-1].stop == "\n"
    plain = follow(tokenizer, SAID, stop=("Well",), max_thinking_tokens=None)
    assert parts(plain) == ("", "\n") and plain[-1].stop == "Well"


def test_a_grammar_holds_for_the_answer_alone(tokenizer):
    pytest.importorskip("llguidance")
    grammar = Grammars(tokenizer, 320).compile("json", json.dumps({"enum": ["The"]}))
    for said in (SAID, SAID.replace("then", "then<|im_end|>"), "no thought"):
        found = follow(tokenizer, said, constraint=grammar)
        thought, answer = parts(found)
        assert (answer, found[-1].reason) == ('"The"', "stop")
        assert bool(thought) == ("<think>" in said)


@torch.no_grad()
def test_a_batch_of_limits_gives_what_each_gives_alone_and_naive_decoding(model, tokenizer):
    """Prompts that end inside of a thought; a random model hardly closes one by itself."""
    think, end = (tokenizer.special(name) for name in ("<think>", "</think>"))
    line, gap = tokenizer.encode("\n"), tokenizer.encode("\n\n")
    prompts = [[7 + n, 8, think, *line] for n in range(5)]
    params = [GREEDY | {"max_thinking_tokens": 2 * n + 1, "logit_bias": {end: -9.0}}
              for n in range(5)]
    together = run(model, tokenizer, prompts, params, slots=3)
    for prompt, one, seen in zip(prompts, params, together, strict=True):
        (alone,) = run(model, tokenizer, [prompt], [one])
        assert seen == alone and seen[-1].thinking_tokens == one["max_thinking_tokens"]
        written = ids(seen)
        place = written.index(end) + 1 + len(gap)
        assert written[place - len(gap):place] == gap
        assert written[place:] == naive(model, [*prompt, *written[:place]], 20 - place)
    seeded = GREEDY | {"temperature": 1.0, "seed": 3, "max_thinking_tokens": 4}
    first, second = (run(model, tokenizer, prompts[:count], [seeded] * count)[0]
                     for count in (1, 4))
    assert ids(first) == ids(second)


def test_limits_that_cannot_be_kept_are_refused(model, tokenizer):
    with pytest.raises(ValueError, match="max_thinking_tokens=9 must be from 0 to max_new_tokens=8"
                                         ".*; lower it, or raise max_new_tokens"):
        SamplingParams(max_new_tokens=8, max_thinking_tokens=9)
    other = Tokenizer(tokenizer.reference)
    other.added = {"<|endoftext|>": tokenizer.end_of_text}
    with pytest.raises(ValueError, match="max_thinking_tokens=4 needs a tokenizer with <think> and"
                                         " </think>, and this model's has not both; leave it out"):
        Engine(model, other).add([1], SamplingParams(max_thinking_tokens=4), print)
