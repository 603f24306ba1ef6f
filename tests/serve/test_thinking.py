"""Thoughts in the API: apart from the content, counted, limited by any of the names in use."""
from __future__ import annotations

import pytest

from tests.serve.test_server import events

TAIL = "assistant\n<think>\n\n</think>\n\n"
EFFORTS = [(name, int(17 * share)) for name, share in (
    ("minimal", 1 / 8), ("low", 1 / 4), ("medium", 1 / 2), ("high", 3 / 4))]


@pytest.fixture
def thinking(served, engine, running):
    served.thinks, engine.thought = True, ["Well", " then."]
    return running


@pytest.mark.parametrize("fields, limit", [
    ({}, 17), *(({"reasoning_effort": name}, limit) for name, limit in EFFORTS),
    ({"chat_template_kwargs": {"enable_thinking": True}}, 17),
    ({"max_thinking_tokens": 5}, 5), ({"thinking_budget": 5}, 5), ({"thinking_token_budget": 5}, 5),
    ({"reasoning_effort": "none"}, None), ({"max_thinking_tokens": 0}, None),
    ({"chat_template_kwargs": {"enable_thinking": False}}, None),
])
def test_a_request_limits_the_thought_or_leaves_it_out(thinking, engine, tokenizer, fields, limit):
    message = thinking.chat(**fields).json()["choices"][0]["message"]
    ids, params = engine.asked[0]
    assert params.max_thinking_tokens == limit
    assert tokenizer.decode(ids).endswith(TAIL) == (limit is None)
    assert message.get("reasoning_content") == message.get("reasoning") == (
        None if limit is None else "Well then.")
    counted = thinking.http.post("/tokenize", json={
        "messages": [{"role": "user", "content": "Hi"}], **fields}).json()
    assert counted["tokens"] == ids


@pytest.mark.parametrize("thinks, fields, param, words", [
    (False, {"reasoning_effort": "low"}, "reasoning_effort", "not tuned to think; leave it out"),
    (False, {"thinking_budget": 4}, "max_thinking_tokens", "not tuned to think; leave it out"),
    (True, {"thinking_budget": 18}, "max_thinking_tokens", "=18 is more than max_tokens=17"),
    (True, {"reasoning_effort": "low", "thinking_budget": 0}, "reasoning_effort", "differ on"),
    (True, {"reasoning_effort": "huge"}, "reasoning_effort", "'minimal', 'low'"),
    (True, {"chat_template_kwargs": {"thinking": True}}, "chat_template_kwargs.thinking",
     "enable_thinking"),
])
def test_what_cannot_be_is_refused(thinking, served, engine, thinks, fields, param, words):
    served.thinks = thinks
    response = thinking.chat(**fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param) and words in error["message"]
    assert not engine.asked


def test_a_stream_brings_the_thought_first_and_logprobs_are_of_the_content(thinking):
    fields = {"logprobs": True, "max_tokens": 9}
    whole = thinking.chat(**fields).json()
    *chunks, usage, _ = events(thinking.chat(**fields, stream=True,
                                             stream_options={"include_usage": True}))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert [delta["reasoning"] for delta in deltas if "reasoning" in delta] == ["Well", " then."]
    assert all(delta["reasoning"] == delta["reasoning_content"] for delta in deltas[1:3])
    message, usage = whole["choices"][0]["message"], usage["usage"]
    assert "".join(delta.get("content", "") for delta in deltas) == message["content"]
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 2}
    assert {**usage, "usage": 0} == {**whole["usage"], "usage": 0}
    for choices in ([chunk["choices"][0] for chunk in chunks], whole["choices"]):
        scores = [score for choice in choices if choice["logprobs"]
                  for score in choice["logprobs"]["content"]]
        assert len(scores) == 9


def test_thoughts_come_back_and_only_those_after_the_last_question_are_read(thinking, served,
                                                                            engine, tokenizer):
    answer = {"role": "assistant", "content": "x", "reasoning_content": "Hm", "reasoning": "Hm"}
    ask = {"role": "user", "content": "Hi"}
    for thinks in (True, False):
        served.thinks = thinks
        assert thinking.chat(messages=[ask, answer, ask]).status_code == 200
        assert thinking.chat(messages=[ask, answer], continue_final_message=True
                             ).status_code == 200
    read = [tokenizer.decode(ids) for ids, _ in engine.asked]
    assert ["Hm" in text for text in read] == [False, True, False, False]
    assert read[1].endswith("<think>\nHm\n</think>\n\nx")
    assert engine.asked[1][1].max_thinking_tokens is None


def test_the_openai_client_gets_reasoning_items_and_sends_them_back(thinking, engine, tokenizer):
    package = pytest.importorskip("openai", reason="the openai package is not installed")
    client = package.OpenAI(base_url=thinking.address + "/v1", api_key="none", max_retries=0)
    ask = {"model": "tiny", "max_output_tokens": 16, "reasoning": {"effort": "medium"}}
    whole = client.responses.create(input="Hi", **ask)
    assert [item.type for item in whole.output] == ["reasoning", "message"]
    assert whole.output[0].content[0].text == "Well then." and whole.output_text
    assert whole.usage.output_tokens_details.reasoning_tokens == 2
    found = list(client.responses.create(input="Hi", **ask, stream=True))
    said = [event.delta for event in found if event.type == "response.reasoning_text.delta"]
    assert said == ["Well", " then."] and found[-1].response.output[0].status == "completed"
    history = [{"role": "user", "content": "Hi"},
               *(item.model_dump(exclude_none=True) for item in whole.output)]
    client.responses.create(input=[*history, {"role": "user", "content": "And?"}], **ask)
    read = tokenizer.decode(engine.asked[-1][0])
    assert engine.asked[-1][1].max_thinking_tokens == 8
    assert whole.output_text in read and "Well" not in read
