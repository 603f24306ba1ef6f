"""Pairs of answers: which forms are read, and which rows are named as no pair."""
import pytest

from fira.data.conversations import read_pair

ASK, YES, NO = ({"role": role, "content": text} for role, text in (
    ("user", "Is it strong?"), ("assistant", "Yes."), ("assistant", "No. ")))


@pytest.mark.parametrize("record", [
    {"prompt": "Is it strong?", "chosen": "Yes.", "rejected": " No."},
    {"prompt": [ASK], "chosen": "Yes.", "rejected": [NO]},
    {"prompt": [ASK], "chosen": [YES], "rejected": [NO]},
    {"prompt": "Is it strong?", "chosen": [ASK, YES], "rejected": [ASK, NO]},
    {"chosen": [ASK, YES], "rejected": [ASK, NO], "score_chosen": 9.0}])
def test_every_form_of_a_pair_is_the_same_pair(record):
    chosen, rejected = read_pair(record)
    assert [[(one["role"], one["content"], one["train"]) for one in messages]
            for messages in (chosen, rejected)] == [
        [("user", ASK["content"], False), ("assistant", text, True)] for text in ("Yes.", "No.")]


def test_only_the_last_answer_of_a_conversation_is_trained_on():
    chosen, _ = read_pair({"prompt": [ASK, NO, ASK], "chosen": "Yes.", "rejected": "No."})
    assert [one["train"] for one in chosen] == [False, False, False, True]


@pytest.mark.parametrize("record, words", [
    ("text", "no pair of answers under str; use prompt, chosen and rejected"),
    ({"prompt": "a", "chosen": "b"}, "under prompt, chosen; use prompt, chosen and rejected"),
    ({"prompt": "a", "chosen": "b", "rejected": " b"}, "chosen and rejected are equal"),
    ({"prompt": "a", "chosen": "b", "rejected": " "}, "rejected has no answer, or an empty one"),
    ({"prompt": "a", "chosen": [], "rejected": "b"}, "chosen has no answer"),
    ({"prompt": "a", "chosen": [ASK], "rejected": "b"}, "chosen has no answer"),
    ({"prompt": "a", "chosen": "b", "rejected": None}, "prompt or rejected is neither text nor"),
    ({"prompt": "a", "chosen": {"b": 1}, "rejected": "c"}, "prompt or chosen is neither text nor"),
    ({"chosen": "b", "rejected": "c"}, "chosen answers nothing: give the prompt"),
    ({"chosen": [YES], "rejected": [NO]}, "chosen answers nothing: give the prompt"),
    ({"chosen": [ASK, YES], "rejected": [ASK | {"content": "Why?"}, NO]}, "before their last"),
])
def test_what_is_no_pair_is_said(record, words):
    with pytest.raises(ValueError) as caught:
        read_pair(record)
    assert words in str(caught.value)
