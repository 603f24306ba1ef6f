"""Rows: their kinds, the score of an answer, and what is said about a wrong one."""
from __future__ import annotations

import pytest

from fira.eval.forms import read_rows
from fira.eval.task import make_row

USER = [{"role": "user", "content": "2 + 2?"}]


@pytest.mark.parametrize("checker, gold, right, wrong", [
    ("exact", "New York", ["New York", " New  York\n"], ["new york", "York", ""]),
    ("number", "#### 1,234", ["1234", "so 3 + 1 is 1,234.", "2 #### 1234"], ["12345", "", "none"]),
    ("number", "-0.5", ["it is -0.5", "-.50"], ["0.5", "5"]),
    ("regex", r"^\d{3}$", ["123"], ["1234", ""]),
    ("letter", "B", ["B", "(b) because", "B. Paris", "The answer is (B)", "Answer: B"],
     ["A", "Because", "", "The answer is A, not B"]),
])
def test_checkers_accept_the_right_answers_alone(checker, gold, right, wrong):
    row = make_row({"messages": USER, "answer": gold, "checker": checker}, "row")
    assert [row.score(answer) for answer in right] == [1.0] * len(right)
    assert [row.score(answer) for answer in wrong] == [0.0] * len(wrong)


def test_a_conversation_with_a_checker_is_a_task_and_rouge_gives_a_share():
    talk = {"messages": [*USER, {"role": "assistant", "content": "It is four"}], "checker": "rouge"}
    (row,) = read_rows([("row", talk)])
    assert row.prompt == tuple(USER)
    assert (row.score("It is four."), row.score("four it"), row.score("")) == (1.0, 0.4, 0.0)


@pytest.mark.parametrize("record, prompt, answer", [
    ({"context": "2 + 2 =", "continuations": [" 5", " 4"], "gold": 1}, "2 + 2 =", "4"),
    ({"context": "The sky is", "answer": " blue"}, "The sky is", "blue"),
    ({"good": "She sings.", "bad": "She sing."}, "", "She sings."),
    ({"messages": USER, "answer": ["4", "four"]}, tuple(USER), "four"),
])
def test_the_gold_answer_scores_one_and_an_empty_one_zero(record, prompt, answer):
    row = make_row(record, "row")
    assert (row.prompt, row.score(answer), row.score("")) == (prompt, 1.0, 0.0)


@pytest.mark.parametrize("record, reason", [
    ({"context": "a", "continuations": [" b", " c"], "gold": 2}, "gold=2 is not from 0 to 1"),
    ({"context": "a", "continuations": [" b", " c"], "gold": True}, "gold=True"),
    ({"context": "a", "continuations": [" b", " b"], "gold": 0}, "stands there twice"),
    ({"context": "a", "continuations": [" b", " "], "gold": 0}, "every continuation is text"),
    ({"context": ["a"], "continuations": [" b", " c"], "gold": 0}, "zip"),
    ({"context": "a"}, "field 'answer' is missing"),
    ({"good": "She sings."}, "field 'bad' is missing"),
    ({"messages": USER, "answer": "4", "checker": "digits"}, "'digits' is not one of exact, nu"),
    ({"messages": USER, "answer": "four", "checker": "number"}, "checker accepts the answer"),
    ({"messages": USER, "answer": "(", "checker": "regex"}, "unterminated"),
    ({"messages": [{"role": "user"}], "answer": "4"}, "field 'content' is missing"),
    (["a", "b"], "list"),
])
def test_a_wrong_row_is_named_with_its_place_the_rule_and_examples(record, reason):
    with pytest.raises(ValueError, match=r"^mine.jsonl:3: .*write a row like one of \{") as raised:
        list(read_rows([("mine.jsonl:3", record)]))
    assert reason in str(raised.value) and "\n" not in str(raised.value)
