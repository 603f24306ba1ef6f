"""A run is never lost: kills, signals, damage and full disks, each against an undisturbed run."""
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import time

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from fira.checkpoint import Checkpoints
from fira.data.prepare import prepare
from fira.data.text import texts
from fira.data.tokenizer import Tokenizer, train_tokenizer
from fira.files import find_damage
from fira.loss.head import next_token_loss
from fira.model import load_pretrained
from fira.runlog import read_rows
from fira.stages.config import modernize
from fira.stages.pretrain import TextBatches, pretrain
from fira.train.loop import Loop, Stopped

QUIET = Console(quiet=True)
TIMING = ("seconds", "tokens_per_second")


def run_micro(preset, data_folder, run, *settings, resume=False, screen=QUIET, source=None):
    return pretrain(str(preset), [f"data.folder={data_folder}", *settings], run, "cpu", resume,
                    screen, source)


def last_step(run):
    return Checkpoints(run, run).steps()[-1]


def weights(run):
    return load_file(last_step(run) / "model.safetensors")


def record(run):
    """The log without what the clock decides."""
    return [{k: v for k, v in row.items() if k not in TIMING} for row in read_rows(run)]


def assert_same_run(run, other):
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert record(run) == record(other)


def test_training_learns_and_leaves_its_files_with_the_newest_and_the_best_steps(undisturbed):
    rows = list(read_rows(undisturbed))
    losses = [row["loss"] for row in rows if row["kind"] == "step"]
    assert len(losses) == 20 and losses[-1] < losses[0] - 0.5
    assert (undisturbed / "training_log.csv").read_text().count("\n") == 21
    names = {path.name for path in last_step(undisturbed).iterdir()}
    assert names == {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json",
                     "optimizer.safetensors", "state.json", "manifest.json"}
    assert find_damage(last_step(undisturbed)) is None
    scores = {row["step"]: row["bits_per_byte"] for row in rows if row["kind"] == "validation"}
    kept = {int(path.name[5:]) for path in undisturbed.glob("step-*")}
    assert kept == {15, 20, min(scores, key=scores.get)}


def test_at_least_thirty_kills_end_in_the_same_run(preset, data_folder, tmp_path):
    settings = ("train.steps=60", "train.save_every=3")
    calm, run = tmp_path / "calm", tmp_path / "run"
    began = time.monotonic()
    os.waitpid(fork_run(preset, data_folder, calm, settings), 0)
    whole, kills, during_save = time.monotonic() - began, 0, 0
    draw = random.Random(0)
    for _ in range(400):
        child = fork_run(preset, data_folder, run, settings)
        # The first processes are killed early, so that there are many, every third of them during
        # a save; the last ones may live long enough to finish.
        if kills < 33 and kills % 3 == 0:
            wait_for_save(run, whole)
        else:
            time.sleep(draw.uniform(0.01, 0.05 if kills < 33 else 1.5) * whole)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        kills += 1
        during_save += any(run.glob(".step-*"))
    assert kills >= 30
    assert during_save >= 3
    assert_same_run(run, calm)


def wait_for_save(run, longest):
    """Until a step folder is being written (not one left by an earlier kill), `longest` at most."""
    end = time.monotonic() + longest
    for present in (True, False):
        while any(run.glob(".step-*")) is present and time.monotonic() < end:
            time.sleep(0.0002)


def fork_run(preset, data_folder, run, settings):
    """The id of a new process that trains to the end and leaves without this one's clean-up."""
    if child := os.fork():
        return child
    try:
        run_micro(preset, data_folder, run, *settings, resume=(run / "config.json").exists())
    except BaseException as error:
        print(f"child failed: {error!r}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_resume_repeats_the_undisturbed_run(
        number, preset, data_folder, undisturbed, tmp_path, monkeypatch, fira):
    run, step = tmp_path / "run", Loop._step

    def signal_in_step_eight(loop, line):
        if loop.state.step == 7 and not (run / "step-000007").exists():
            os.kill(os.getpid(), number)
        step(loop, line)

    monkeypatch.setattr(Loop, "_step", signal_in_step_eight)
    words = ("train", preset, f"data.folder={data_folder}", "--run", run, "--device", "cpu")
    stopped = fira(*words)
    assert stopped.code == 128 + number and "--resume continues it" in stopped.err
    assert last_step(run).name == "step-000007" and find_damage(last_step(run)) is None
    assert (run / "training_progress.png").is_file()
    assert "the learning rate" in fira(*words, "--resume").err
    assert_same_run(run, undisturbed)


def test_sequences_grow_also_in_a_run_that_is_stopped_and_loses_an_evaluation(
        preset, data_folder, tmp_path, monkeypatch):
    """It is stopped in step 11 and killed before the evaluation of step 14."""
    lengths, batch, step, evaluate = {}, TextBatches.batch, Loop._step, Loop._evaluate
    calm, run = tmp_path / "calm", tmp_path / "run"

    def note_length(source, state, fraction):
        found = batch(source, state, fraction)
        lengths[state.step] = found[0][0].tokens_BT.shape[1]
        return found

    def stop_in_step_eleven(loop, line):
        if loop.state.step == 10 and not (run / "step-000010").exists():
            loop.stop_signal = signal.SIGTERM
        step(loop, line)

    def lose_the_second(loop):
        if loop.state.step == 14:
            raise RuntimeError("killed")
        evaluate(loop)

    settings = ("train.first_length=8", "train.save_every=7")
    run_micro(preset, data_folder, calm, *settings)
    monkeypatch.setattr(TextBatches, "batch", note_length)
    monkeypatch.setattr(Loop, "_step", stop_in_step_eleven)
    with pytest.raises(Stopped, match="SIGTERM"):
        run_micro(preset, data_folder, run, *settings)
    assert load_pretrained(run).trained_length == 16
    monkeypatch.setattr(Loop, "_evaluate", lose_the_second)
    with pytest.raises(RuntimeError, match="killed"):
        run_micro(preset, data_folder, run, resume=True)
    monkeypatch.setattr(Loop, "_evaluate", evaluate)
    run_micro(preset, data_folder, run, resume=True)
    assert [lengths[number] for number in range(20)] == [8] * 7 + [16] * 7 + [32] * 6
    assert load_pretrained(run).trained_length == 32
    assert_same_run(run, calm)


@pytest.mark.parametrize("change", ["batch_tokens=128", "sequence_length=16"])
def test_a_run_that_is_resumed_with_other_batches_trains_on_no_text_twice(
        change, preset, data_folder, tmp_path, monkeypatch):
    seen = []

    def note(model, batch):
        seen.extend(map(tuple, batch.targets_BT.reshape(-1, 16).tolist()))
        return next_token_loss(model, batch)

    monkeypatch.setattr("fira.stages.pretrain.next_token_loss", note)
    run_micro(preset, data_folder, tmp_path / "run", "train.steps=5")
    run_micro(preset, data_folder, tmp_path / "run", f"train.{change}", "train.steps=15",
              resume=True)
    assert len(set(seen)) == len(seen) > 100


def test_texts_are_mixed_and_a_resumed_run_keeps_its_texts_and_seed(
        preset, data_folder, corpus, tmp_path, refused):
    one, other, run = data_folder, tmp_path / "other", tmp_path / "run"
    prepare([str(corpus)], other, Tokenizer.load(one), validation_every=3, workers=1)
    run_micro(preset, one, run, "data.folder=null", f"data.mix.{one}=3", f"data.mix.{other}=1",
              "data.separate_documents=true", "train.steps=5")
    step, found = (next(row for row in read_rows(run) if row["kind"] == kind and row["step"] == 5)
                   for kind in ("step", "validation"))
    names = [os.path.relpath(folder, os.path.commonpath([one, other])) for folder in (one, other)]
    assert step[f"epochs/{names[0]}"] > 2 * step[f"epochs/{names[1]}"] > 0
    scores = [found[f"bits_per_byte/{name}"] for name in names]
    assert found["bits_per_byte"] == pytest.approx(0.75 * scores[0] + 0.25 * scores[1])
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for change, line, code in ((f'data.mix={{"{one}": 1}}', "give the folder that it was begun", 1),
                               ("train.seed=2", "train.seed=2 cannot change", 2),
                               (f"data.folder={one}", "data.mix is set beside data.folder", 2),
                               ("parallel.pipeline=2", "cannot mask attention", 2)):
        assert line in refused("train", preset, "--run", run, change, "--resume", code=code)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_full_disk_stops_the_run_with_the_last_checkpoint_whole(preset, data_folder, tmp_path):
    run, before = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    run_micro(preset, data_folder, run, "train.steps=5")
    limit = (last_step(run) / "optimizer.safetensors").stat().st_size - 1000
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(ValueError, match="cannot save.*step-000005 is whole.*--resume"):
            run_micro(preset, data_folder, run, "train.steps=10", resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert last_step(run).name == "step-000005" and find_damage(last_step(run)) is None
    run_micro(preset, data_folder, run, "train.steps=10", resume=True)
    assert last_step(run).name == "step-000010"


def test_non_finite_steps_are_counted_and_several_end_the_run(preset, data_folder, tmp_path):
    with pytest.raises(ValueError, match="5 steps in a row"):
        run_micro(preset, data_folder, tmp_path / "run", "optim.lr=1e38")
    events = [row["text"] for row in read_rows(tmp_path / "run") if row["kind"] == "event"]
    assert len(events) == 5 and all("skipped" in text for text in events)


def test_data_of_another_tokenizer_of_equal_size_is_refused(preset, data_folder, corpus,
                                                            undisturbed, tmp_path):
    other = train_tokenizer((text[::-1] for text in texts([str(corpus)])), 600)
    prepare([str(corpus)], tmp_path / "data", other, validation_every=4, workers=1)
    words = "was trained with .* prepare the text again with --tokenizer"
    with pytest.raises(ValueError, match=words):
        run_micro(preset, tmp_path / "data", undisturbed, resume=True)
    with pytest.raises(ValueError, match=words):
        run_micro(preset, tmp_path / "data", tmp_path / "run", source=undisturbed)
    other.save(shutil.copytree(data_folder, tmp_path / "mixed"))
    with pytest.raises(ValueError, match=r"mixed/tokenizer.json is not the one that made its data"):
        run_micro(preset, tmp_path / "mixed", tmp_path / "run")


def test_a_new_model_has_the_rows_that_its_data_needs_unless_told(preset, data_folder, undisturbed,
                                                                 fira):
    assert len(weights(undisturbed)["token_embedding.weight"]) == 640  # for 600 tokens
    given = (preset, f"data.folder={data_folder}", "model.vocab_size=700")
    assert "model.vocab_size = 700   # preset: 600\n" in fira("train", *given, "--dry-run").out


def test_altered_data_is_found_before_training(preset, data_folder, tmp_path):
    copy = tmp_path / "data"
    shutil.copytree(data_folder, copy)
    shard = next(copy.glob("train-*.bin"))
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match="was altered"):
        run_micro(preset, copy, tmp_path / "run")
    shard.write_bytes(content[:-2])
    with pytest.raises(ValueError, match="truncated"):
        run_micro(preset, copy, tmp_path / "run")


def test_a_run_by_the_clock_ends_by_the_clock(preset, data_folder, tmp_path):
    state = run_micro(preset, data_folder, tmp_path / "run", "train.minutes=0.03")
    assert state.step > 5
    rows = [row for row in read_rows(tmp_path / "run") if row["kind"] == "step"]
    assert rows[-1]["seconds"] >= 1.8
    assert rows[-3]["seconds"] <= 1.8  # a row is written a moment after the clock was read
    assert rows[-1]["lr"] < rows[len(rows) // 3]["lr"]
    assert last_step(tmp_path / "run").name == f"step-{rows[-1]['step']:06d}"


def test_a_run_of_an_older_version_is_resumed(preset, data_folder, tmp_path):
    """Settings that are constants now are dropped, renamed ones get their new name."""
    run = tmp_path / "run"
    run_micro(preset, data_folder, run, "train.steps=10")
    record = json.loads((run / "config.json").read_text())
    record["config"]["model"] |= {"z_weight": 0.001, "init_std": 0.02}
    record["config"]["optim"] |= {"weight_decay": 0.1, "clip": 1.0, "turns": 1}
    del record["config"]["optim"]["expert_interval"]
    record["config"]["train"]["keep"] = 2
    record["config"]["parallel"] |= {"schedule": "1f1b"}
    del record["stage"]
    (run / "config.json").write_text(json.dumps(record))
    run_micro(preset, data_folder, run, "train.steps=20", resume=True)
    assert last_step(run).name == "step-000020"
    record["config"]["optim"]["clip"] = 0.5
    with pytest.raises(ValueError, match=r"begun with optim\.clip=0\.5, which is 1\.0 in every"):
        modernize(record["config"])


def test_metrics_of_a_loss_are_recorded_and_slow_experts_reported_once(
        preset, data_folder, tmp_path, monkeypatch):
    def loss_fn(model, batch):
        loss, _ = next_token_loss(model, batch)
        return loss, {"accuracy": torch.tensor(0.25)}

    monkeypatch.setattr("fira.stages.pretrain.next_token_loss", loss_fn)
    monkeypatch.setattr("fira.stages.run.grouping_obstacle", lambda *_: "too narrow")
    screen = Console(file=io.StringIO(), width=80)
    run_micro(preset, data_folder, tmp_path / "run", "train.steps=2", screen=screen)
    rows = [row for row in read_rows(tmp_path / "run") if row["kind"] == "step"]
    assert [row["accuracy"] for row in rows] == [0.25, 0.25]
    assert "accuracy" in (tmp_path / "run" / "training_log.csv").read_text().splitlines()[0]
    line = "experts are multiplied one after the other: too narrow"
    assert screen.file.getvalue().count(line) == 1
