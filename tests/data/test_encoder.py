"""The fast encoder gives the reference's ids; where it could not, the reference is used."""
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
BLANKS = st.text(alphabet=" \t\u3000\n\r", min_size=4, max_size=9)
every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=PATTERNS.values())


def loaded(description: dict) -> Tokenizer:
    return Tokenizer(Reference.from_str(json.dumps(description)))


def expected(tokenizer: Tokenizer, text: str) -> list[int]:
    """The reference's ids."""
    return tokenizer._plain.encode(text).ids


@pytest.fixture(scope="session")
def with_pattern(tokenizer):
    """The same vocabulary with each pre-tokenizer."""
    made = {}
    for pattern in PATTERNS:
        changed = copy.deepcopy(tokenizer.description)
        changed["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": pattern}
        made[pattern] = loaded(changed)
        assert made[pattern].slow_reason == ""
    return made


@pytest.mark.parametrize("char_class", [r"\p{L}", r"\p{N}", r"\s", "(?i:[sdmtrevl])"])
def test_both_regex_engines_agree_on_every_code_point(char_class):
    text = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    every_byte = {bytes([byte]): byte for byte in range(256)}
    fast = tiktoken.Encoding("bytes", pat_str=char_class, mergeable_ranks=every_byte,
                             special_tokens={})
    split = pre_tokenizers.Split(Regex(char_class), "removed", invert=True)
    found = list(bytes(fast.encode_ordinary(text)).decode())
    assert found == [word for word, _ in split.pre_tokenize_str(text)]


@every_pattern
@settings(max_examples=300, deadline=None)
@given(text=HARD)
def test_ids_equal_the_reference_on_hard_text(with_pattern, pattern, text):
    ids = with_pattern[pattern].encode_array(text)
    assert ids.dtype == np.uint32 and ids.tolist() == expected(with_pattern[pattern], text)


@pytest.mark.parametrize("word", ["a", " ", "\n", "1", "!", "ab", "a  ", "東"])
def test_long_repetitions_neither_fail_nor_take_long(tokenizer, word):
    assert tokenizer.encode(word * 100_000) == expected(tokenizer, word * 100_000)


@every_pattern
@settings(max_examples=150, deadline=None, suppress_health_check=[
    HealthCheck.function_scoped_fixture])
@given(parts=st.lists(st.one_of(HARD, BLANKS, st.sampled_from(["a", "! ", "\n", "1"])), max_size=8))
def test_whitespace_cut_out_and_put_back_changes_no_id(with_pattern, monkeypatch, pattern, parts):
    monkeypatch.setattr(encoder, "LONG_BLANK", 5)
    monkeypatch.setattr(encoder, "LONG_TEXT", 30)
    text = "".join(parts)
    assert with_pattern[pattern].encode(text) == expected(with_pattern[pattern], text)


@every_pattern
def test_whitespace_too_long_for_the_regex_engines_is_encoded(with_pattern, pattern):
    for text in ("a\n" + " \t" * 1_000_000 + "b c", "\n" * 2_000_000 + "x"):
        ids = with_pattern[pattern].encode(text)
        assert with_pattern[pattern].decode(ids) == text


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


def test_token_that_merges_do_not_reach_requires_the_reference():
    lost = toy(["abc", "bc", "ab"], [("a", "b"), ("b", "c"), ("a", "bc")])  # ab c never joins
    assert "'abc' is not reached by its merges" in loaded(lost).slow_reason
    whole = loaded({**lost, "model": {**lost["model"], "ignore_merges": True}})
    assert "not reached" in whole.slow_reason
    for text in ("abc", "abcabc"):
        assert whole.encode(text) == expected(whole, text)
    assert len(whole.encode("abc")) == 1 and len(loaded(lost).encode("abc")) == 2
    both = loaded(toy(["abc", "bc", "ab"], [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")]))
    assert both.slow_reason == "" and both._fast[0].ids.tolist() != list(range(259))


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
    assert made.encode(text) == expected(made, text)


@pytest.mark.parametrize("change, reason", [
    ({"normalizer": {"type": "NFC"}}, "normalizer"),
    ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                        "use_regex": True}}, "pre-tokenizer"),
    ({"added_tokens": [{"id": 256, "content": "ab", "single_word": False, "lstrip": False,
                        "rstrip": False, "normalized": False, "special": False}]}, "added tokens"),
])
def test_what_tiktoken_cannot_do_requires_the_reference(change, reason):
    made = loaded({**toy(["ab"], [("a", "b")]), **change})
    assert reason in made.slow_reason and not made.can_cut
    assert ("becomes" in made.rewrites) == (reason != "added tokens")
    assert made.encode("ab abe\u0301") == expected(made, "ab abe\u0301")
