"""Every wrong request gets one clear line and the right status, and nothing is generated."""
from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from pydantic import ValidationError

from fira.serve.guard import MAX_BODY, parse
from fira.serve.schema import (
    APIError,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)

JSON = {"Content-Type": "application/json"}
WRONG = [
    ("chat", {"messages": []}, "messages", "at least 1"),
    ("chat", {"messages": None}, "messages", "array"),
    ("chat", {"messages": [{"role": "bard", "content": "x"}]}, "messages.0.role", "'developer'"),
    ("chat", {"messages": [{"role": "user"}]}, "messages.0.content", "missing"),
    ("chat", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
     "messages.0.content.0.type", "text"),
    ("chat", {"messages": [{"role": "user", "content": "x " * 300}]}, "messages", "window of 200"),
    ("chat", {"temperature": -5}, "temperature", "greater than or equal to 0"),
    ("chat", {"temperature": "hot"}, "temperature", "number"),
    ("chat", {"temprature": 1}, "temprature", "did you mean temperature?"),
    ("chat", {"functions": []}, "functions", "not a field"),
    ("chat", {"store": True}, "store", "stores nothing"),
    ("chat", {"service_tier": "flex"}, "service_tier", "'auto' or 'default'"),
    ("chat", {"modalities": ["text", "audio"]}, "modalities.1", "writes text only"),
    ("chat", {"str": 1}, "str", "not a field"),
    ("chat", {"messages": [{"role": "user", "content": "x", "a[": 1}]}, "messages.0.a[",
     "not a field"),
    ("chat", {"response_format": {"type": "xml"}}, "response_format.type", "json_object"),
    ("chat", {"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
    ("chat", {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
    ("chat", {"max_completion_tokens": 5}, "max_tokens", "differ"),
    ("chat", {"continue_final_message": True}, "continue_final_message", "not user; add the text"),
    ("chat", {"max_tokens": 199}, "max_tokens", "ask for at most"),
    ("text", {"n": 65}, "n", "64"),
    ("text", {"prompt": ["x"] * 40, "n": 2}, "n", "64 choices"),
    ("text", {"prompt": ["x"] * 65}, "prompt", "has a length of 65; at most 64 is"),
    ("text", {"prompt": [[1]] * 65}, "prompt", "has a length of 65; at most 64 is"),
    ("text", {"stop": "x" * 257}, "stop", "has a length of 257; at most 256"),
    ("text", {"best_of": 2}, "best_of", "rank choices"),
    ("text", {"n": 2, "best_of": 1}, "best_of", "is not n=2"),
    ("text", {"top_k": -2}, "top_k", "0 or -1 for no limit"),
    ("text", {"prompt": []}, "prompt", "list of token ids"),
    ("text", {"prompt": [[]]}, "prompt.0", "none of them empty"),
    ("text", {"prompt": [10**40]}, "prompt", "vocabulary of 320"),
    ("text", {"prompt": [-1]}, "prompt.0", "list of token ids"),
    ("text", {"stop": ["x"] * 5000}, "stop", "at most 16"),
    ("text", {"stop": [5]}, "stop.0", "16 strings"),
    ("text", {"logit_bias": {"x": 1}}, "logit_bias.x", "token ids"),
    ("text", {"logit_bias": {"5": 101}}, "logit_bias.5", "100"),
    ("text", {"logit_bias": {"320": 1}}, "logit_bias", "vocabulary"),
    ("text", {"seed": 2**63}, "seed", "less than"),
    ("text", {"echo": True, "logprobs": 1, "stream": True}, "stream", "cannot stream"),
    ("text", {"logprobs": True}, "logprobs", "integer"),
]


@pytest.mark.parametrize("kind, change, param, words", WRONG)
def test_what_cannot_be_honored_is_refused(running, engine, kind, change, param, words):
    response = getattr(running, kind)(**change)
    error = response.json()["error"]
    assert response.status_code == 400 and error["type"] == "invalid_request_error"
    assert error["param"] == param and words in error["message"], error
    assert "\n" not in error["message"] and len(error["message"]) < 250
    assert engine.asked == []


@pytest.mark.parametrize("fields", [
    {"tools": []}, {"tools": None}, {"tool_choice": "none"}, {"tool_choice": "auto"},
    {"parallel_tool_calls": False}, {"functions": None, "prediction": None}, {"store": False},
    {"service_tier": "auto"}, {"metadata": {"a": "b"}}, {"metadata": {}}, {"audio": None},
    {"modalities": ["text"]}, {"reasoning_effort": "none"},
    {"top_logprobs": 0, "logprobs": False}, {"top_k": 0}, {"top_k": -1}, {"n": 2, "top_k": None},
    {"stream_options": {"include_usage": True}}, {"stream_options": {"include_obfuscation": False}},
    {"prompt_cache_key": "x", "safety_identifier": "x", "cache_control": {"type": "ephemeral"}},
    {"logit_bias": {}, "stop": [], "no_such_field": None},
])
def test_a_field_that_asks_for_nothing_changes_nothing(running, engine, fields):
    assert running.chat().status_code == 200
    response = running.chat(**fields)
    assert response.status_code == 200, response.text
    assert all(asked == engine.asked[0] for asked in engine.asked)


@pytest.mark.parametrize("fields", [{"best_of": 1}, {"n": 2, "best_of": 2}, {"suffix": None},
                                    {"suffix": ""}, {"store": False}, {"logprobs": None}])
def test_a_completion_that_asks_for_nothing_more_is_the_same(running, engine, fields):
    assert running.text().status_code == running.text(**fields).status_code == 200
    assert all(asked == engine.asked[0] for asked in engine.asked)


@pytest.mark.parametrize("more", [
    {"refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": None},
    {"refusal": None, "annotations": None, "tool_calls": [], "name": "bob", "parsed": None},
    {"content": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]},
])
def test_an_answer_comes_back_as_clients_return_it(running, engine, more):
    for message in ({}, more):
        turns = [{"role": "user", "content": "hi", **({"name": "ann"} if message else {})},
                 {"role": "assistant", "content": "x", **message},
                 {"role": "user", "content": "go on"}]
        assert running.chat(messages=turns).status_code == 200
    assert engine.asked[0] == engine.asked[1]


@pytest.mark.parametrize("body", [
    b"", b"{", b"[]", b"null", b"7", b"\xff\xfe{}", b"[" * 100_000, b'{"prompt": "\\ud800"}',
    b'{"prompt": "a", "temperature": NaN}', b'{"prompt": "a", "temperature": -Infinity}',
    b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", b'{"prompt": "a", "top_p": 1e999}',
])
def test_a_body_that_is_no_request_is_refused(http, body):
    response = http.post("/v1/completions", content=body, headers=JSON)
    assert response.status_code == 400 and response.json()["error"]["message"]


def test_other_faults_have_their_own_status(http):
    def status(method, path, **options):
        response = http.request(method, path, **options)
        assert response.json()["error"]["message"]
        return response.status_code
    assert status("GET", "/nowhere") == 404
    assert status("GET", "/v1/completions") == 405
    assert status("POST", "/v1/completions", content=b"{}") == 415
    assert status("POST", "/v1/completions", content=b"x" * 10**7, headers=JSON) == 413
    assert status("POST", "/v1/completions", json={"prompt": "a", "model": "gpt-4"}) == 404
    assert status("GET", "/v1/models/gpt-4") == 404
    assert http.get("/v1/models/tiny").json()["chat_tuned"] is True
    assert MAX_BODY < 10**7


MANY = [json.dumps({"prompt": "a", **fields}).encode() for fields in (
    {"prompt": [0] * 50_000}, {"prompt": [[0] * 800] * 64}, {"x": [{}] * 50_000},
    {"logit_bias": dict.fromkeys(range(50_000), 1)}, {"x": ["\"," * 50_000]})]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/detokenize"])
@pytest.mark.parametrize("body", [*MANY, b'{"prompt": "' + b"x" * 3 * 2**20 + b'"}'])
def test_more_than_the_window_can_hold_is_refused_before_it_is_parsed(
        running, engine, monkeypatch, path, body):
    monkeypatch.setattr(CompletionRequest, "model_validate_json", None)  # it is not called
    response = running.http.post(path, content=body, headers=JSON)
    assert response.status_code == 413 and "more than the" in response.text and not engine.asked


@pytest.mark.parametrize("prompt", [[100] * 199, "\x01" * 198])
def test_as_much_as_the_window_holds_is_accepted(running, prompt):
    assert running.text(prompt=[prompt] * 64, max_tokens=1).status_code == 200


def test_health_is_answered_while_bodies_are_parsed(running, monkeypatch):
    begun, ended = threading.Event(), threading.Event()
    monkeypatch.setattr("fira.serve.server.prepare", lambda *_: begun.set() or ended.wait(20))
    with ThreadPoolExecutor(40) as pool:
        pool.map(lambda _: running.text(), range(40))
        assert begun.wait(9) and running.http.get("/health").status_code == 200
        ended.set()


@pytest.mark.parametrize("host, status", [
    ("localhost", 200), ("LOCALHOST:80", 200), ("127.0.0.1:8000", 200), ("[::1]:8000", 200),
    ("evil.example", 403), ("evil.example:", 403), ("localhost.evil.example", 403),
    ("localhost:80:80", 403), ("[::1", 403), ("evil@localhost", 403),
])
def test_without_keys_only_names_of_this_machine_are_answered(http, host, status):
    assert http.get("/health", headers={"Host": host}).status_code == status


@pytest.mark.parametrize("schema, body", [
    (CompletionRequest, {"prompt": [0.5] * 1000}), (CompletionRequest, {"prompt": [[]] * 1000}),
    (CompletionRequest, {"prompt": [[None] * 1000]}), (CompletionRequest, {"stop": [0] * 1000}),
    (ChatRequest, {"messages": [{}] * 1000}), (TokenizeRequest, {"messages": [{}] * 1000}),
    (ChatRequest, {"messages": [{"role": "user", "content": [{}] * 1000}]}),
    (DetokenizeRequest, {"tokens": [""] * 1000}),
])
def test_a_long_list_is_refused_at_its_first_fault(schema, body):
    """Without fail_fast, four megabytes of wrong entries took 17 seconds and 4 GB."""
    with pytest.raises(ValidationError) as found:
        schema.model_validate_json(json.dumps(body))
    assert found.value.error_count() < 10


def test_very_many_faults_are_counted_not_told():
    for fields in ({"logit_bias": {str(id): "" for id in range(2000)}},
                   {f"x{number}": 0 for number in range(2000)}):
        with pytest.raises(APIError, match="has 2000 errors") as found:
            parse(CompletionRequest, json.dumps({"prompt": "a", **fields}).encode())
        assert found.value.status == 400 and found.value.param is None


@pytest.mark.parametrize("body", [{"x" * 10_000: 1}, {"logit_bias": {"x" * 10_000: ""}},
                                  {"model": "x" * 10_000}, {"prompt": {"x" * 10_000: 1}}])
def test_a_refusal_is_short_whatever_was_sent(running, body):
    response = running.text(**body)
    assert response.status_code in (400, 404) and len(response.content) < 500
