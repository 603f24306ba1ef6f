"""Text is released whole and early, never beyond a stop string, and equals what was generated."""
from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fira.infer.engine import Engine
from fira.infer.request import Release, SamplingParams
from fira.infer.text import complete

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


@given(FEW | st.text(max_size=20), STOPS, st.randoms(use_true_random=False))
@settings(max_examples=500, deadline=None)
def test_what_is_released_is_the_text_before_the_first_stop(text, stops, random) -> None:
    data, table = text.encode("utf-8"), [b""]
    while data:
        size = random.randint(1, 5)
        table.append(data[:size])
        data = data[size:]
    release, parts = Release(table, stops), []
    for token in range(len(table)):
        parts += release.push(token), release.push(0)  # 0 is a special token in between
        assert cut(text, stops)[0].startswith("".join(parts))  # nothing of a stop leaked
        assert any(stop.startswith(release.pending) for stop in stops) or not release.pending
        if release.stopped:
            break
    assert ("".join(parts) + release.finish(), release.stopped) == cut(text, stops)
    assert all("\ufffd" not in part for part in parts) or "\ufffd" in text


def test_a_character_appears_when_it_is_complete_and_bytes_that_are_no_text_are_marked() -> None:
    release = Release([b"a", b"\xf0\x9f", b"\x99\x82", b"\xff", b"b\xc3"])
    assert [release.push(token) for token in (0, 1, 2, 3, 4, 99)] == ["a", "", "🙂", "\ufffd",
                                                                      "b", ""]
    assert release.finish() == ""


def released(ids, table) -> str:
    release = Release(table)
    return "".join(map(release.push, ids)) + release.finish()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_parts_join_to_what_the_model_generated(model, tokenizer, temperature) -> None:
    ids = [tokenizer.end_of_text, *tokenizer.encode("The state")]
    params = SamplingParams(100, temperature, top_k=20, seed=3, ignore_end=True)
    whole = model.generate(ids, 100, temperature, 20, seed=3, end_of_text=-1)[0, len(ids):]
    found = list(complete(model, tokenizer, "The state", params))
    assert len(found) > 5  # 100 tokens: the window of 64 slides twice
    assert "".join(found) == released(whole.tolist(), tokenizer.token_bytes())
    other = SamplingParams(100, temperature, top_k=20, seed=4, ignore_end=True)
    assert ("".join(complete(model, tokenizer, "The state", other)) == "".join(found)) == (
        temperature == 0)


def test_a_prompt_longer_than_the_window_is_cut_to_its_newest_tokens(model, tokenizer) -> None:
    text = "The state of the Union. " * 40
    ids = tokenizer.encode(text)
    whole = model.generate(ids, 8, temperature=0, end_of_text=-1)[0, len(ids):].tolist()
    params = SamplingParams(8, temperature=0, ignore_end=True)
    assert "".join(complete(model, tokenizer, text, params)) == released(
        whole, tokenizer.token_bytes())


def test_nothing_stays_on_the_model(model, tokenizer) -> None:
    def hooks() -> int:
        return sum(len(module._forward_hooks) for module in model.modules())
    before = hooks()
    parts = complete(model, tokenizer, "a", SamplingParams(8, ignore_end=True))
    next(parts)
    assert hooks() > before
    parts.close()
    assert hooks() == before


@pytest.fixture(scope="module")
def answer(model, tokenizer):
    """A function from parameters to (ids, text, end) of the engine's greedy answer."""
    def ask(**params):
        engine = Engine(model, tokenizer)
        *tokens, end = engine.stream(tokenizer.encode("The state"), SamplingParams(
            **{"max_new_tokens": 30, "temperature": 0.0, "ignore_end": True} | params))
        engine.close()
        return ([token.id for token in tokens], "".join(token.text for token in tokens) + end.text,
                end)
    return ask


def test_the_text_ends_at_a_stop_string_or_a_stop_id_without_it(answer, tokenizer) -> None:
    ids, text, _ = answer()
    stop = text[7:10]
    made, shown, end = answer(stop=("never there", stop))
    assert (shown, end.stop, end.reason) == (text[:text.index(stop)], stop, "stop")
    assert made == ids[:len(made)] and len(made) < len(ids)
    made, shown, end = answer(stop_ids=(ids[6],))
    place = ids.index(ids[6])
    assert made == ids[:place + 1] and end.reason == "stop" and end.stop is None
    assert shown == released(ids[:place], tokenizer.token_bytes())


def test_the_end_of_text_ends_the_answer_unless_ignored(answer, tokenizer) -> None:
    end_of_text = tokenizer.end_of_text
    forced = {end_of_text: 100.0}
    made, shown, end = answer(logit_bias=forced, ignore_end=False)
    assert (made, shown, end.reason, end.new_tokens) == ([end_of_text], "", "stop", 1)
    made, shown, end = answer(logit_bias=forced)
    assert (made, shown, end.reason) == ([end_of_text] * 30, "", "length")


def test_what_cannot_be_done_is_refused_before_any_text(model, tokenizer) -> None:
    with pytest.raises(ValueError, match="the prompt is empty; give the text to continue"):
        complete(model, tokenizer, "", SamplingParams())


@pytest.mark.parametrize("kind", [None, "int8", "int4"])
def test_what_generates_text_does_not_import_what_trains(kind, run, fira, tmp_path) -> None:
    if kind:
        assert fira("export", kind, run, tmp_path / kind).code == 0
        run = tmp_path / kind
    modules = "fira.cli.use, fira.infer.load, fira.infer.text, fira.infer.decode, fira.runlog"
    heavy = ("fira.parallel", "fira.checkpoint", "fira.train", "numba", "matplotlib", "starlette",
             "torch.distributed.fsdp", "torch.distributed.pipelining", "torch._dynamo", "sympy")
    code = (f"import sys, {modules}; fira.infer.load.load({str(run)!r}, 'cpu'); "
            f"print([name for name in {heavy} if name in sys.modules])")
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
