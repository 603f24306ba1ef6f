"""Text is let go whole, early, and never beyond a stop string."""
from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fira.infer.engine import Engine
from fira.infer.request import End, Release
from fira.infer.sample import SamplingParams
from fira.infer.text import decode

FEW = st.text(alphabet="abß🙂", max_size=12)
STOPS = st.lists(st.text(alphabet="abß🙂", min_size=1, max_size=4), max_size=3)


def cut(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The definition: character by character, until one of the stop strings is complete."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[:end - len(longest)], longest
    return text, None


def tokens_of(text: str, random) -> tuple[list[int], list[bytes]]:
    data, table = text.encode("utf-8"), [b""]
    while data:
        size = random.randint(1, 5)
        table.append(data[:size])
        data = data[size:]
    return list(range(len(table))), table


@given(FEW | st.text(max_size=20), STOPS, st.randoms(use_true_random=False))
@settings(max_examples=500, deadline=None)
def test_what_is_released_is_the_text_before_the_first_stop(text, stops, random) -> None:
    ids, table = tokens_of(text, random)
    release, parts = Release(table, stops), []
    for token in ids:
        parts.append(release.push(token))
        assert cut(text, stops)[0].startswith("".join(parts))  # nothing of a stop leaked
        if release.stopped:
            break
    assert ("".join(parts) + release.finish(), release.stopped) == cut(text, stops)
    assert all("\ufffd" not in part for part in parts) or "\ufffd" in text


@given(st.text(alphabet="abc", max_size=30), STOPS)
@settings(max_examples=200, deadline=None)
def test_no_more_is_held_back_than_may_begin_a_stop(text, stops) -> None:
    release, free = Release([c.encode() for c in text], stops), ""
    for token in range(len(text)):
        free += release.push(token)
        if release.stopped:
            return
        assert any(stop.startswith(release.pending) for stop in stops) or not release.pending
        assert free + release.pending == text[:token + 1]


def test_without_stop_strings_text_is_that_of_decode() -> None:
    table = [b"a", b"\xf0\x9f", b"\x99\x82", b"\xff", b"b\xc3"]
    release = Release(table)
    assert [release.push(token) for token in (0, 1, 2, 3, 4, 99)] == ["a", "", "🙂", "\ufffd",
                                                                      "b", ""]
    assert release.finish() == "" and "".join(decode([0, 1, 2, 3, 4, 99], table)) == "a🙂\ufffdb"


@pytest.fixture(scope="module")
def answer(model, tokenizer):
    """A function from parameters to (ids, text, end) of the engine's greedy answer."""
    def ask(**params):
        engine = Engine(model, tokenizer)
        *tokens, end = engine.stream(tokenizer.encode("The state"), SamplingParams(
            **{"max_new_tokens": 30, "temperature": 0.0, "ignore_end": True} | params))
        assert isinstance(end, End) and engine.stats["running"] == 0
        return ([token.id for token in tokens], "".join(token.text for token in tokens) + end.text,
                end)
    return ask


def test_the_engine_stops_at_a_stop_string(answer) -> None:
    ids, text, _ = answer()
    stop = text[7:10]
    made, shown, end = answer(stop=("never there", stop))
    assert (shown, end.stop, end.reason) == (text[:text.index(stop)], stop, "stop")
    assert made == ids[:len(made)] and len(made) < len(ids)


def test_the_engine_stops_at_a_stop_id_and_does_not_show_it(answer, tokenizer) -> None:
    ids, _, _ = answer()
    made, shown, end = answer(stop_ids=(ids[6],))
    place = ids.index(ids[6])
    assert made == ids[:place + 1] and end.reason == "stop" and end.stop is None
    assert shown == "".join(decode(ids[:place], tokenizer.token_bytes()))


def test_the_end_of_text_ends_the_answer_unless_ignored(answer, tokenizer) -> None:
    end_of_text = tokenizer.end_of_text
    forced = {end_of_text: 100.0}
    made, shown, end = answer(logit_bias=forced, ignore_end=False)
    assert (made, shown, end.reason, end.new_tokens) == ([end_of_text], "", "stop", 1)
    made, shown, end = answer(logit_bias=forced)
    assert (made, shown, end.reason) == ([end_of_text] * 30, "", "length")
