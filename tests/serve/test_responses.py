"""/v1/responses as OpenAI's client uses it: whole, streamed, parsed, with tools, sent back."""
from __future__ import annotations

import json
from functools import partial
from typing import Literal

import pytest
from pydantic import BaseModel, Field

from tests.serve.test_server import events
from tests.serve.test_structure import ADD

package = pytest.importorskip("openai", reason="the openai package is not installed")
pytest.importorskip("llguidance")
TOOL = {"type": "function", **ADD["function"]}


@pytest.fixture(scope="module")
def window():
    return 1024


@pytest.fixture(scope="module")
def client(real):
    return package.OpenAI(base_url=real.address + "/v1", api_key="none", max_retries=0)


@pytest.fixture
def create(client):
    return partial(client.responses.create, model="tiny", temperature=0, max_output_tokens=12)


def test_a_response_says_what_a_chat_says(create, client):
    found = create(input="Hi", instructions="Be brief.", max_output_tokens=3)
    chat = client.chat.completions.create(model="tiny", temperature=0, max_tokens=3, messages=[
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    assert found.output_text == chat.choices[0].message.content
    assert found.usage.output_tokens == chat.usage.completion_tokens
    schema = {"type": "json_schema", "name": "letters", "schema": {"enum": ["Qz" * 9]}}
    cut, whole = (create(input="Hi", text={"format": schema}, max_output_tokens=size)
                  for size in (3, 40))
    assert (whole.status, whole.output_text) == ("completed", json.dumps("Qz" * 9))
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (cut.output_text, cut.output[0].status) == ('"Qz', "incomplete")


@pytest.mark.parametrize("fields", [
    {}, {"tools": [TOOL], "tool_choice": {"type": "function", "name": "add"}}])
def test_a_stream_makes_the_same_response_in_named_numbered_events(create, real, fields):
    fields = {"input": "Hi", "max_output_tokens": 200, "parallel_tool_calls": False, **fields}
    whole = create(**fields)
    found = list(create(**fields, stream=True))
    assert [event.sequence_number for event in found] == list(range(len(found)))
    assert [event.type for event in found[:3]] == [
        "response.created", "response.in_progress", "response.output_item.added"]
    last, kind = found[-1].response, "output_text" if not fields.get("tools") else (
        "function_call_arguments")
    assert found[-1].type == f"response.{whole.status}" == f"response.{last.status}"
    pieces = [event.delta for event in found if event.type == f"response.{kind}.delta"]
    (done,) = [event for event in found if event.type == f"response.{kind}.done"]
    output = [(item.type, getattr(item, "arguments", None) or item.content[0].text)
              for item in whole.output]
    assert "".join(pieces) == output[0][1] and len(pieces) > 1
    assert (done.text if kind == "output_text" else done.arguments) == output[0][1]
    assert output == [(item.type, getattr(item, "arguments", None) or item.content[0].text)
                      for item in last.output]
    assert real.http.post("/v1/responses", json={"input": "Hi", "stream": True}
                          ).text.startswith("event: response.created\ndata: {")


def test_the_clients_helpers_parse_and_stream(client):
    class Person(BaseModel):
        name: str = Field(max_length=4)
        kind: Literal["a", "b"]

    ask = {"model": "tiny", "input": "Who?", "temperature": 0}
    parsed = client.responses.parse(**ask, text_format=Person)
    assert isinstance(parsed.output_parsed, Person)
    with client.responses.stream(**ask, text_format=Person) as stream:
        text = "".join(event.delta for event in stream
                       if event.type == "response.output_text.delta")
        assert stream.get_final_response().output_parsed == parsed.output_parsed
    assert Person.model_validate_json(text) == parsed.output_parsed


def test_items_go_back_as_history(create, real):
    called = create(input="1 + 1?", tools=[TOOL], tool_choice="required", max_output_tokens=200,
                    parallel_tool_calls=False)
    (call,) = called.output
    assert call.name == "add" and 0 <= json.loads(call.arguments)["a"] <= 9
    history = [{"role": "user", "content": [{"type": "input_text", "text": "1 + 1?"}]},
               call.model_dump(exclude_none=True),
               {"type": "function_call_output", "call_id": call.call_id, "output": "2"}]
    said = create(input=history)
    chat = real.chat(temperature=0, max_tokens=12, messages=[
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "tool_calls": [{"function": {
            "name": "add", "arguments": call.arguments}}]}, {"role": "tool", "content": "2"}])
    assert said.output_text == chat.json()["choices"][0]["message"]["content"]
    history += [said.output[0].model_dump(exclude_none=True), {"role": "user", "content": "?"}]
    assert create(input=history).output_text


@pytest.mark.parametrize("fields, param, words", [
    ({"previous_response_id": "resp_1"}, "previous_response_id", "send the conversation in input"),
    ({"store": True}, "store", "stores nothing"), ({"background": True}, "background", "nothing"),
    ({"include": ["x"]}, "include", "nothing more"), ({"conversation": "c"}, "conversation", "not"),
    ({"input": [{"role": "bard"}]}, "input.0.role", "'developer'"),
    ({"max_output_tokens": 9999}, "max_output_tokens", "max_output_tokens=9999 and a prompt"),
    ({"input": [{"role": "user"}]}, "input.0.content", "missing"),
    ({"input": [{"type": "image"}]}, "input.0.type", "function_call"),
    ({"input": [{"type": "reasoning"}]}, "input.0.content", "missing"),
    ({"reasoning": {"effort": "low"}}, "reasoning.effort", "was not tuned to think; leave it out"),
    ({"text": {"format": {"type": "json_schema"}}}, "text.format", "missing"),
    ({"tools": [{"type": "web_search", "name": "x"}]}, "tools.0.type", "function"),
    ({"input": "x" * 10**5}, "input", "window"),
])
def test_what_cannot_be_done_is_refused_by_its_own_name(running, engine, fields, param, words):
    response = running.http.post("/v1/responses", json={"input": "Hi", **fields})
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == param, error
    assert words in error["message"] and not engine.asked


def test_an_engine_that_fails_is_an_error_event(running, engine):
    engine.fault = "RuntimeError: out of memory"
    found = events(running.http.post("/v1/responses", json={"input": "Hi", "stream": True}))
    assert found[-1]["type"] == "error" and found[-1]["message"] == engine.fault
