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


def test_the_table_is_rebuilt_on_resume(tmp_path):
    log = RunLog(tmp_path)
    write_steps(log, 1, 5)
    log.close()
    RunLog.resume(tmp_path, 3).close()
    assert [row["step"] for row in csv.DictReader(open(tmp_path / TABLE))] == ["1", "2", "3"]


def test_a_tracker_receives_the_numbers_of_every_row(tmp_path, monkeypatch):
    seen = []

    class SummaryWriter:
        def __init__(self, folder):
            seen.append(folder)

        def add_scalar(self, name, value, step):
            seen.append((name, value, step))

        def flush(self):
            pass

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard",
                        SimpleNamespace(SummaryWriter=SummaryWriter))
    log = RunLog(tmp_path, sinks=tracker("tensorboard", tmp_path))
    log.write("step", 3, loss=1.5, note="text")
    log.close()
    assert seen == [str(tmp_path / "tensorboard"), ("step/loss", 1.5, 3)]


def test_a_tracker_that_is_not_installed_names_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"pip install 'fira-moe\[track\]'"):
        tracker("wandb", tmp_path)
