"""The server as a client sees it: responses, streams, errors, a full queue, leaving clients."""
from __future__ import annotations

import json
import socket
import threading
import time

import pytest

from fira import __version__
from fira.infer.request import SamplingParams
from fira.serve.guard import Keys, check_origins
from tests.serve.conftest import FakeEngine

SAID = "Größe 🙂 of the Union. "


def events(response):
    """The JSON of each event of a stream; the last event is [DONE]."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) if line != "[DONE]" else line for line in lines]


def until(holds, seconds=5):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def test_a_chat_is_answered(running, engine, tokenizer):
    answer = running.chat().json()
    assert answer["object"] == "chat.completion" and answer["model"] == "tiny"
    assert answer["choices"] == [{"index": 0, "finish_reason": "length", "logprobs": None,
                                  "message": {"role": "assistant", "content": SAID.strip()}}]
    ids, params = engine.asked[0]
    assert answer["usage"]["total_tokens"] == len(ids) + 17
    assert params.stop_ids == (tokenizer.special("<|im_end|>"),)


def test_a_stream_says_the_same_in_order(running):
    *chunks, usage, done = events(running.chat(stream=True, n=2,
                                               stream_options={"include_usage": True}))
    assert done == "[DONE]"
    for index in range(2):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(choice["delta"].get("content", "") for choice in own) == SAID.strip()
        assert own[-1]["delta"] == {} and own[-1]["finish_reason"] == "length"
        assert all(choice["finish_reason"] is None for choice in own[:-1])
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 34
    assert len({chunk["id"] for chunk in chunks}) == 1


@pytest.mark.parametrize("kind, details", [("chat", {"logprobs": True, "top_logprobs": 3}),
                                           ("text", {"logprobs": 3})])
def test_streamed_details_equal_the_whole_ones(running, kind, details):
    ask = getattr(running, kind)
    whole = ask(experts=True, **details).json()["choices"][0]
    parts = [chunk["choices"][0] for chunk in
             events(ask(experts=True, stream=True, **details))[:-1]]
    parts = [part for part in parts if part["logprobs"]]
    assert sum((part["experts"] for part in parts), []) == whole["experts"]
    for key, values in whole["logprobs"].items():
        assert sum((part["logprobs"][key] for part in parts), []) == values
    assert len(whole["experts"]) == 17 and len(parts) < 17  # characters of several tokens


def test_echo_repeats_the_prompt_with_its_scores(running, tokenizer):
    choice = running.text(echo=True, logprobs=2, max_tokens=2).json()["choices"][0]
    scores, ids = choice["logprobs"], tokenizer.encode("The state")
    assert choice["text"].startswith("The state")
    assert len(scores["tokens"]) == len(ids) + 2
    assert "".join(scores["tokens"][:len(ids)]) == "The state"
    assert scores["text_offset"][:len(ids) + 1] == [0, 3, 6, 8, 9]
    exact = running.text(prompt=ids, echo=True, logprobs=1, max_tokens=0).json()["choices"][0]
    assert exact["text"] == "The state" and exact["finish_reason"] == "length"
    assert exact["logprobs"]["token_logprobs"][0] is None
    assert exact["logprobs"]["top_logprobs"][0] is None


def test_prompts_and_answers_keep_their_order(running, engine):
    answer = running.text(prompt=["a", "b"], n=2, seed=5, max_tokens=1).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [params.seed for _, params in engine.asked] == [5, 6, 5, 6]
    assert engine.asked[0][0] == engine.asked[1][0] != engine.asked[2][0]
    assert answer["usage"]["prompt_tokens"] == 4  # each prompt has an end of text and one token


def test_parameters_reach_the_engine(running, engine):
    given = {"temperature": 0, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.5,
             "presence_penalty": -1, "frequency_penalty": 2, "seed": -3}
    assert running.text(logit_bias={"5": -100}, stop=["x", "yz"], ignore_eos=True, **given
                        ).status_code == 200
    assert engine.asked[0][1] == SamplingParams(
        max_new_tokens=17, logit_bias={5: -100}, stop=("x", "yz"), ignore_end=True, **given)


def test_text_parts_and_developers_are_read_as_text_and_system(running, engine):
    parts = [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief"}]
    for role, content in (("system", "Be\nbrief"), ("developer", parts)):
        running.chat(messages=[{"role": role, "content": content}])
    assert engine.asked[0][0] == engine.asked[1][0]


def test_tokenize_and_detokenize_are_inverse(http, tokenizer):
    found = http.post("/tokenize", json={"prompt": "naïve 🙂", "add_special_tokens": False}).json()
    assert found["tokens"] == tokenizer.encode("naïve 🙂") and found["max_model_len"] == 200
    assert http.post("/detokenize", json={"tokens": found["tokens"]}).json() == {
        "prompt": "naïve 🙂"}


@pytest.mark.parametrize("given, kept", [
    ("3f2-a.b:c", True), ("", False), ("a b", False), ("x" * 129, False), ("<b>", False)])
def test_a_response_has_the_id_of_its_request_or_a_new_one(running, given, kept):
    found = [running.text(headers={"x-request-id": given}),
             running.text(headers={"x-request-id": given}, max_tokens=-1),
             running.http.get("/nowhere", headers={"x-request-id": given})]
    ids = [response.headers["x-request-id"] for response in found]
    assert ids == [given] * 3 if kept else (len(set(ids)) == 3 and all(map(str.isalnum, ids)))


def test_pages_of_the_named_origins_alone_may_call(start, served, tokenizer, running):
    origins = ["http://localhost:3000", "app://notes"]
    open = start(lambda: (served, FakeEngine(tokenizer)), origins=origins, keys=["sesame"]).wait()
    ask = {"Access-Control-Request-Method": "POST",
           "Access-Control-Request-Headers": "authorization, content-type, x-stainless-os"}

    def allowed(server, origin):
        before = server.http.options("/v1/chat/completions", headers={**ask, "Origin": origin})
        after = server.chat(headers={"Origin": origin, "Authorization": "Bearer sesame"})
        assert after.status_code == 200  # the browser hides it where the header is missing
        name = "access-control-allow-origin"
        assert before.is_success == (before.headers.get(name) == origin)
        assert before.headers.get(name) == after.headers.get(name)
        return before.is_success

    assert all(allowed(open, origin) for origin in origins)
    assert not allowed(open, "http://evil.example") and not allowed(running, origins[0])


@pytest.mark.parametrize("origin", ["*", "localhost:3000", "http://localhost:3000/", "http://A.b"])
def test_an_origin_that_no_browser_sends_is_refused(origin):
    with pytest.raises(ValueError, match="is not an origin; give scheme, host and port alone"):
        check_origins([origin])


def test_version_and_special_tokens_are_told(http, tokenizer):
    assert http.get("/version").json() == {"version": __version__}
    info = http.get("/tokenizer_info").json()
    assert info == {"bos_token": None, "eos_token": "<|endoftext|>", "pad_token": "<|pad|>",
                    "model_max_length": 200}
    found = http.post("/tokenize", json={"prompt": info["eos_token"]}).json()
    assert found["tokens"] == [tokenizer.end_of_text]


def test_metrics_count_requests_and_experts(running):
    running.chat()
    text = running.http.get("/metrics").text
    for line in ('fira_requests_total{endpoint="/v1/chat/completions",status="200"} 1.0',
                 'fira_expert_rows_total{expert="0",layer="0"} 3.0',
                 "fira_first_token_seconds_count 1.0", "fira_generated_tokens_total 7"):
        assert line in text


def test_a_full_queue_says_when_to_come_back(running, engine):
    engine.capacity, engine.pause = 3, 0.02
    response = running.text(n=4)
    assert response.status_code == 429 and response.headers["retry-after"] == "1"
    assert response.json()["error"]["type"] == "rate_limit_error"
    until(lambda: not engine.running)  # none of the four goes on
    assert engine.cancelled == {1, 2, 3}


def test_an_engine_that_fails_is_told(running, engine):
    engine.fault = "RuntimeError: out of memory"
    response = running.text()
    assert response.status_code == 500
    assert response.json()["error"] == {"message": engine.fault, "type": "server_error",
                                        "param": None, "code": "error"}
    assert events(running.text(stream=True))[-1]["error"]["message"] == engine.fault


def test_keys_are_wanted_where_they_are_given(start, served, engine):
    running = start(lambda: (served, engine), keys=["sesame", "open"]).wait()
    for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic sesame"},
                   {"Authorization": "Bearer"}):
        response = running.text(headers=header)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
    assert running.http.get("/metrics").status_code == 401
    assert running.http.get("/").status_code == 200
    for key in ("sesame", "open"):
        assert running.text(headers={"Authorization": f"Bearer {key}"}).status_code == 200


@pytest.mark.parametrize("text, words", [("", "has no key"), ("# none\n\n", "has no key"),
                                         ("good\ntwo words\n", ":2 is not a key")])
def test_a_key_file_without_keys_is_refused(tmp_path, text, words):
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(ValueError, match=words):
        Keys.load(file)


def test_a_client_that_leaves_frees_its_slot(running, engine):
    engine.pause = 0.02
    body = {"prompt": "The state", "max_tokens": 150}
    with running.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
        next(stream.iter_bytes())
        assert len(engine.running) == 1
    until(lambda: not engine.running)
    raw = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", running.http.base_url.port)) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
                       b"application/json\r\nContent-Length: %d\r\n\r\n" % len(raw) + raw)
        until(lambda: engine.running)
    until(lambda: not engine.running)
    assert len(engine.cancelled) == 2
    until(lambda: 'status="499"} 1.0' in running.http.get("/metrics").text)


def test_a_waiting_client_hears_that_the_server_lives(running, engine, monkeypatch):
    monkeypatch.setattr("fira.serve.server.KEEPALIVE_SECONDS", 0.05)
    engine.pause = 0.2
    response = running.text(max_tokens=2, stream=True)
    assert ": keepalive" in response.text and events(response)[-1] == "[DONE]"


def test_health_waits_for_the_model(start, served, engine):
    loaded = threading.Event()
    running = start(lambda: loaded.wait(10) and (served, engine))
    response = running.http.get("/health")
    assert response.status_code == 503 and response.json()["error"]["code"] == "loading"
    assert running.text().status_code == 503
    assert running.http.get("/").status_code == 200
    loaded.set()
    assert running.wait().text().status_code == 200


def test_a_bug_is_a_500_and_nothing_else_ends(running, engine, monkeypatch):
    monkeypatch.setattr(engine, "add", lambda *_: 1 / 0)
    response = running.text()
    assert response.json()["error"]["type"] == "server_error"
    assert response.headers["connection"] == "close"
    assert running.http.get("/health").status_code == 200
