"""A student is distilled from a teacher by the verb: it learns, resumes to the bit, is refused."""
from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from fira.convert.quantize import export_run
from fira.data.prepare import prepare
from fira.data.text import texts
from fira.data.tokenizer import Tokenizer, train_tokenizer
from fira.runlog import read_rows
from fira.stages.pretrain import pretrain
from fira.stages.start import tune
from tests.stages.test_tune import talk, write

DENSE = ("model.num_experts=1", "model.top_k=1", "model.d_ff=64")
SHORT = ("train.steps=6", "train.save_every=3", "--device", "cpu")


def steps_of(run):
    return [row for row in read_rows(run) if row["kind"] == "step"]


@pytest.fixture(scope="module")
def other_tokenizer(corpus, preset, tmp_path_factory):
    """A run and a data folder made with another vocabulary."""
    folder = tmp_path_factory.mktemp("other")
    prepare([str(corpus)], folder / "other", train_tokenizer(texts([str(corpus)]), 400),
            validation_every=4, workers=1)
    pretrain(str(preset), [f"data.folder={folder / 'other'}", "train.steps=1"], folder / "run",
             "cpu", False, Console(quiet=True))
    return folder


@pytest.fixture(scope="module")
def int8(trained_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("int8") / "run"
    export_run(trained_run, folder, "int8", Console(quiet=True))
    return folder


@pytest.mark.parametrize("student", ["dense", "trimmed", "other architecture", "int8 teacher"])
def test_any_student_comes_nearer_to_its_teacher(student, trained_run, int8, preset, data_folder,
                                                 tmp_path, text_file, fira):
    run, first = tmp_path / "run", str(preset)
    given = [*DENSE, *SHORT, "train.steps=12", "--ce", "0"]
    if student == "trimmed":
        first, given = str(tmp_path / "half"), given[len(DENSE):]
        assert fira("trim", trained_run, first, "--keep", "0.5", "--text", text_file).code == 0
    if student == "other architecture":
        first = tmp_path / "other.toml"
        first.write_text(preset.read_text().replace("fira2", "fira").replace(
            "n_kv_head = 1\nhead_dim = 16\n", "").replace('balance = "handover"\n', ""))
    done = fira("distill", int8 if student == "int8 teacher" else trained_run, "--student", first,
                "--data", data_folder, "--run", run, *given)
    assert done.code == 0, done.err
    steps = steps_of(run)
    assert steps[-1]["divergence"] < 0.9 * steps[0]["divergence"] or student == "trimmed"
    assert steps[-1]["loss"] == pytest.approx(steps[-1]["divergence"], rel=1e-5)
    assert all(0 <= step["agreement"] <= 1 for step in steps)
    assert (run / "training_progress.png").is_file() and fira("check", run).code == 0


@pytest.mark.parametrize("words, code, rule", [
    (["--student", "smal"], 2, "did you mean small?"),
    (["--student", "{other}/run", "--data", "{data}"], 2, "give a student that has the teacher's"),
    (["--student", "{preset}", "--data", "{other}/other"], 2, "data prepared with --tokenizer"),
    (["--student", "{preset}", "--data", "{data}", "model.vocab_size=704"], 2,
     "is more than the 6"),
    (["--student", "{preset}", "--data", "{data}", "train.sequence_length=128",
      "train.micro_batch=2", "model.context=128"], 2,
     "more than the 64 tokens of the teacher; set train.sequence_length=64"),
    (["--student", "{preset}", "--data", "{data}", "--text", "sotu"], 2, "give --data FOLDER, or"),
    (["--student", "{preset}"], 2, "give --data FOLDER, or else --text FILES or --chat FILES"),
    (["--student", "{preset}", "--data", "{data}", "--on-policy", "0.5"], 2, "give --chat FILES"),
    (["--student", "{preset}", "--data", "{data}", "--sequence"], 2, "needs --chat FILES"),
    (["--student", "{preset}", "--chat", "sotu", "--sequence"], 1, "not trained on chat turns"),
    (["--student", "{preset}", "--chat", "sotu", "--sequence", "optim.lrr=1"], 2, "optim.lr"),
    (["--student", "{preset}", "--chat", "sotu", "--ce", "1", "--on-policy", "1"], 2, "below 1"),
    (["--student", "{preset}", "--data", "{data}", "distill.beta=1"], 2, "distill.beta"),
])
def test_what_cannot_be_distilled_is_refused(words, code, rule, trained_run, other_tokenizer,
                                             preset, data_folder, tmp_path, refused):
    given = [word.format(other=other_tokenizer, preset=preset, data=data_folder) for word in words]
    line = refused("distill", trained_run, *given, "--run", tmp_path / "new", *SHORT, code=code)
    assert rule in line
    assert not (tmp_path / "new").exists()
    if "tokenizer" in line:
        hashes = [Tokenizer.load(folder).hash[:12] for folder in (
            data_folder, other_tokenizer / "other")]
        assert all(one in line for one in hashes)


@pytest.fixture(scope="module")
def talker(trained_run, tmp_path_factory):
    """A model that answers every question with "So."."""
    folder = tmp_path_factory.mktemp("talker")
    chats = write(folder, "chats.jsonl", [talk(f"Why {n}?") for n in range(40)])
    tune(trained_run, {"tune": {"method": "full", "router": "train"},
                       "data": {"chat": [str(chats)]}}, 1.0,
         ["train.sequence_length=48", "train.batch_tokens=192", "train.micro_batch=4",
          "optim.lr=1e-2", "train.steps=40"], folder / "run", "cpu", False, Console(quiet=True))
    return folder / "run"


@pytest.fixture
def prompts(tmp_path):
    """Half of the questions have an answer that no model knows, and none has been answered."""
    return write(tmp_path, "prompts.jsonl", [
        {"messages": [{"role": "user", "content": f"Why {n}?"}], "answer": ["So.", "No."][n % 2],
         "checker": "exact"} for n in range(80)])


def test_the_teachers_right_answers_are_written_once_and_trained_on(talker, prompts, preset,
                                                                   tmp_path, fira, refused,
                                                                   monkeypatch):
    run, words = tmp_path / "run", ["distill", talker, "--student", preset, "--chat", prompts,
                                    "--sequence", "--max-new", 8, "--temperature", 0.01, *SHORT]
    written = run / "answers.jsonl"
    assert fira(*words, "--run", run, "--keep-right").code == 0
    whole = written.read_bytes()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [row["messages"][-1]["train"] for row in rows] == [True, False] * 40
    assert {row["messages"][-1]["content"] for row in rows} == {"So."}
    record = json.loads((run / "config.json").read_text())
    assert record["data"]["rows left out, without an answer to train on"] == 40
    shutil.move(run, tmp_path / "old")
    run.mkdir()
    written.write_bytes(whole[:len(whole) * 2 // 3])  # cut in the middle of a line
    line = refused(*words, "--run", tmp_path / "none", "--max-new", 64)
    assert "80 of 80 prompts are left out: they have more than the " in line
    line = refused(*words, "--run", run)
    assert "answers to other prompts, or of another teacher" in line
    monkeypatch.chdir(talker)
    words[1], words[5] = Path("."), os.path.relpath(prompts, talker)  # other words for the same
    assert fira(*words, "--run", run, "--keep-right").code == 0
    now, then = ([json.loads(line) | {"where": ""} for line in lines.splitlines()]
                 for lines in (written.read_bytes(), whole))
    assert now == then


@pytest.mark.parametrize("kind", ["text", "conversations, half of them answered by the student"])
def test_a_killed_distillation_continues_to_the_bit(kind, trained_run, talker, preset, data_folder,
                                                    tmp_path, fira, refused):
    whole, run, own = tmp_path / "whole", tmp_path / "run", kind != "text"
    chats = write(tmp_path, "chats.jsonl", [talk(f"Why {n}?") for n in range(40)])
    words = ("distill", *((talker, "--chat", chats, "--on-policy", 0.5, "--temperature", 2)
             if own else (trained_run, "--data", data_folder)), "--student", preset, *DENSE, *SHORT)
    done = fira(*words, "--run", whole)
    assert done.code == 0, done.err
    if own:
        assert "own answers: 50.0% of the sequences" in done.err
        record = json.loads((whole / "config.json").read_text())
        assert record["stage"] == "distill" and record["data"]["rows"] == 38
        assert json.loads((whole / "step-000006" / "config.json").read_text())["chat"] is True
        steps = steps_of(whole)
        assert steps[-1]["epochs/own answers"] > 0
        assert steps[-1]["divergence"] < steps[0]["divergence"]
    shutil.copytree(whole, run)
    shutil.rmtree(run / "step-000006")
    line = refused(*words, "--run", run, "--resume", "--loss", "reverse", code=2)
    assert "distill.loss=reverse cannot change when a run is resumed, which has forward" in line
    assert fira("distill", "--run", run, "--resume").code == 0
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (run / "step-000006" / name).read_bytes() == (
            whole / "step-000006" / name).read_bytes()
