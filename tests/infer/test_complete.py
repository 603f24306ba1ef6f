"""Text comes out as it was generated, never in half characters."""
from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fira.infer.sample import SamplingParams
from fira.infer.text import complete, decode, stream_text


@given(st.text(), st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_any_cut_of_the_bytes_gives_whole_characters(text: str, random) -> None:
    data, table, ids = text.encode("utf-8"), [b""], [0]
    while data:
        size = random.randint(1, 4)
        table.append(data[:size])
        ids += [len(table) - 1, 0]  # 0 is a special token in between
        data = data[size:]
    found = list(decode(ids, table))
    assert "".join(found) == text
    assert all("\ufffd" not in part for part in found) or "\ufffd" in text


def test_a_character_appears_only_when_it_is_complete() -> None:
    table = [b"a", b"\xf0\x9f", b"\x99", b"\x82", b"b"]
    seen = []
    for upto in range(1, 6):
        seen.append("".join(decode(range(upto), table)))
    assert seen == ["a", "a", "a", "a🙂", "a🙂b"]


def test_bytes_that_are_no_text_are_marked_and_padding_rows_show_nothing() -> None:
    assert "".join(decode([0, 1, 99], [b"\xff", b"a"])) == "\ufffda"


def test_the_parts_join_to_what_the_model_generated(model, tokenizer) -> None:
    ids = [tokenizer.end_of_text, *tokenizer.encode("The state")]
    whole = model.generate(ids, max_new_tokens=40, temperature=1.0, top_k=20, seed=3,
                           end_of_text=tokenizer.end_of_text)[0, len(ids):].tolist()
    table = tokenizer.token_bytes()
    data = b"".join(table[token] for token in whole if token < len(table))
    params = SamplingParams(max_new_tokens=40, top_k=20, seed=3)
    found = list(complete(model, tokenizer, "The state", params))
    text = "".join(found)
    assert len(found) > 5
    assert data.decode("utf-8", "replace").rstrip("\ufffd") == text.rstrip("\ufffd")


def test_equal_seeds_give_equal_text(model, tokenizer) -> None:
    def run(seed: int) -> str:
        params = SamplingParams(max_new_tokens=20, seed=seed)
        return "".join(complete(model, tokenizer, "The", params))
    assert run(5) == run(5) != run(6)


def test_a_stop_id_ends_the_text_and_is_not_shown(model, tokenizer) -> None:
    ids = tokenizer.encode("The state")
    whole = model.generate(ids, max_new_tokens=8, temperature=0, end_of_text=-1)[0].tolist()
    greedy = whole[len(ids):]
    before = greedy[:greedy.index(greedy[5])]
    params = SamplingParams(max_new_tokens=8, temperature=0, stop_ids=(greedy[5],))
    found = "".join(stream_text(model, tokenizer, ids, params))
    assert found == "".join(decode(before, tokenizer.token_bytes()))


def test_a_stop_string_ends_the_text_and_is_not_shown(model, tokenizer) -> None:
    def run(**params) -> str:
        return "".join(complete(model, tokenizer, "The state", SamplingParams(
            max_new_tokens=30, temperature=0, ignore_end=True, **params)))
    whole = run()
    assert run(stop=(whole[5:8],)) == whole[:whole.index(whole[5:8])]


@pytest.mark.parametrize("prompt,options,line", [
    ("", {}, "the prompt is empty; give the text to continue"),
    ("a", {"min_p": 0.5}, "min_p=0.5 is not supported by plain generation"),
    ("a", {"experts": True}, "experts=True is not supported"),
])
def test_what_cannot_be_done_is_refused_before_any_text(model, tokenizer, prompt, options,
                                                        line) -> None:
    with pytest.raises(ValueError, match=line):
        complete(model, tokenizer, prompt, SamplingParams(**options))


def test_what_generates_text_does_not_import_what_trains() -> None:
    modules = "fira.cli.use, fira.infer.load, fira.infer.text, fira.infer.decode, fira.runlog"
    heavy = ("fira.parallel", "fira.checkpoint", "fira.train", "numba", "matplotlib", "starlette",
             "torch.distributed.fsdp", "torch.distributed.pipelining", "torch._dynamo")
    code = f"import sys, {modules}; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
