"""Results: right, by chance, per byte, with an interval; written as they come and continued."""
from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

import fira.eval.measure as measure_module
from fira.eval.measure import best, majority, measure, unigram
from fira.eval.score import Loads, encode_rows, score
from fira.eval.suites import open_task
from fira.eval.task import make_row
from fira.files import MANIFEST, sha256, write_manifest
from fira.infer.load import load

QUESTION = {"context": "The Union is", "continuations": [" strong", " and"], "gold": 0}
CHAT = {"messages": [{"role": "user", "content": "The state"}], "answer": "x", "checker": "regex"}


def choices(*golds, ends=(" a", " bbb", " c")):
    return [make_row({"context": f"{n}", "continuations": list(ends), "gold": gold}, "row")
            for n, gold in enumerate(golds)]


@pytest.mark.parametrize("nats, right, per_byte", [
    ([1.0, 2.0, 3.0], 1.0, 0.0), ([2.0, 1.0, 3.0], 0.0, 0.0), ([2.0, 2.0, 3.0], 0.5, 0.0),
    ([1.0, 3.0, 1.0 + 1e-9], 0.5, 1 / 3), ([2.0, 2.0, 2.0], 1 / 3, 0.0), ([], None, None)])
def test_the_fewest_nats_are_the_answer_and_ties_are_shared(nats, right, per_byte):
    rows = choices(0)
    assert best(rows, [nats], [[1, 1, 1]]) == [pytest.approx(right)]
    assert best(rows, [nats], [[1, 3, 1]]) == [pytest.approx(per_byte)]


def test_floors_are_the_best_constant_answer_and_token_frequencies(tokenizer):
    pairs = [make_row({"good": f"{n} is", "bad": f"{n} are"}, "row") for n in range(3)]
    assert [majority(choices(0, 1, 2)), majority(choices(1, 1, 1, 0)), majority(pairs)] == [
        pytest.approx(1 / 3), pytest.approx(3 / 4), pytest.approx(1 / 2)]
    rows = choices(0, 0, ends=(" the", " zqx zqx"))
    nats = unigram(encode_rows(tokenizer, rows, 64).rows, tokenizer.vocab_size)
    assert best(rows, nats, [[1, 1]] * 2) == [1.0, 1.0]


@pytest.fixture
def task_file(tmp_path):
    def write(*rows, name="mine.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path
    return write


def test_a_task_of_ones_own_gives_a_table_and_one_json_object(fira, run, task_file, tmp_path):
    file, target = task_file(QUESTION, {**QUESTION, "gold": 1}, QUESTION), tmp_path / "out.json"
    shown = fira("eval", run, "--task", file, "--device", "cpu")
    assert shown.code == 0 and "mine.jsonl" in shown.out and "at chance" in shown.out, shown.err
    assert "at chance" in fira("eval", run, "--task", file, "--json", target, "--limit", 2).out
    found = json.loads(target.read_text())
    own = found["suites"]["own"]
    task = own["tasks"]["mine.jsonl"]
    assert task["n"] == 2 and sum(task["correct"]) == 1 and task["at_chance"]
    assert task["floors"]["majority"] == 0.5 and len(task["item_bits"]) == 2
    assert task["experts"]["load"] and len(task["experts"]["over_used"]) == 3
    assert sum(task["experts"]["load"][0]) == pytest.approx(1, abs=1e-4)
    assert len(own["protocol"]["sha256"]) == len(found["model_sha256"]) == 64
    assert json.loads(fira("eval", run, "--task", file, "--limit", 2, "--json").out) == found


def test_the_load_is_compared_with_that_on_general_text(run, task_file, tmp_path, data_folder):
    text, (model, tokenizer, _) = "The state of the Union", load(run, "cpu")
    (tmp_path / "text.txt").write_text(text)
    file, ids = str(task_file({"context": "", "answer": text})), tokenizer.encode(text)

    def experts(folder, *general):
        (task,) = measure(folder, [], [file], general=general)["suites"]["own"]["tasks"].values()
        return task["experts"]

    loads = Loads(model)
    with loads, torch.inference_mode():
        model(torch.tensor([[tokenizer.end_of_text, *ids]]))
    same, usual = experts(run, str(tmp_path / "text.txt")), experts(run)
    assert same["relative_to"] == str(tmp_path / "text.txt") and usual["load"] == same["load"]
    assert same["distance"] == pytest.approx((abs(loads.counts_LE / loads.counts_LE.sum(
        axis=1, keepdims=True) - same["load"]).sum(axis=1) / 2).tolist(), abs=1e-4)
    assert usual["relative_to"] == "the run's held-out text"
    assert 1 / len(ids) >= max(same["distance"]) < min(usual["distance"])
    moved = shutil.copytree(run, tmp_path / "moved")
    about = (moved / "config.json").read_text()
    for known, other in ((str(data_folder), "nowhere"), (sha256(data_folder / MANIFEST), "other")):
        (moved / "config.json").write_text(about.replace(known, other))
        assert experts(moved)["relative_to"] == "the text of training"
    with pytest.raises(ValueError, match="empty.txt has no text; give as --general a file with"):
        (tmp_path / "empty.txt").write_text("")
        experts(run, str(tmp_path / "empty.txt"))


def test_core_divides_by_tokens_and_is_centred_at_the_published_chance(run, task_file, tmp_path):
    rows = [{"question": "is it", "passage": "The state.", "answer": answer}
            for answer in (True, True, True, False, False)]
    file = task_file(*rows, name="boolq.jsonl")
    core = measure(run, ["core"], [], data=str(tmp_path))["suites"]["core"]
    assert len(core["missing"]) == 21 and {"jeopardy", "squad"} < set(core["missing"])
    (task,) = core["tasks"].values()
    assert task["centred"] == pytest.approx((task["accuracy"] - 0.62) / 0.38)
    model, tokenizer, _ = load(run, "cpu")
    asked = open_task("boolq", str(file), shots=10).rows
    given = encode_rows(tokenizer, asked, 64).rows
    means = [[cost_P2[:, 0].mean() for cost_P2 in options] for options in score(model, given)]
    assert task["correct"] == [float(np.argmin(each) == row.gold)
                               for each, row in zip(means, asked, strict=True)]
    assert len({len(tokenizer.encode(end)) for end in (" yes", " no")}) == 2  # so that it matters


def test_rows_that_are_not_read_whole_are_named(fira, run, task_file):
    long = "The state of the Union. " * 40
    shown = fira("eval", run, "--task", task_file(
        {"context": "The", "answer": " state"}, {"context": long, "answer": " It"},
        {"context": "The", "answer": f" {long}"}), "--device", "cpu").out
    assert "1 of 3 rows are longer than the model reads and lose the beginning" in shown
    assert "context: 2\n" in shown and "and are left out: 3\n" in shown


def test_an_interrupted_run_keeps_what_is_finished_and_resume_goes_on(run, task_file, tmp_path,
                                                                      monkeypatch):
    files = [str(task_file(QUESTION, name=f"{name}.jsonl")) for name in "abc"]
    whole = measure(run, [], files, device="cpu")
    target, calls = tmp_path / "out.json", []
    judge = measure_module.judge

    def interrupted(loaded, task, *others):
        calls.append(task.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return judge(loaded, task, *others)

    monkeypatch.setattr(measure_module, "judge", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure(run, [], files, target=target, device="cpu")
    assert measure(run, [], files, target=target, device="cpu", resume=True) == whole
    assert calls == ["a.jsonl", "b.jsonl", "c.jsonl", "c.jsonl"]
    measure(run, [], files, target=target, device="cpu", resume=True, limit=1)
    assert len(calls) == 4
    measure(run, [], files[:2], target=target, device="cpu", resume=True)  # another protocol
    assert len(calls) == 6


def test_chat_rows_are_answered_by_a_tuned_model_and_refused_for_another(run, task_file, refused,
                                                                         tmp_path):
    file = task_file({**CHAT, "answer": "."}, {**CHAT, "answer": "^$"})
    assert "not trained on chat turns; use a tuned model" in refused("eval", run, "--task", file)
    tuned = shutil.copytree(run, tmp_path / "tuned")
    for config in tuned.glob("step-*/config.json"):
        config.write_text(json.dumps({**json.loads(config.read_text()), "chat": True}))
        write_manifest(config.parent)
    (task,) = measure(tuned, [], [str(file)], device="cpu")["suites"]["own"]["tasks"].values()
    assert task["n"] == 2 and sum(task["correct"]) == 1 and task["bits_per_byte"] is None
    assert sum(task["experts"]["load"][0]) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("words, expected", [
    (["--suite", "mmlu"], "has none of the sets of suite mmlu; give as --data"),
    (["--task", "nowhere.jsonl"], "nowhere.jsonl"),
    (["--task", "{file}", "--resume"], "--resume continues the file of --json FILE; give both"),
    (["--task", "{file}", "--json", "{file}", "--resume"], "); leave out --resume"),
])
def test_wrong_use_is_one_line(run, task_file, refused, words, expected, tmp_path):
    file = task_file(QUESTION, QUESTION)
    line = refused("eval", run, "--data", tmp_path, *(word.format(file=file) for word in words))
    assert expected in line
