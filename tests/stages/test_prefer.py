"""Tuning on preferences: it learns, resumes exactly, is the same on two ranks, and refuses."""
import json
import multiprocessing
import os
import signal

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from fira.files import sha256
from fira.model import load_pretrained
from fira.runlog import read_rows
from fira.stages import prefer
from fira.stages.start import tune
from fira.train.loop import Loop
from tests.parallel.ranks import on_ranks

WORDS = "one two three four five six seven eight nine ten war peace law work land".split()
LENGTH = "train.sequence_length=64", "train.batch_tokens=512", "train.micro_batch=4"
# A quantile's estimate depends on the micro-batches.
SETTINGS = *LENGTH, "train.steps=15", "train.save_every=6", "model.balance=loss"


def write(path, count, start=0, **changes):
    """Pairs in which the chosen answer repeats the last word of the prompt."""
    path.write_text("\n".join(json.dumps({
        "prompt": f"Say {n} {WORDS[n % 15]}", "chosen": f"It is {WORDS[n % 15]}.",
        "rejected": f"{WORDS[n * 7 % 15]} and so on."} | changes)
        for n in range(start, start + count)))
    return path


def prefer_run(rank, start, files, run, *settings, method="full", resume=False):
    sections = {"tune": {"method": method, "rank": 4, "router": "freeze"},
                "prefer": {"normalized": False},
                "data": {"chat": [str(files[0])], "held_out": [str(files[1])]}}
    rate = "optim.lr=1e-3" if method == "full" else "optim.lr=5e-3"
    tune(None if resume else start, sections, 1.0, [*SETTINGS, rate, *settings], run, "cpu",
         resume, Console(quiet=True), prefer.PREFER)


@pytest.fixture(scope="module")
def made(trained_run, tmp_path_factory):
    """Files of pairs to train on and to evaluate on, and a run that has read them."""
    folder = tmp_path_factory.mktemp("pairs")
    files = write(folder / "train.jsonl", 60), write(folder / "held_out.jsonl", 12, start=60)
    prefer_run(0, trained_run, files, folder / "run")
    return files, folder / "run"


def rows(run, kind):
    return [{name: value for name, value in row.items() if "second" not in name}
            for row in read_rows(run) if row["kind"] == kind]


def test_held_out_pairs_are_preferred_after_a_few_steps(trained_run, made, tmp_path):
    prefer_run(0, trained_run, made[0], tmp_path / "run", method="lora")
    for run in (made[1], tmp_path / "run"):
        first, last = rows(run, "step")[0], rows(run, "validation")[-1]
        assert first["loss"] == pytest.approx(0.693147, abs=1e-5)  # its own reference
        assert last["accuracy"] > 0.9 and last["loss"] < 0.65, last
        assert last["chosen_change"] > last["rejected_change"]


def die(start, files, run):
    step = Loop._step
    Loop._step = lambda loop, line: (os.kill(os.getpid(), signal.SIGKILL) if loop.state.step == 8
                                     else step(loop, line))
    prefer_run(0, start, files, run)


def test_a_killed_run_reads_its_reference_again_and_ends_the_same(trained_run, made, tmp_path,
                                                                 monkeypatch):
    (files, calm), run = made, tmp_path / "run"
    other = write(tmp_path / "other.jsonl", 12, start=80)
    process = multiprocessing.get_context("fork").Process(
        target=die, args=(trained_run, files, run))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL and (run / "step-000006").is_dir()
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
    for name in ("step-000015/model.safetensors", prefer.REFERENCE):
        assert sha256(run / name) == sha256(calm / name)


def test_two_ranks_equal_one(trained_run, made, tmp_path):
    (files, calm), run = made, tmp_path / "run"
    on_ranks(2, prefer_run, trained_run, files, run, "train.micro_batch=2", join=False)
    for ours, theirs in zip(rows(run, "validation"), rows(calm, "validation"), strict=True):
        for name in ("loss", "margin", "chosen_change", "accuracy"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-4), name
    for read in (lambda of: load_pretrained(of).state_dict(), lambda of: load_file(
            of / prefer.REFERENCE)):
        torch.testing.assert_close(read(run), read(calm), rtol=1e-3, atol=1e-4)


def test_the_run_stops_with_a_line_when_chosen_answers_fall(trained_run, made, fira, tmp_path):
    answer = fira("tune", trained_run, "--prefer", made[0][0], "--method", "full", *LENGTH,
                  "optim.lr=0.3", "train.steps=40", "train.save_every=4", "--device", "cpu",
                  "--run", tmp_path / "run")
    text = " ".join(answer.err.split())
    assert answer.code == 0 and "57 pairs to train on, 3 held out" in text, text
    assert "step 4: the chosen answers became less likely by" in text and "lower optim.lr" in text
    assert "stopped early at step 8: 2 evaluations were not better than the start" in text


@pytest.mark.parametrize("chosen, given, code, words", [
    ("So.", (), 1, "bad.jsonl:1: chosen and rejected are equal; correct this row, leave it out"),
    ("So.", ("--skip-bad",), 2, "3 left out, at fault; give rows with prompt, chosen and rejected"),
    ("war and peace " * 4, (), 2, "no pair of bad.jsonl is left; 3 left out, too long for "
     "train.sequence_length=32, which holds both answers; set train.sequence_length=64"),
    ("war " * 90, (), 2, "the model reads 64 tokens, the shortest pair has")])
def test_pairs_that_cannot_be_trained_on_are_refused_before_a_folder_is_made(
        chosen, given, code, words, trained_run, refused, tmp_path):
    bad = write(tmp_path / "bad.jsonl", 3, chosen=chosen, rejected="So. ")
    assert words in refused("tune", trained_run, "--prefer", bad, "--run", tmp_path / "run",
                            *given, code=code)
    assert not (tmp_path / "run").exists()


def test_the_loss_is_that_of_trl(made, fira, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (files, calm), models = made, []
    prefer_run(0, calm, files, tmp_path / "policy")
    for run in (tmp_path / "policy", calm):
        assert fira("export", "hf", run, tmp_path / "hf" / run.name).code == 0
        models.append(AutoModelForCausalLM.from_pretrained(tmp_path / "hf" / run.name,
                                                           dtype=torch.float32))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf" / "policy", eos_token="<|im_end|>")
    head = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"  # TRL's text forms end in eos
    data = [one | {"prompt": head.format(one["prompt"])}
            for one in map(json.loads, files[1].read_text().splitlines())]
    trainer = trl.DPOTrainer(*models, trl.DPOConfig(
        str(tmp_path / "trl"), beta=0.1, use_cpu=True, bf16=False, max_length=None, report_to=[],
        router_aux_loss_coef=0.0), processing_class=tokenizer,
        train_dataset=Dataset.from_list(data))
    with torch.no_grad():
        theirs = float(trainer.compute_loss(models[0].eval(), trainer.data_collator(
            list(trainer.train_dataset))))
    ours = rows(tmp_path / "policy", "validation")[-1]["loss"]  # by the stored reference
    assert abs(theirs - 0.6931) > 0.01 and ours == pytest.approx(theirs, abs=1e-4)
