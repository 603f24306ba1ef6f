"""Questions of generators: right steps, disjoint splits, and what is said about a wrong spec."""
from __future__ import annotations

import json

import pytest

from fira.data.conversations import read_conversation
from fira.eval.forms import read_rows
from fira.eval.tasks.generate import FAMILIES, check_steps, make, make_again, record


@pytest.fixture(params=[(name, depth) for name, (_, largest) in FAMILIES.items()
                        for depth in (2, 4, largest)], ids=lambda one: f"{one[0]}:{one[1]}")
def made(request):
    return {split: make("{}:{}".format(*request.param), 60, split)[0].instances
            for split in ("train", "test")}


def test_each_trace_is_right_and_a_changed_a_missing_or_an_early_step_is_not(made):
    for one in (made["train"] | made["test"]).values():
        steps = list(one.steps)
        assert one.is_right("\n".join(steps)) and one.steps[-1].endswith(one.answer)
        assert not any(one.is_right("\n".join(wrong)) for wrong in (
            [], steps[:-1], steps[1:], steps[::-1], [*steps[:-1], steps[-1][:-1] + "#"]))


def test_the_splits_share_no_canonical_form_and_a_key_makes_its_instance_again(made):
    train, test = ({one.canonical for one in made[split].values()} for split in ("train", "test"))
    assert train and test and not train & test
    assert all(make_again(key) == one for key, one in made["test"].items())
    assert len({one.question for one in made["train"].values()}) == len(made["train"])


def test_a_row_is_a_conversation_and_a_task_alike():
    key, one = next(iter(make("runsum:3", 1, "train")[0].instances.items()))
    whole = json.loads(json.dumps(record(key, one)))
    assert read_conversation(whole).messages[1]["reasoning_content"] == "\n".join(one.steps)
    (row,) = read_rows([("row", whole)])
    assert (row.score(one.answer), row.score(""), row.group) == (1.0, 0.0, key)
    assert check_steps(row, "\n".join(one.steps)) and not check_steps(row, one.answer)
    assert record(key, one, direct=True)["messages"][1]["reasoning_content"] == ""
