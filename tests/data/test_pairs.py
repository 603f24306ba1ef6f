"""Pairs of answers: which forms are read, and which rows are named as no pair."""
import pytest

from fira.data.conversations import read_pair

ASK, YES, NO = ({"role": role, "content": text} for role, text in (
    ("user", "Is it?"), ("assistant", "Yes."), ("assistant", "No. ")))


@pytest.mark.parametrize("record", [
    {"prompt": "Is it?", "chosen": "Yes.", "rejected": " No."},
    {"prompt": [ASK], "chosen": "Yes.", "rejected": [NO]},
    {"prompt": "Is it?", "chosen": [ASK, YES], "rejected": [ASK, NO]},
    {"chosen": [ASK, YES, ASK, YES], "rejected": [ASK, YES, ASK, NO], "score_chosen": 9.0}])
def test_every_form_is_the_same_pair_and_only_the_last_answer_is_trained_on(record):
    for (messages, _), text in zip(read_pair(record), ("Yes.", "No."), strict=True):
        assert messages[-2:] == [ASK | {"train": False}, {"role": "assistant", "content": text}]
        assert not any(one["train"] for one in messages[:-1])


@pytest.mark.parametrize("record, words", [
    ("text", "no pair of answers under str; use prompt, chosen and rejected"),
    ({"prompt": "a", "chosen": "b"}, "under prompt, chosen; use prompt, chosen and rejected"),
    ({"prompt": "a", "chosen": "b", "rejected": " b"}, "chosen and rejected are equal"),
    ({"prompt": "a", "chosen": "b", "rejected": " "}, "rejected has no answer, or an empty one"),
    ({"prompt": "a", "chosen": [], "rejected": "b"}, "chosen has no answer"),
    ({"prompt": "a", "chosen": [ASK], "rejected": "b"}, "chosen has no answer"),
    ({"prompt": "a", "chosen": "b", "rejected": None}, "prompt or rejected is neither text nor"),
    ({"chosen": "b", "rejected": "c"}, "chosen answers nothing: give the prompt"),
    ({"chosen": [ASK, YES], "rejected": [ASK | {"content": "Why?"}, NO]}, "before their last")])
def test_what_is_no_pair_is_said(record, words):
    with pytest.raises(ValueError, match=words):
        read_pair(record)
