"""What a save writes and when; going back, stopping, averaged weights, a record that fails."""
import os
import resource
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fira import checkpoint
from fira.convert.files import load_run
from fira.model.files import WEIGHTS
from fira.parallel.layout import Layout
from fira.runlog import METRICS, read_rows
from fira.stages import run as stage
from fira.train.loop import Loop, Stopped
from fira.train.optim import OptimConfig, make_optimizer, set_rates, swap_average
from tests.stages.test_run import assert_same_run, last_step, run_micro, weights

SHORT = "train.steps=10", "train.validation_tokens=64"


def test_all_is_fsynced_before_its_rename_and_its_folder_after(preset, data_folder, tmp_path,
                                                               monkeypatch):
    """Watches fsync and rename. What counts is a file's size when it is fsynced and renamed."""
    synced, due, renamed = {}, set(), set()
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def watch_fsync(descriptor):
        fsync(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced[path.stat().st_ino] = path.stat().st_size
        due.discard(path)

    def watch(move):
        def moved(source, target):
            source, target = Path(source), Path(target)
            inside = [source, *source.rglob("*")] if source.is_dir() else [source]
            assert all(synced.get(path.stat().st_ino) == path.stat().st_size for path in inside)
            if target.name.startswith("step-"):
                record = (target.parent / METRICS).stat()
                assert synced[record.st_ino] > 0 and target.parent.parent not in due
            move(source, target)
            due.add(target.parent)
            renamed.add(target.name)
        return moved

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(os, "rename", watch(rename))
    monkeypatch.setattr(os, "replace", watch(replace))
    run = tmp_path / "new" / "run"
    run_micro(preset, data_folder, run, *SHORT)
    assert renamed >= {"config.json", METRICS, "training_log.csv", "step-000005", "step-000010"}
    assert not due
    for path in (run / METRICS, run / "config.json"):
        assert synced[path.stat().st_ino] == path.stat().st_size
    assert {run.stat().st_ino, run.parent.stat().st_ino, tmp_path.stat().st_ino} <= synced.keys()


def test_a_save_is_written_while_the_next_gradient_is_computed(preset, data_folder, undisturbed,
                                                               tmp_path, monkeypatch):
    """The weights are read where they are, and the file is what safetensors writes of them."""
    write, forward_backward = checkpoint.write_rows, Layout.forward_backward
    run, computed = tmp_path / "run", threading.Event()

    def note(layout, *arguments):
        result = forward_backward(layout, *arguments)
        if (run / ".step-000010.partial").exists():
            computed.set()
        return result

    def late(path, rows):
        assert "step-000010" not in str(path) or computed.wait(60)
        return write(path, rows)

    monkeypatch.setattr(Layout, "forward_backward", note)
    monkeypatch.setattr(checkpoint, "write_rows", late)
    run_micro(preset, data_folder, run)
    assert computed.is_set()
    assert_same_run(run, undisturbed)
    save_file(weights(run), tmp_path / WEIGHTS, metadata={"format": "pt"})
    assert (tmp_path / WEIGHTS).read_bytes() == (last_step(run) / WEIGHTS).read_bytes()


def test_going_back_sets_the_later_steps_and_their_record_aside(preset, data_folder, undisturbed,
                                                                tmp_path, fira, refused):
    run, aside = tmp_path / "run", tmp_path / "run" / "after-000010-1"
    words = "train", preset, f"data.folder={data_folder}", "--run", run, "--device", "cpu"
    assert fira(*words, "train.keep_every=10").code == 0
    before = [*read_rows(run)]
    assert [path.name for path in sorted(run.glob("step-*"))] == [
        "step-000010", "step-000015", "step-000020"]
    assert "no whole checkpoint of step 5" in refused(*words, "--resume", "--step", 5)
    said = fira(*words, "--resume", "--step", 10)
    assert said.code == 0 and f"their record are in {aside}" in said.err
    assert [*read_rows(aside)] == before and (aside / "step-000020" / WEIGHTS).is_file()
    assert_same_run(run, undisturbed)
    assert fira("check", run).code == 0 and load_run(aside).folder.name == "step-000020"
    assert "train.keep_every=8" in refused(*words[:-4], "train.keep_every=7",
                                           "train.save_every=4", "--run", "x", code=2)


def test_a_run_ends_when_its_score_no_longer_improves(preset, data_folder, tmp_path):
    """With a learning rate of nearly 0 no evaluation after the first improves."""
    run = tmp_path / "run"
    settings = ("optim.lr=1e-30", "optim.router_lr=1e-30", "model.balance=loss",
                "train.save_every=2", "train.patience=3")
    assert run_micro(preset, data_folder, run, *settings).step == 8
    assert run_micro(preset, data_folder, run, *settings, resume=True).step == 8
    rows = [row for row in read_rows(run) if row["kind"] == "stop"]
    assert [row["step"] for row in rows] == [8] and "than that of step 2" in rows[0]["text"]
    assert run_micro(preset, data_folder, run, "train.patience=null", resume=True).step == 20


def test_averaged_weights_follow_their_definition():
    model = torch.nn.Linear(3, 2)
    optimizer, expected = make_optimizer(model, OptimConfig(average=0.5)), None
    for step in range(9):
        set_rates(optimizer, step, 1.0)
        model(torch.ones(4, 3)).sum().backward()
        optimizer.step()
        decay, weights = min(0.5, (1 + step) / (10 + step)), model.weight.detach().clone()
        expected = weights if expected is None else decay * expected + (1 - decay) * weights
    assert swap_average(optimizer)
    torch.testing.assert_close(model.weight.detach(), expected)
    swap_average(optimizer)
    assert torch.equal(model.weight, weights)


def test_a_time_limit_ends_the_launch_and_averages_are_resumed_exactly(
        preset, data_folder, undisturbed, tmp_path, fira):
    """They do not change what is trained."""
    calm, run = tmp_path / "calm", tmp_path / "run"
    words = "train", preset, f"data.folder={data_folder}", "--device", "cpu", "optim.average=0.8"
    run_micro(preset, data_folder, calm, "optim.average=0.8")
    stopped = fira(*words, "--run", run, "train.stop_after_minutes=0.003")
    assert stopped.code == 124 and "stopped by train.stop_after_minutes; everything" in stopped.err
    assert fira(*words, "--run", run, "--resume", "train.stop_after_minutes=9").code == 0
    ours, theirs, last = (load_file(folder / WEIGHTS) for folder in (
        run / "average", calm / "average", last_step(undisturbed)))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not torch.equal(ours["norm.weight"], last["norm.weight"])
    assert_same_run(run, calm)
    assert torch.equal(weights(calm)["norm.weight"], last["norm.weight"])
    assert [row["step"] for row in read_rows(calm) if row["kind"] == "average"] == [20]
    assert load_run(run / "average").model.trained_length == 32


def fail(kind, folder):
    """What happens to this process when row 7 has been written."""
    if kind == "full disk":
        limit = (folder / METRICS).stat().st_size + 10
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    elif kind == "full disk of the tracker":
        raise OSError(28, "No space left on device")
    else:
        os.kill(os.getpid(), kind)


def test_a_kill_during_the_first_save_loses_nothing(preset, data_folder, undisturbed, tmp_path,
                                                    monkeypatch):
    """Also not if the evaluation beside it is on record already."""
    run, write = tmp_path / "run", Loop._evaluate
    monkeypatch.setattr(checkpoint, "write_rows", lambda *_: time.sleep(60))
    monkeypatch.setattr(Loop, "_evaluate", lambda loop: (write(loop), os._exit(9)))
    if child := os.fork():
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    else:
        run_micro(preset, data_folder, run)
    assert any(row["kind"] == "validation" for row in read_rows(run))
    monkeypatch.undo()
    run_micro(preset, data_folder, run, resume=True)
    assert_same_run(run, undisturbed)


@pytest.mark.parametrize("kind", ["full disk", "full disk of the tracker", signal.SIGUSR1,
                                  signal.SIGKILL])
def test_a_run_that_fails_while_it_writes_its_record_is_resumed(kind, preset, data_folder,
                                                                undisturbed, tmp_path, monkeypatch):
    run = tmp_path / "run"
    monkeypatch.setattr(stage, "tracker", lambda folder, *_: (
        lambda row: fail(kind, folder) if row["kind"] == "step" and row["step"] == 7 else None,))
    if child := os.fork():
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (
            -9 if kind == signal.SIGKILL else 138 if kind == signal.SIGUSR1 else 1)
    else:
        try:
            run_micro(preset, data_folder, run)
        except Stopped as stopped:
            os._exit(stopped.code)
        except ValueError as error:
            os._exit("step" not in str(error) and "--resume" in str(error))
        os._exit(0)
    monkeypatch.undo()
    run_micro(preset, data_folder, run, resume=True)
    assert_same_run(run, undisturbed)
    assert (run / "training_log.csv").read_text().count("\n") == 21
