"""Questions of generators: right steps, disjoint splits, and what is said about a wrong spec."""
from __future__ import annotations

import json
import shutil

import pytest

from fira.data.conversations import read_conversation
from fira.eval.forms import read_rows
from fira.eval.measure import measure
from fira.eval.tasks.generate import FAMILIES, check_steps, make, make_again, open_tasks, record
from fira.files import write_manifest


@pytest.fixture(params=[(name, depth) for name, (_, largest) in FAMILIES.items()
                        for depth in (2, 4, largest)], ids=lambda one: f"{one[0]}:{one[1]}")
def made(request):
    return {split: make("{}:{}".format(*request.param), 60, split)[0].instances
            for split in ("train", "test")}


def test_each_trace_is_right_and_a_changed_a_missing_or_an_early_step_is_not(made):
    for one in (made["train"] | made["test"]).values():
        steps = list(one.steps)
        assert one.is_right("\n".join(steps))
        assert not any(one.is_right("\n".join(wrong)) for wrong in (
            [], steps[:-1], steps[1:], steps[::-1], [*steps[:-1], steps[-1][:-1] + "#"])
            if wrong != steps)


def test_the_splits_share_no_canonical_form_and_a_key_makes_its_instance_again(made):
    train, test = ({one.canonical for one in made[split].values()} for split in ("train", "test"))
    assert train and test and not train & test
    assert all(make_again(key) == one for key, one in made["test"].items())
    assert len({one.question for one in made["train"].values()}) == len(made["train"])


def test_independent_gates_may_be_computed_in_any_order():
    for one in make("circuit:3", 20, "train")[0].instances.values():
        first, second, last = one.steps
        independent = first[0] not in second[2:5]
        assert one.is_right("\n".join([second, first, last])) == independent


def test_a_row_is_a_conversation_and_a_task_alike():
    key, one = next(iter(make("runsum:3", 1, "train")[0].instances.items()))
    whole = json.loads(json.dumps(record(key, one)))
    assert read_conversation(whole).messages[1]["reasoning_content"] == "\n".join(one.steps)
    (row,) = read_rows([("row", whole)])
    assert (row.score(one.answer), row.score(""), row.group) == (1.0, 0.0, key)
    assert check_steps(row, "\n".join(one.steps)) and not check_steps(row, one.answer)
    with pytest.raises(ValueError, match="not the one that is made now; write the rows again"):
        check_steps(row._replace(group="runsum:3/0.999"), "")
    with pytest.raises(ValueError, match="task '' is none of"):
        check_steps(row._replace(group=None), "")
    assert record(key, one, direct=True)["messages"][1]["reasoning_content"] == ""


@pytest.fixture
def tuned(run, tmp_path):
    """A run that is said to know chat turns."""
    folder = shutil.copytree(run, tmp_path / "tuned")
    for config in folder.glob("step-*/config.json"):
        config.write_text(json.dumps({**json.loads(config.read_text()), "chat": True}))
        write_manifest(config.parent)
    return folder


def test_eval_has_a_line_for_each_depth_with_the_floors_and_names_depths_without_rows(fira, tuned):
    shown = fira("eval", tuned, "--task", "swap:1-3", "--limit", 9, "--device", "cpu")
    assert "no rows of swap:1\n" in shown.err and "without swap:1" in shown.out, shown.err
    found = measure(tuned, [], ["swap:1-3"], limit=9, device="cpu")["suites"]["own"]
    task, _ = open_tasks("swap:1-3", 9)
    assert [*found["tasks"]] == ["swap:2", "swap:3"] and found["tasks"]["swap:2"]["n"] == 3
    assert found["tasks"]["swap:2"]["floors"] == task.protocol["floors"]
    starts = [row.messages[0]["content"][8] == row.answers[0] for row in task.rows]
    assert task.protocol["floors"]["shortcut"] == sum(starts) / 3


def test_the_verb_writes_a_file_that_eval_reads_and_lists_tasks_with_examples(fira, tmp_path):
    out = tmp_path / "steps.jsonl"
    shown = fira("tasks", "add:1-2", "swap:1", "--rows", 30, "--split", "test", "--out", out)
    assert "swap:1: only 0 different questions are of the split test" in shown.err
    rows = [*read_rows([("row", json.loads(line)) for line in out.read_text().splitlines()])]
    assert len(rows) == 30 and all(row.score(row.answers[0]) for row in rows)
    assert {row.group.partition("/")[0] for row in rows} == {"add:1", "add:2"}
    assert all(f"{name}:1-{largest}" in fira("tasks").out
               for name, (_, largest) in FAMILIES.items())


@pytest.mark.parametrize("spec, reason", [
    ("runsun:1-4", "none of runsum, swap, modchain"), ("runsun:1-4", "try runsum:4 or runsum:1-4"),
    ("add", "try add:4"), ("runsum:0", "depths of runsum are 1 to 25; try runsum:1-25"),
    ("runsum:0-3", "depths of runsum"), ("deduce:2-99", "1 to 8; try deduce:1-8"),
    ("swap:3-2", "try swap:1-26"), ("gym:chain_sum", "it has no steps"),
])
def test_a_wrong_spec_is_refused_with_the_nearest_name_or_range(refused, tmp_path, spec, reason):
    assert reason in refused("tasks", spec, "--out", tmp_path / "x.jsonl")


def test_gym_gives_questions_and_scores_answers_with_its_own_checker(tuned):
    pytest.importorskip("reasoning_gym")
    (task,) = open_tasks("gym:chain_sum", 5)
    for row in task.rows:
        numbers = row.prompt[0]["content"].rpartition("problem:")[2].partition("=")[0]
        assert (row.score(f" {eval(numbers)}\n"), row.score("")) == (1.0, 0.0)
    found = measure(tuned, [], ["gym:chain_sum"], limit=2, device="cpu")["suites"]["own"]["tasks"]
    assert found["gym:chain_sum"]["rows"] == 2 and task.protocol["floors"]["majority"] == 0.2
    with pytest.raises(ValueError, match="no data set 'chain_sun'; try gym:chain_sum"):
        open_tasks("gym:chain_sun", 1)
