"""A constrained text follows its grammar, whoever else is in the batch and however it is drawn."""
from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from fira.infer.constraint import LONGEST, Grammars
from fira.infer.decode import open_step
from fira.infer.engine import Engine
from fira.infer.request import End, SamplingParams

pytest.importorskip("llguidance")
SCHEMA = json.dumps({"type": "object", "properties": {
    "name": {"type": "string", "maxLength": 5}, "kind": {"enum": ["a", "b"]},
    "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}},
    "required": ["name", "kind", "tags"], "additionalProperties": False})
CHOICE = 'start: "naïve 🙂" | "\\"" | "no"'
DATE = r"[0-9]{4}-[0-9]{2}"
GBNF = 'root ::= "yes" ws "indeed" | "no"\nws ::= " "+\n'


@pytest.fixture(scope="module")
def grammars(tokenizer):
    return Grammars(tokenizer, 320)


@pytest.fixture
def generate(model, tokenizer):
    """Run requests together; the text and the end of each."""
    def run(*several, decode_step=None):
        engine, events = Engine(model, tokenizer, slots=3, decode_step=decode_step), []
        for params in several:
            events.append(own := [])
            engine.add(tokenizer.encode("The state"), params, own.append)
        while engine.step():
            pass
        engine.close()
        return [("".join(event.text for event in own), own[-1]) for own in events]
    return run


def follows(kind, text):
    if kind == "json":
        found = json.loads(text)
        return (list(found) == ["name", "kind", "tags"] and len(found["name"]) <= 5
                and found["kind"] in ("a", "b") and json.dumps(found, ensure_ascii=False) == text)
    return bool(re.fullmatch(DATE if kind == "regex" else "yes +indeed|no|naïve 🙂|\"", text))


@pytest.mark.parametrize("compiled", [False, True])
def test_each_text_of_a_batch_follows_its_own_grammar(generate, grammars, model, compiled):
    step = open_step(model, "float32", print) if compiled else None
    kinds = [("json", SCHEMA), ("regex", DATE), ("grammar", CHOICE), None]
    several = [SamplingParams(max_new_tokens=60, temperature=1.5, seed=seed, logprobs=1,
                              constraint=kind and grammars.compile(*kind))
               for seed in range(3) for kind in kinds]
    found = generate(*several, decode_step=step)
    for number, (text, end) in enumerate(found):
        if kind := kinds[number % 4]:
            assert follows(kind[0], text) and end.reason == "stop", (kind, text, end)
    assert len({text for text, _ in found[::4]}) == 3
    if not compiled:  # alone, each says the same
        assert [generate(params)[0][0] for params in several] == [text for text, _ in found]


def test_a_grammar_ends_where_it_must_and_may(generate, grammars, tokenizer):
    letters = grammars.compile("regex", "[ab]{3,}")
    end = {tokenizer.end_of_text: 100}
    (short, ended), (cut, reason), (stopped, by) = generate(
        SamplingParams(constraint=letters, logit_bias=end),  # it may end after three letters
        SamplingParams(constraint=letters, max_new_tokens=2, logit_bias=end),
        SamplingParams(constraint=grammars.compile("regex", "aaaa"), stop=("aaa",)))
    assert re.fullmatch("[ab]{3,}", short) and ended.reason == "stop"
    assert reason.reason == "length" and re.fullmatch("[ab]+", cut)
    assert (stopped, by.stop) == ("", "aaa")
    params = SamplingParams(constraint=grammars.compile("regex", "a{40}b"), ignore_end=True,
                            max_new_tokens=60)
    assert generate(params)[0][0] == "a" * 40 + "b"


def test_log_probabilities_are_the_models_own(model, tokenizer, grammars):
    free = SamplingParams(max_new_tokens=1, temperature=0, logprobs=3)
    bound = replace(free, constraint=grammars.compile("regex", "Q"))
    engine = Engine(model, tokenizer, slots=1)
    (one, _), (other, _) = (engine.stream(tokenizer.encode("The state"), params)
                            for params in (free, bound))
    assert other.text == "Q" != one.text
    assert [id for id, _ in other.score.top] == [id for id, _ in one.score.top]
    assert other.score.top[0][1] == pytest.approx(one.score.logprob, abs=0.01)
    assert other.score.logprob < one.score.logprob


def test_a_special_token_that_has_a_name_gives_its_text(generate, grammars, tokenizer):
    call = tokenizer.special("<tool_call>")
    constraint = grammars.compile("grammar", f'start: <[{call}]> "x"')
    plain = SamplingParams(constraint=constraint)
    named = replace(plain, named={call: b"<tool_call>"})
    assert [text for text, _ in generate(plain, named)] == ["x", "<tool_call>x"]


@pytest.mark.parametrize("kind, grammar, words", [
    ("json", '{"type": "objekt"}', "objekt"), ("json", '{"not": {}}', "not"),
    ("json", "[]", "object"), ("json", '{"$ref": "http://x/y"}', "fetch"),
    ("json", "{", "EOF"), ("json", '{"a":' * 5000, "recursion"),
    ("json", json.dumps({"enum": ["x"] * 2**14}), f"{LONGEST}"),
    ("regex", "([", "unclosed"), ("regex", "(?=a)b", "look"),
    ("grammar", "start: nothing", "nothing"), ("grammar", "root ::= (((", "Expected"),
    ("grammar", "root ::= " + "(" * 9000, "recursion"), ("grammar", "", "root"),
])
def test_what_cannot_be_compiled_is_one_line(grammars, kind, grammar, words):
    with pytest.raises(ValueError, match=words) as refused:
        grammars.compile(kind, grammar)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 200


def test_gbnf_of_llama_cpp_is_read(generate, grammars):
    (text, end), = generate(SamplingParams(constraint=grammars.compile("grammar", GBNF), seed=1))
    assert follows("gbnf", text) and isinstance(end, End)
