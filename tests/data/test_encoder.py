"""The fast encoder gives the reference's ids, and steps aside where it could not."""
from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import tiktoken
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers
from tokenizers import Tokenizer as Reference

from fira.data import encoder
from fira.data.encoder import PATTERNS
from fira.data.tokenizer import Tokenizer

HARD = st.text(alphabet=st.one_of(
    st.sampled_from(" \n\r\t\x0b\x85\xa0\u2028\u3000\u180e'sStTrReEvVmMlLdDſ\u212aaé\u0301"),
    st.sampled_from("東19٣²!-_/'  \n"),
    st.characters(exclude_categories=["Cs"])), max_size=80)


def tokens_of(pattern: str, text: str) -> list[str]:
    """What tiktoken's regex engine finds."""
    every_byte = {bytes([byte]): byte for byte in range(256)}
    encoder = tiktoken.Encoding("bytes", pat_str=pattern, mergeable_ranks=every_byte,
                                special_tokens={})
    return list(bytes(encoder.encode_ordinary(text)).decode())


def found_by_reference(pattern: str, text: str) -> list[str]:
    split = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
    return [piece for piece, _ in split.pre_tokenize_str(text)]


@pytest.mark.parametrize("char_class", [r"\p{L}", r"\p{N}", r"\s", "(?i:[sdmtrevl])"])
def test_both_regex_engines_agree_on_every_code_point(char_class):
    text = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    assert tokens_of(char_class, text) == found_by_reference(char_class, text)


@settings(max_examples=500, deadline=None)
@given(HARD)
def test_ids_equal_the_reference_on_hard_text(tokenizer, text):
    assert tokenizer.slow_reason == ""
    assert tokenizer.encode(text) == tokenizer._plain.encode(text).ids


@pytest.mark.parametrize("pattern", PATTERNS, ids=PATTERNS.values())
@settings(max_examples=200, deadline=None)
@given(text=HARD)
def test_ids_equal_the_reference_with_every_pattern(tokenizer, pattern, text):
    other = with_pattern(tokenizer, pattern)
    assert other.slow_reason == ""
    assert other.encode(text) == other._plain.encode(text).ids


MADE: dict[str, Tokenizer] = {}


def with_pattern(tokenizer, pattern: str) -> Tokenizer:
    if pattern not in MADE:
        changed = copy.deepcopy(tokenizer.description)
        changed["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": pattern}
        MADE[pattern] = loaded(changed)
    return MADE[pattern]


def loaded(description: dict) -> Tokenizer:
    return Tokenizer(Reference.from_str(json.dumps(description)))


@pytest.mark.parametrize("text", ["a" * 200_000, " " * 200_000, "\n" * 200_000, "1" * 200_000,
                                  "!" * 200_000, "ab" * 100_000, "a  " * 70_000, "東" * 70_000])
def test_long_repetitions_neither_fail_nor_crawl(tokenizer, text):
    assert tokenizer.encode(text) == tokenizer._plain.encode(text).ids


BLANKS = st.text(alphabet=" \t\u3000\n\r", min_size=4, max_size=9)


@pytest.mark.parametrize("pattern", PATTERNS, ids=PATTERNS.values())
@settings(max_examples=150, deadline=None, suppress_health_check=[
    HealthCheck.function_scoped_fixture])
@given(parts=st.lists(st.one_of(HARD, BLANKS, st.sampled_from(["a", "! ", "\n", "1"])), max_size=8))
def test_rows_of_blanks_cut_out_and_put_back_change_no_id(tokenizer, monkeypatch, pattern, parts):
    monkeypatch.setattr(encoder, "LONG_BLANK", 5)
    monkeypatch.setattr(encoder, "LONG_TEXT", 30)
    made, text = with_pattern(tokenizer, pattern), "".join(parts)
    assert made.encode(text) == made._plain.encode(text).ids


@pytest.mark.parametrize("text", [" " * 3_000_000, "a\n" + " \t" * 1_000_000 + "b c",
                                  "\n" * 2_000_000 + "x"])
def test_blanks_beyond_what_the_regex_takes(tokenizer, text):
    for pattern in PATTERNS:
        made = with_pattern(tokenizer, pattern)
        assert made.decode(made.encode(text)) == text


def toy(vocabulary: list[str], merges: list[tuple[str, str]], **model) -> dict:
    """A description with the 256 bytes, then the given tokens."""
    letters = sorted(encoder.byte_of_char())
    names = {token: id for id, token in enumerate([*letters, *vocabulary])}
    split = {"type": "Split", "pattern": {"Regex": encoder.QWEN2}, "behavior": "Isolated",
             "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
             "use_regex": False}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
            "normalizer": None, "post_processor": None, "decoder": {**level, "use_regex": True},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
            "model": {"type": "BPE", "vocab": names, "merges": merges, **model}}


def test_ids_in_another_order_than_the_merges():
    both = loaded(toy(["abc", "bc", "ab"], [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")]))
    assert both.slow_reason == "" and both._fast[0].ids is not None
    for text in ("abc", "ab", "bc", "xbc abcabc", "aabbcc"):
        assert both.encode(text) == both._plain.encode(text).ids


def test_token_that_merges_do_not_reach_keeps_the_reference():
    lost = toy(["abc", "bc", "ab"], [("a", "b"), ("b", "c"), ("a", "bc")])  # ab c never joins
    assert "'abc' is not reached by its merges" in loaded(lost).slow_reason
    whole = loaded({**lost, "model": {**lost["model"], "ignore_merges": True}})
    assert "not reached" in whole.slow_reason
    for text in ("abc", "abcabc"):
        assert whole.encode(text) == whole._plain.encode(text).ids
    assert len(whole.encode("abc")) == 1 and len(loaded(lost).encode("abc")) == 2


@settings(max_examples=150, deadline=None)
@given(st.randoms(use_true_random=False), st.text("abc", max_size=30))
def test_any_merge_table_gives_equal_ids_or_a_reason(random, text):
    tokens, merges = list("abc"), []
    for _ in range(random.randint(1, 12)):
        pair = (random.choice(tokens), random.choice(tokens))
        if pair not in merges and len(pair[0] + pair[1]) < 7:
            merges.append(pair)
            tokens.append(pair[0] + pair[1])
    vocabulary = sorted(set(tokens) - set("abc"), key=lambda token: (token[::-1], token))
    made = loaded(toy(vocabulary, merges))
    assert made.encode(text) == made._plain.encode(text).ids


@pytest.mark.parametrize("change, reason", [
    ({"normalizer": {"type": "NFC"}}, "normalizer"),
    ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                        "use_regex": True}}, "pre-tokenizer"),
    ({"added_tokens": [{"id": 256, "content": "ab", "single_word": False, "lstrip": False,
                        "rstrip": False, "normalized": False, "special": False}]}, "added tokens"),
])
def test_what_tiktoken_cannot_do_keeps_the_reference(change, reason):
    made = loaded({**toy(["ab"], [("a", "b")]), **change})
    assert reason in made.slow_reason and not made.can_cut
    assert made.encode("ab abe\u0301") == made._plain.encode("ab abe\u0301").ids


def test_ids_are_a_compact_array(tokenizer):
    ids = tokenizer.encode_array("Fellow-Citizens of the Senate")
    assert ids.dtype == np.uint32 and ids.ndim == 1
    assert tokenizer.encode_array("").shape == (0,)
