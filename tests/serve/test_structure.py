"""Structured output and tools over HTTP, with the real engine: texts follow their schemas."""
from __future__ import annotations

import json
import re

import jsonschema_rs
import pytest

from fira.data.tokenizer import CHAT_TEMPLATE, Tokenizer
from fira.serve.structure import CallParser
from tests.serve.test_server import events

pytest.importorskip("llguidance")
ADD = {"type": "function", "function": {
    "name": "add", "description": "Sum", "parameters": {
        "type": "object", "properties": {"a": {"$ref": "#/$defs/digit"}}, "required": ["a"],
        "additionalProperties": False, "$defs": {"digit": {"type": "integer", "minimum": 0,
                                                           "maximum": 9}}}}}
STOP = {"type": "function", "function": {"name": "stop"}}
PERSON = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 4},
                                           "kind": {"enum": ["a", "b"]}},
          "required": ["name", "kind"], "additionalProperties": False}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
SPEAK = {"temperature": 1.5, "seed": 3, "max_tokens": 60}


@pytest.fixture(scope="module")
def window():
    return 1024


def message(running, **fields):
    response = running.chat(**{**SPEAK, **fields})
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


@pytest.mark.parametrize("fields, wanted", [
    ({"response_format": FORMAT}, "person"), ({"guided_json": PERSON}, "person"),
    ({"guided_json": json.dumps(PERSON)}, "person"),
    ({"structured_outputs": {"json": PERSON}}, "person"),
    ({"response_format": {"type": "json_object"}}, r"\{.*\}"),
    ({"structured_outputs": {"json_object": True}}, r"\{.*\}"),
    ({"guided_regex": "[0-9]{3}"}, "[0-9]{3}"), ({"structured_outputs": {"regex": "x+y"}}, "x+y"),
    ({"guided_choice": ["no", 'a "b"\n']}, 'no|a "b"\n'), ({"grammar": 'root ::= "yes"'}, "yes"),
    ({"structured_outputs": {"grammar": 'start: "a" | "b"'}}, "a|b"),
])
def test_a_text_has_the_form_that_was_asked_for(real, tokenizer, fields, wanted):
    if wanted.startswith(r"\{"):  # any object: a model that learned nothing would not end it
        fields = {**fields, "logit_bias": {str(tokenizer.encode("}")[0]): 100}}
    choices = real.chat(**SPEAK, n=3, **fields).json()["choices"]
    assert [choice["finish_reason"] for choice in choices] == ["stop"] * 3
    texts = [choice["message"]["content"] for choice in choices]
    if wanted == "person":
        assert all(jsonschema_rs.is_valid(PERSON, json.loads(text)) for text in texts)
        assert len(set(texts)) == 3
    else:
        assert all(re.fullmatch(wanted, text, re.DOTALL) for text in texts), texts
    parts = [chunk["choices"][0] for chunk in
             events(real.chat(**SPEAK, n=3, stream=True, **fields))[:-1]]
    for index, text in enumerate(texts):
        assert "".join(part["delta"].get("content", "") for part in parts
                       if part["index"] == index) == text


@pytest.mark.parametrize("fields, most", [
    ({"tool_choice": "required"}, None), ({"tool_choice": "required", "n": 2}, None),
    ({"tool_choice": {"type": "function", "function": {"name": "add"}},
      "parallel_tool_calls": False}, 1)])
def test_a_forced_call_follows_the_tools_schema_also_streamed(real, tokenizer, fields, most):
    end = {str(tokenizer.special("<|im_end|>")): 100}
    fields = {**SPEAK, "tools": [ADD, STOP], "logit_bias": end, **fields}
    choices = real.chat(**fields).json()["choices"]
    for choice in choices:
        assert choice["message"]["content"] is None and choice["finish_reason"] == "tool_calls"
        calls = choice["message"]["tool_calls"]
        assert 1 <= len(calls) <= (most or 60)
        for call in calls:
            schema = ADD["function"]["parameters"] if call["function"]["name"] == "add" else {
                "maxProperties": 0}
            assert jsonschema_rs.is_valid(schema, json.loads(call["function"]["arguments"]))
    streams = [[] for _ in choices]
    for chunk in events(real.chat(**fields, stream=True))[:-1]:
        for choice in chunk["choices"]:
            streams[choice["index"]] += choice["delta"].get("tool_calls", [])
    for choice, pieces in zip(choices, streams, strict=True):
        for number, call in enumerate(choice["message"]["tool_calls"]):
            first, *others = [piece for piece in pieces if piece["index"] == number]
            assert first["function"] == {"name": call["function"]["name"], "arguments": ""}
            assert "".join(piece["function"]["arguments"] for piece in others
                           ) == call["function"]["arguments"]


def test_a_model_that_may_call_talks_calls_or_follows_the_format(real, tokenizer):
    call = str(tokenizer.special("<tool_call>"))
    talk = message(real, tools=[ADD], logit_bias={call: -100})
    assert talk["message"]["content"] and "tool_calls" not in talk["message"]
    called = message(real, tools=[ADD], logit_bias={call: 100}, parallel_tool_calls=False)
    assert called["finish_reason"] == "tool_calls" and called["message"]["content"] is None
    formed = message(real, tools=[ADD], logit_bias={call: -100}, response_format=FORMAT)
    assert jsonschema_rs.is_valid(PERSON, json.loads(formed["message"]["content"]))
    assert message(real, tools=[ADD], tool_choice="none", max_tokens=5)["message"]["content"]


def test_calls_and_their_results_go_back_as_history(real, tokenizer):
    answer = message(real, tools=[ADD], tool_choice="required", parallel_tool_calls=False)
    history = [{"role": "user", "content": "Hi"}, answer["message"], {
        "role": "tool", "content": "5", "tool_call_id": answer["message"]["tool_calls"][0]["id"]}]
    ids = real.http.post("/tokenize", json={"messages": history}).json()["tokens"]
    names = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
    assert [id for id in ids if id in set(map(tokenizer.special, names))
            ] == list(map(tokenizer.special, names))
    assert message(real, messages=history, max_tokens=2)


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_text_is_divided_the_same_whatever_its_pieces(step):
    call = '<tool_call>\n{"name": "%s", "arguments": %s}\n</tool_call>'
    text = ('A <tool> {"name": \n' + call % ("a", '{"x": {"y": "}</tool_call>"}}') + "\n"
            + call % ("b\\u00e9", "{}"))
    parser, deltas = CallParser(), []
    for start in range(0, len(text), step):
        deltas += parser.push(text[start:start + step], start + step >= len(text))
    assert "".join(delta.get("content", "") for delta in deltas) == 'A <tool> {"name": '
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert [call["function"]["name"] for call in calls if "id" in call] == ["a", "bé"]
    for number, arguments in enumerate(('{"x": {"y": "}</tool_call>"}}', "{}")):
        assert "".join(call["function"]["arguments"] for call in calls if call["index"] == number
                       ) == arguments


HARD = "(a|ab|[abc]{2,9}){0,1000}a[ab]{99}"  # compiles, and is beyond its limits after 136 times a


@pytest.mark.parametrize("path, body", [
    ("chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 300}),
    ("completions", {"prompt": "Hi", "max_tokens": 300})])
def test_a_grammar_beyond_its_limits_ends_its_own_answer_and_no_later_one(real, tokenizer, path,
                                                                          body):
    def ask(**fields):
        return real.http.post(f"/v1/{path}", json={**body, "guided_regex": HARD, "logit_bias": {
            str(tokenizer.encode("a")[0]): 100}, **fields})

    failed = ask().json()["error"]
    assert ask().status_code == 400 and failed["type"] == "invalid_request_error"
    assert failed["code"] == "grammar" and "use a simpler one" in failed["message"]
    *chunks, last = events(ask(stream=True))
    assert len(chunks) > 100 and last == {"error": failed}
    assert ask(max_tokens=100).status_code == 200


WRONG = [
    ({"response_format": {"type": "json_schema"}}, "response_format", "is missing"),
    ({"guided_json": {"type": "objekt"}}, "guided_json", "objekt"),
    ({"response_format": FORMAT, "guided_regex": "a"}, "guided_regex", "both constrain"),
    ({"guided_regex": "(?=a)"}, "guided_regex", "look-around"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least 1"),
    ({"tool_choice": "required"}, "tool_choice", "not in tools"),
    ({"tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "x"}}},
     "tool_choice", "not in tools"),
    ({"tools": [ADD], "tool_choice": {"type": "tool"}}, "tool_choice", "names one of the tools"),
    ({"tools": [{"type": "web_search"}]}, "tools.0.type", "function"),
    ({"tools": [ADD], "guided_regex": "a"}, "guided_regex", "with tools"),
    ({"tools": [{"type": "function", "function": {
        "name": "f", "strict": True, "parameters": {"not": {}}}}]}, "tools", "not"),
]


@pytest.mark.parametrize("fields, param, words", WRONG)
def test_a_form_that_cannot_be_had_is_refused(running, served, engine, fields, param, words):
    served.window = 1024
    response = running.chat(**fields)
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"].startswith(param), error
    assert words in error["message"] and "\n" not in error["message"] and not engine.asked


@pytest.mark.parametrize("fields", [{"tools": [ADD]}, {"messages": [
    {"role": "user", "content": "x"}, {"role": "tool", "content": "5", "tool_call_id": "x"}]}])
@pytest.mark.parametrize("tuned, template", [(False, CHAT_TEMPLATE), (True, "{{ messages }}")])
def test_a_model_without_a_form_for_tools_refuses_them(running, served, fields, tuned, template):
    served.chat_tuned = tuned
    served.tokenizer = Tokenizer(served.tokenizer.reference, {"chat_template": template})
    response = running.chat(**fields)
    assert response.status_code == 400
    assert "has no form for tools" in response.json()["error"]["message"]
