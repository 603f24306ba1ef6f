"""Tuning on preferences: it learns, resumes exactly, is the same on two ranks, and refuses."""
import json
import multiprocessing
import os
import signal

import pytest
import torch
from rich.console import Console
from safetensors.numpy import load_file

from fira.files import sha256
from fira.model import load_pretrained
from fira.runlog import read_rows
from fira.stages import prefer
from fira.stages.tune import tune
from fira.train.loop import Loop
from tests.parallel.ranks import on_ranks

NUMBERS = "one two three four five six seven eight nine ten war peace law work land".split()
SETTINGS = ("train.sequence_length=64", "train.batch_tokens=512", "train.micro_batch=4")


def write(path, count, start=0, **changes):
    """Pairs in which the chosen answer repeats the last word of the prompt."""
    with open(path, "w") as file:
        for number in range(start, start + count):
            asked, other = (NUMBERS[number * step % len(NUMBERS)] for step in (1, 7))
            file.write(json.dumps({"prompt": f"Say {number} {asked}", "chosen": f"It is {asked}.",
                                   "rejected": f"{other} and {other} again."} | changes) + "\n")
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    return write(folder / "train.jsonl", 60), write(folder / "held_out.jsonl", 12, start=60)


def prefer_run(rank, start, files, run, *settings, method="full", resume=False):
    train, held_out = files
    sections = {"tune": {"method": method, "rank": 4, "router": "freeze"},
                "prefer": {"beta": 0.1, "normalized": False},
                "data": {"chat": [str(train)], "held_out": [str(held_out)], "skip_bad": False}}
    tune(None if resume else start, sections, 1.0, [*SETTINGS, *settings], run, "cpu", resume,
         Console(quiet=True), prefer.PREFER)


def rows(run, kind):
    return [{name: value for name, value in row.items() if "second" not in name}
            for row in read_rows(run) if row["kind"] == kind]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_held_out_pairs_are_preferred_after_a_few_steps(method, trained_run, files, tmp_path):
    rate = "optim.lr=1e-3" if method == "full" else "optim.lr=5e-3"
    run = tmp_path / "run"
    prefer_run(0, trained_run, files, run, rate, "train.steps=24", "train.save_every=12",
               method=method)
    first, last = rows(run, "step")[0], rows(run, "validation")[-1]
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)  # the model is its own reference
    assert first["accuracy"] == pytest.approx(0.5, abs=0.5) and abs(first["margin"]) < 1e-5
    assert last["accuracy"] > 0.9 and last["margin"] > 0.2 and last["loss"] < 0.6, last
    assert last["chosen_change"] > last["rejected_change"]


def die(start, files, run):
    steps = Loop._step

    def step(loop, line):
        if loop.state.step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        steps(loop, line)
    Loop._step = step
    prefer_run(0, start, files, run, *LENGTH)


LENGTH = "optim.lr=1e-3", "train.steps=7", "train.save_every=4"


def test_a_killed_run_reads_its_reference_again_and_ends_the_same(trained_run, files, tmp_path,
                                                                 monkeypatch):
    calm, run = tmp_path / "calm", tmp_path / "run"
    prefer_run(0, trained_run, files, calm, *LENGTH)
    process = multiprocessing.get_context("fork").Process(target=die, args=(trained_run, files,
                                                                            run))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL and (run / "step-000004").is_dir()
    other = write(tmp_path / "other.jsonl", 12, start=80)
    config = (run / "config.json").read_text()
    monkeypatch.setattr(prefer, "log_probabilities", None)  # nothing may be computed again
    for name, words in ((files[0], "begun with other data"), (files[1], "is not of these pairs")):
        (run / "config.json").write_text(config.replace(str(name), str(other)))
        with pytest.raises(ValueError, match=words):
            prefer_run(0, trained_run, files, run, resume=True)
    (run / "config.json").write_text(config)
    prefer_run(0, trained_run, files, run, resume=True)
    for kind in ("step", "validation"):
        assert rows(run, kind) == rows(calm, kind)
    for name in ("step-000007/model.safetensors", prefer.REFERENCE):
        assert sha256(run / name) == sha256(calm / name)


def test_two_ranks_equal_one(trained_run, files, tmp_path):
    alone, two = tmp_path / "alone", tmp_path / "two"
    settings = *LENGTH, "model.balance=loss"  # a quantile's estimate depends on the micro-batches
    prefer_run(0, trained_run, files, alone, *settings)
    on_ranks(2, prefer_run, trained_run, files, two, *settings, "train.micro_batch=2", join=False)
    for kind in ("step", "validation"):
        for ours, theirs in zip(rows(two, kind), rows(alone, kind), strict=True):
            for name in ("loss", "margin", "chosen_change", "accuracy"):
                assert ours[name] == pytest.approx(theirs[name], abs=1e-4), name
    torch.testing.assert_close(load_pretrained(two).state_dict(),
                               load_pretrained(alone).state_dict(), rtol=1e-3, atol=1e-4)
    saved = [load_file(run / prefer.REFERENCE) for run in (alone, two)]
    for name, values in saved[0].items():
        assert abs(values - saved[1][name]).max() < 1e-4 and values.min() < -1


def test_the_run_stops_with_a_line_when_chosen_answers_fall(trained_run, files, fira, tmp_path):
    answer = fira("tune", trained_run, "--prefer", files[0], "--method", "full", *SETTINGS,
                  "optim.lr=0.3", "train.steps=40", "train.save_every=4", "--device", "cpu",
                  "--run", tmp_path / "run")
    text = " ".join(answer.err.split())
    assert answer.code == 0 and "57 pairs to train on, 3 held out" in text, text
    assert "step 4: the chosen answers became less likely by" in text and "lower optim.lr" in text
    assert "stopped early at step 8: 2 evaluations were not better than the start" in text


@pytest.mark.parametrize("changes, given, code, words", [
    ({"chosen": "It is", "rejected": "It is "}, (), 1, "bad.jsonl:1: chosen and rejected are "
     "equal; correct this row, leave it out, or give --skip-bad"),
    ({"chosen": "It is", "rejected": "It is "}, ("--skip-bad",), 2, "no pair is left to train on; "
     "3 left out, at fault; give rows with prompt, chosen and rejected"),
    ({"chosen": "war and peace " * 4}, (), 2, "no pair is left to train on; 3 left out, too "
     "long for train.sequence_length=32, which holds both answers; set train.sequence_length=64"),
    ({"chosen": "war " * 90}, (), 2, "the model reads 64 tokens, the shortest pair has"),
])
def test_pairs_that_cannot_be_trained_on_are_refused_before_a_folder_is_made(
        changes, given, code, words, trained_run, refused, tmp_path):
    line = refused("tune", trained_run, "--prefer", write(tmp_path / "bad.jsonl", 3, **changes),
                   "--run", tmp_path / "run", "--device", "cpu", *given, code=code)
    assert words in line and not (tmp_path / "run").exists()


# As that of the exported model, without the newline after an answer, which TRL would score too.
TEMPLATE = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}<|im_end|>"
            "{{ '' if m.role == 'assistant' else '\\n' }}{% endfor %}"
            "{{ '<|im_start|>assistant\\n' if add_generation_prompt else '' }}")


def test_the_loss_is_that_of_trl(trained_run, files, fira, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for start, name in ((trained_run, "reference"), (tmp_path / "reference", "policy")):
        prefer_run(0, start, files, tmp_path / name, *LENGTH)
        assert fira("export", "hf", tmp_path / name, tmp_path / "hf" / name).code == 0
    policy, other = (AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf" / name, dtype=torch.float32) for name in ("policy", "reference"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf" / "policy")
    tokenizer.chat_template = TEMPLATE
    records = [json.loads(line) for line in files[1].read_text().splitlines()]
    data = [{"prompt": [{"role": "user", "content": one["prompt"]}]} | {
        key: [{"role": "assistant", "content": one[key]}] for key in ("chosen", "rejected")}
        for one in records]
    trainer = trl.DPOTrainer(policy, other, trl.DPOConfig(
        str(tmp_path / "trl"), beta=0.1, use_cpu=True, bf16=False, max_length=None, report_to=[],
        router_aux_loss_coef=0.0), processing_class=tokenizer,
        train_dataset=Dataset.from_list(data))
    batch = trainer.data_collator(list(trainer.train_dataset))
    with torch.no_grad():
        theirs = float(trainer.compute_loss(policy.eval(), batch))
    ours = rows(tmp_path / "policy", "validation")[-1]["loss"]  # by the stored reference
    assert abs(theirs - 0.6931) > 0.01 and ours == pytest.approx(theirs, abs=1e-4)
