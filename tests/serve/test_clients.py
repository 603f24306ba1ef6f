"""Other people's clients with the real engine: the openai package and schemathesis."""
from __future__ import annotations

import base64
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings

CHAT = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def openai(real):
    module = pytest.importorskip("openai", reason="the openai package is not installed")
    return module.OpenAI(base_url=real.address + "/v1", api_key="none", max_retries=0)


@pytest.fixture
def complete(openai):
    return partial(openai.completions.create, model="tiny", temperature=0)


@pytest.fixture
def chat(openai):
    return partial(openai.chat.completions.create, model="tiny", messages=CHAT, temperature=0)


def test_openai_reads_answers_and_streams(chat):
    whole = chat(max_tokens=12, logprobs=True, top_logprobs=2)
    assert whole.usage.completion_tokens <= 12
    scores = whole.choices[0].logprobs.content
    assert all(score.logprob == score.top_logprobs[0].logprob for score in scores)
    *chunks, last = chat(max_tokens=12, stream=True, stream_options={"include_usage": True})
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks
                   ) == whole.choices[0].message.content
    assert last.usage.total_tokens == whole.usage.total_tokens


def test_openai_gets_n_answers_that_a_seed_repeats(complete):
    first, again = ([choice.text for choice in complete(
        prompt="The state", n=3, seed=5, max_tokens=10, temperature=1.5).choices]
        for _ in range(2))
    assert first == again and len(set(first)) == 3


def test_openai_sends_an_answer_back_as_history(chat):
    first = chat(max_tokens=4).choices[0].message
    assert chat(messages=[*CHAT, first, {"role": "user", "content": "And?"}], max_tokens=4).choices


def test_openai_stops_and_biases(complete, tokenizer):
    (wanted,) = tokenizer.encode("a")
    options = {"prompt": "x", "max_tokens": 8, "logit_bias": {str(wanted): 100}}
    assert complete(**options).choices[0].text == "a" * 8
    stopped = complete(**options, stop="aaa").choices[0]
    assert (stopped.text, stopped.finish_reason) == ("", "stop")


def test_openai_reads_the_experts(chat):
    answer = chat(max_tokens=4, extra_body={"experts": True, "ignore_eos": True})
    experts = answer.choices[0].experts
    assert len(experts) == 4 and all(len(token) == 2 for token in experts)
    assert all(len(set(chosen)) == 2 and max(chosen) < 4 for token in experts for chosen in token)


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_an_embedding_is_the_mean_of_the_texts_last_hidden_states(openai, real, model, tokenizer,
                                                                 encoding):
    texts = ["The state", "Größe and 你好", *(f"{n} of the Union" for n in range(98))]
    answer = openai.embeddings.create(model="tiny", input=texts, encoding_format=encoding)
    assert [item.index for item in answer.data] == list(range(100))
    for text, item in list(zip(texts, answer.data, strict=True))[:5]:
        ids = [tokenizer.end_of_text, *tokenizer.encode(text)]
        with torch.inference_mode():
            mean_D = model.features(torch.tensor([ids]))[0, 1:].mean(0)
        found = item.embedding if encoding == "float" else torch.frombuffer(
            bytearray(base64.b64decode(item.embedding)), dtype=torch.float32).tolist()
        torch.testing.assert_close(torch.tensor(found), mean_D / mean_D.norm(), rtol=0, atol=1e-5)
    exact = openai.embeddings.create(model="tiny", input=tokenizer.encode(texts[0]), dimensions=32)
    assert exact.usage.prompt_tokens == len(tokenizer.encode(texts[0]))
    assert len(exact.data[0].embedding) == 32


@pytest.mark.parametrize("fields, param, words", [
    ({"input": ""}, "input", "none of them empty"), ({"input": []}, "input", "none of them empty"),
    ({"input": ["a"] * 2049}, "input", "2049; at most 2048"),
    ({"input": "a", "dimensions": 16}, "dimensions", "the model's width of 32"),
    ({"input": "a", "encoding_format": "int8"}, "encoding_format", "'base64'"),
    ({"input": [320]}, "input", "vocabulary"), ({"input": "a " * 300}, "input", "window of 128"),
    ({"input": [5] * 129}, "input", "window of 128"),
])
def test_what_cannot_be_embedded_is_refused(real, fields, param, words):
    response = real.http.post("/v1/embeddings", json=fields)
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == param and words in error["message"]


def test_openai_raises_its_own_errors(openai, chat, complete):
    import openai as package
    with pytest.raises(package.BadRequestError, match="at least 1") as refused:
        chat(messages=[])
    assert refused.value.param == "messages"
    with pytest.raises(package.NotFoundError, match="use 'tiny'"):
        complete(model="gpt-4", prompt="x")
    assert [model.id for model in openai.models.list()] == ["tiny"]
    assert openai.models.retrieve("tiny").id == "tiny"


@pytest.mark.parametrize("extreme", [
    {"temperature": 5e-324}, {"temperature": 1e-30}, {"top_p": 5e-324}, {"min_p": 1.0},
    {"repetition_penalty": 0.1}, {"repetition_penalty": 10}, {"top_k": 10**30},
    {"presence_penalty": -2, "frequency_penalty": -2, "temperature": 1e-5}, {"seed": -2**63},
    {"logit_bias": {str(id): -100 for id in range(320)}}, {"seed": 2**63 - 1, "n": 2},
])
def test_extreme_parameters_are_answered(real, extreme):
    response = real.text(logprobs=2, **extreme)
    assert response.status_code == 200, response.text


@pytest.fixture
def described(real):
    """The server's OpenAPI description, read by schemathesis."""
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    schema = schemathesis.openapi.from_dict(real.http.get("/openapi.json").json())
    schema.config.update(base_url=real.address)
    return schema


def conforms(case):
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks

    case.call_and_validate(timeout=20, checks=[
        not_a_server_error, checks.status_code_conformance, checks.content_type_conformance,
        checks.response_schema_conformance])


def test_generated_requests_are_answered_as_described(described):
    """Some hundred cases; benchmarks/clients.py runs thousands."""
    for operation in described.get_all_operations():
        @given(case=operation.ok().as_strategy())
        @settings(max_examples=20, deadline=None, database=None, derandomize=True,
                  suppress_health_check=list(HealthCheck))
        def run(case):
            conforms(case)
        run()


@pytest.mark.parametrize("path, body", [
    ("/v1/chat/completions", {"messages": CHAT, "stream": True, "logprobs": True}),
    ("/v1/completions", {"prompt": "a", "stream": True, "experts": True}),
    ("/v1/completions", {"prompt": "a", "echo": True, "logprobs": 2, "experts": True}),
    ("/v1/completions", {"prompt": "a", "stream_options": {"include_usage": True}}),
    ("/tokenize", {"messages": CHAT, "prompt": None}), ("/tokenize", {"prompt": "a"}),
])
def test_these_requests_are_answered_as_described(described, path, body):
    conforms(described[path]["POST"].Case(body=body, media_type="application/json"))


def test_the_description_is_what_is_taken(described):
    components = described.raw_schema["components"]
    chat = components["schemas"]["ChatRequest"]
    assert chat["additionalProperties"] == {"type": "null"} and chat["required"] == ["messages"]
    right = pytest.importorskip("jsonschema_rs").validator_for(
        {**components["schemas"]["TokenizeRequest"], "components": components}).is_valid
    assert right({"prompt": "a", "messages": None}) and right({"messages": CHAT})
    for body in ({}, {"prompt": None}, {"prompt": "a", "messages": CHAT}):
        assert not right(body)
