"""The engine under many callers: bounded, fair, cancellable, and of constant size."""
from __future__ import annotations

import itertools
import random
import threading
import time
from types import SimpleNamespace

import pytest

from fira.infer.cache import split_budget
from fira.infer.engine import Engine
from fira.infer.request import End, QueueFull, SamplingParams, Token

LONG = SamplingParams(max_new_tokens=50, temperature=0.0, ignore_end=True)
SHORT = SamplingParams(max_new_tokens=3, temperature=0.0, ignore_end=True)


@pytest.fixture
def engine(model, tokenizer):
    engine = Engine(model, tokenizer, slots=2, max_waiting=3)
    yield engine
    engine.close()


def test_cancelling_frees_the_slot_for_the_next(engine):
    seen: dict[int, list] = {n: [] for n in range(3)}
    numbers = [engine.add([5, 6], LONG, seen[n].append) for n in range(3)]
    engine.step()
    assert (engine.stats["running"], engine.stats["waiting"]) == (2, 1)
    engine.cancel(numbers[0])
    engine.cancel(numbers[0])
    engine.step()
    assert seen[0][-1].reason == "cancelled" and engine.stats["waiting"] == 0
    assert seen[0][-1].new_tokens == len(seen[0]) - 1
    engine.cancel(numbers[0])
    engine.cancel(12345)
    waiting: list = []
    engine.cancel(engine.add([5], LONG, waiting.append))
    engine.step()
    assert waiting == [End("cancelled", prompt_tokens=1)]
    while engine.step():
        pass
    assert [seen[n][-1].reason for n in range(3)] == ["cancelled", "length", "length"]
    assert [sum(isinstance(event, End) for event in seen[n]) for n in range(3)] == [1, 1, 1]
    assert (engine.stats["cancelled"], engine.stats["finished"]) == (2, 2)


def test_the_queue_is_bounded_and_first_come_first_served(engine):
    order: list[int] = []
    for n in range(3):
        engine.add([5, n], SHORT, lambda event, n=n: isinstance(event, End) and order.append(n))
    with pytest.raises(QueueFull, match="3 requests are waiting"):
        engine.add([5], SHORT, order.append)
    engine.step()
    engine.add([5, 3], SHORT, lambda event: isinstance(event, End) and order.append(3))
    while engine.step():
        pass
    assert order == [0, 1, 2, 3]


@pytest.mark.parametrize("budget, needs, expected", [
    (8, [], []), (8, [3], [3]), (8, [30], [8]), (8, [30, 2], [6, 2]), (8, [30, 30, 3], [5, 0, 3]),
    (8, [2, 30], [2, 6]), (1, [5, 1], [1, 0]), (9, [4, 4, 4], [4, 4, 1])])
def test_the_oldest_prompt_moves_on_and_short_ones_pass(budget, needs, expected):
    assert split_budget(budget, needs) == expected


def test_a_long_prompt_does_not_stall_the_others(model, tokenizer):
    engine = Engine(model, tokenizer, slots=3, prefill_tokens=4)
    events: list[str] = []
    engine.add([5], LONG, lambda event: events.append("answering"))
    engine.step()
    engine.add(list(range(60)), SHORT, lambda event: events.append("long"))
    engine.add([7, 8], SHORT, lambda event: events.append("short"))
    while "long" not in events:
        engine.step()
    assert events.index("short") < events.index("long")
    assert events.count("answering") >= 15  # one for each part of the prompt
    engine.close()


@pytest.mark.parametrize("token_ms, pause, most", [(1, 100, 100), (1, 200, 200), (10, 100, 64)])
def test_reading_prompts_holds_up_an_answer_for_a_pause_at_most(
        model, tokenizer, monkeypatch, token_ms, pause, most):
    engine, clock, sizes = Engine(model, tokenizer, slots=17, pause=pause), [0.0], []
    monkeypatch.setattr("fira.infer.engine.time", SimpleNamespace(monotonic=lambda: clock[0]))

    def slow(tokens_N, *others):
        sizes.append(len(tokens_N))
        clock[0] += token_ms * len(tokens_N) / 1000
        return Engine._read_plain(engine, tokens_N, *others)

    monkeypatch.setattr(engine, "_read_plain", slow)
    engine.add([5], LONG, lambda _: None)
    engine.step()
    for n in range(16):
        engine.add([n] * 60, SHORT, lambda _: None)
    engine.close(drain=True)
    assert 0.8 * most < max(sizes) <= most


def test_a_stream_left_early_frees_its_slot(engine):
    stream = engine.stream([5, 6], LONG)
    assert isinstance(next(stream), Token)
    stream.close()
    engine.step()
    assert (engine.stats["running"], engine.stats["cancelled"]) == (0, 1)


def test_tokens_chosen_at_once_are_announced_together_and_before_a_prompt_is_read(
        engine, monkeypatch):
    told, read = list[str](), engine._read_plain
    engine.after_tokens = lambda: told.append("|")
    monkeypatch.setattr(engine, "_read_plain", lambda tokens_N, parts, chosen: (
        told.append(f"{len(tokens_N)}:"), read(tokens_N, parts, chosen))[1])
    for name in "ab":
        number = engine.add([5, 6], LONG, lambda event, name=name: told.append(name))
    engine.step()
    told.clear()
    engine.step()
    assert "".join(told) == "2:ab||"
    engine.cancel(number)
    engine.add([*range(5, 35)], LONG, lambda event: told.append("c"))
    told.clear()
    engine.step()
    assert "".join(told) == "b1:a|28:c||"


@pytest.mark.parametrize("drain, reason", [(True, "length"), (False, "cancelled")])
@pytest.mark.parametrize("threaded", [True, False])
def test_close_ends_every_request(model, tokenizer, drain, reason, threaded):
    engine = Engine(model, tokenizer, slots=2)
    seen: list[list] = [[] for _ in range(5)]
    for events in seen:
        engine.add([5, 6], LONG, events.append)
    if threaded:
        engine.start()
    engine.close(drain=drain)
    assert [events[-1].reason for events in seen] == [reason] * 5
    with pytest.raises(QueueFull, match="closed"):
        engine.add([5], SHORT, print)


def test_a_failing_step_ends_its_requests_and_the_engine_goes_on(model, tokenizer, caplog):
    engine = Engine(model, tokenizer)
    seen = []
    expected = [event.id for event in engine.stream([5, 6], SHORT) if isinstance(event, Token)]

    def broken(*_):
        raise RuntimeError("out of memory\nmore words")

    engine.decode_step = broken
    engine.add([5, 6], SHORT, seen.append)
    with pytest.raises(RuntimeError, match="out of memory"):
        while engine.step():
            pass
    assert (seen[-1].reason, seen[-1].error) == ("error", "RuntimeError: out of memory")
    engine.start()
    assert list(engine.stream([5, 6], SHORT))[-1].reason == "error"
    engine.decode_step = None
    events = list(engine.stream([5, 6], SHORT))
    assert [event.id for event in events[:-1]] == expected
    assert engine.stats["failed"] == 2 and engine.stats["running"] == 0
    engine.close()
    assert "its requests have ended with an error" in caplog.text


def test_a_failing_listener_ends_its_own_request_only(engine, caplog):
    def broken(event):
        raise OSError("gone")

    seen: list = []
    engine.add([5, 6], LONG, broken)
    engine.add([5, 6], LONG, seen.append)
    while engine.step():
        pass
    assert seen[-1].reason == "length" and len(seen) == 51
    assert "the listener of request" in caplog.text and engine.stats["cancelled"] == 1


@pytest.mark.parametrize("prompt, params, line", [
    ([], {}, "the prompt is empty; give"),
    ([320], {}, "token id 320 in prompt is outside the vocabulary of 320"),
    ([-1], {}, "token id -1 in prompt"),
    ([1], {"logit_bias": {999: 1.0}}, "token id 999 in logit_bias"),
    ([1], {"stop_ids": (320,)}, "token id 320 in stop_ids"),
    ([1] * 65, {}, "prompt of 65 tokens leaves no room: 64 fit"),
])
def test_what_cannot_run_is_refused_at_once(engine, prompt, params, line):
    with pytest.raises(ValueError, match=line):
        engine.add(prompt, SamplingParams(**params), print)
    assert engine.stats["waiting"] == 0


@pytest.mark.parametrize("options, line", [
    ({"slots": 0}, "slots=0 must be at least 1"), ({"prefill_tokens": 0}, "prefill_tokens=0"),
    ({"capacity": 65}, "capacity=65 must be at least 1 and at most the model's context=64")])
def test_an_engine_of_impossible_size_is_refused(model, tokenizer, options, line):
    with pytest.raises(ValueError, match=line):
        Engine(model, tokenizer, **options)


def test_many_threads_adding_and_cancelling(model, tokenizer):
    engine = Engine(model, tokenizer, slots=4, max_waiting=8)
    engine.start()
    prompts = [[3 + n, 4, 5][:1 + n % 3] for n in range(6)]
    params = SamplingParams(max_new_tokens=8, temperature=0.9, seed=1, ignore_end=True)
    alone = Engine(model, tokenizer)
    expected = [[event.id for event in alone.stream(prompt, params) if isinstance(event, Token)]
                for prompt in prompts]
    refused, done = [], []

    def client(number):
        draw = random.Random(number)
        while len(done) < 48:
            which = draw.randrange(6)
            try:
                stream = engine.stream(prompts[which], params)
            except QueueFull:
                refused.append(number)
                time.sleep(0.002)
                continue
            most = draw.choice((3, 9))  # 3: leave early, which cancels
            made = list(itertools.islice(stream, most))
            stream.close()
            done.append([event.id for event in made[:8]] == expected[which][:most])

    threads = [threading.Thread(target=client, args=[n]) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    engine.close()
    assert len(done) >= 48 and all(done) and refused
    stats = engine.stats
    assert stats["running"] == stats["waiting"] == stats["failed"] == 0
    assert stats["finished"] + stats["cancelled"] == len(done)


def test_memory_is_flat_over_many_requests(model, tokenizer):
    import gc

    engine = Engine(model, tokenizer, slots=2)
    draw, sizes = random.Random(0), []
    for number in range(120):
        prompt = [draw.randrange(320) for _ in range(1 + number % 20)]
        list(engine.stream(prompt, SamplingParams(max_new_tokens=3, seed=number)))
        if number in (59, 119):
            gc.collect()
            sizes.append((len(gc.get_objects()), len(engine._requests), len(engine._running)))
    assert sizes[1][0] < sizes[0][0] + 200 and sizes[1][1:] == (0, 0)
    engine.close()
