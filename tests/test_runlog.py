"""The record of a run: every row once, whatever happens."""
import csv
import sys
from types import SimpleNamespace

import pytest

from fira.runlog import TABLE, RunLog, read_rows, tracker


def write_steps(log, first, last):
    for step in range(first, last + 1):
        log.write("step", step, loss=float(step))


def test_resume_drops_what_came_after_the_checkpoint(tmp_path):
    log = RunLog(tmp_path)
    write_steps(log, 1, 4)
    log.write("validation", 4, loss=1.0, bits_per_byte=2.0)
    write_steps(log, 5, 6)
    log.close()
    log = RunLog.resume(tmp_path, 4)
    log.write("validation", 4, loss=1.0, bits_per_byte=2.0)
    write_steps(log, 5, 7)
    log.close()
    kinds = [(row["kind"], row["step"]) for row in read_rows(tmp_path)]
    assert kinds == [("step", s) for s in (1, 2, 3, 4)] + [("validation", 4)] + [
        ("step", s) for s in (5, 6, 7)]


def test_the_table_joins_a_validation_to_its_step(tmp_path):
    log = RunLog(tmp_path)
    write_steps(log, 1, 2)
    log.write("validation", 2, loss=5.0, bits_per_byte=1.5)
    write_steps(log, 3, 3)
    log.close()
    rows = list(csv.DictReader(open(tmp_path / TABLE)))
    assert [(r["step"], r["val_loss"], r["val_bits_per_byte"]) for r in rows] == [
        ("1", "", ""), ("2", "5.0", "1.5"), ("3", "", "")]


def settings(**train):
    return {"train": {"track": "none", "track_project": "fira", "track_name": None} | train}


def test_tensorboard_gets_every_step_once_also_after_a_kill(tmp_path, monkeypatch):
    """Its own purge_step hides what was sent from that step on; the rest is sent again."""
    seen = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            assert folder == str(tmp_path / "tensorboard")
            seen[:] = [event for event in seen if event[2] < purge_step]

        def add_scalar(self, name, value, step):
            seen.append((name, value, step))

        def flush(self):
            pass

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard",
                        SimpleNamespace(SummaryWriter=SummaryWriter))
    config = settings(track="tensorboard")
    log = RunLog(tmp_path, sinks=tracker(tmp_path, 0, config))
    write_steps(log, 1, 2)
    log.write("validation", 2, loss=0.5, note="text")
    write_steps(log, 3, 5)
    log = RunLog.resume(tmp_path, 2, sinks=tracker(tmp_path, 2, config))
    log.write("validation", 2, loss=0.5)
    write_steps(log, 3, 5)
    assert sorted(seen) == [("step/loss", float(step), step) for step in range(1, 6)] + [
        ("validation/loss", 0.5, 2)]


def test_wandb_continues_its_run_and_knows_the_config(tmp_path, monkeypatch):
    calls = []
    fake = SimpleNamespace(init=lambda **options: calls.append(options) or SimpleNamespace(
        log=lambda values, step: calls.append((values, step))))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = settings(track="wandb", track_project="moe")
    for step in (0, 1):
        log = RunLog.resume(tmp_path, step, sinks=tracker(tmp_path, step, config))
        write_steps(log, step + 1, step + 1)
    first, row, again, *rows = calls
    assert first == again and len(first["id"]) == 32 and first["resume"] == "allow"
    assert (first["project"], first["name"], first["config"]) == ("moe", tmp_path.name, config)
    assert [row, *rows] == [({"step/loss": loss}, loss) for loss in (1.0, 1.0, 2.0)]
    tracker(tmp_path, 0, settings(track="wandb", track_name="mine"))
    assert calls[-1]["name"] == "mine"


def test_a_tracker_that_is_not_installed_names_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"pip install 'fira-moe\[track\]'"):
        tracker(tmp_path, 0, settings(track="wandb"))
