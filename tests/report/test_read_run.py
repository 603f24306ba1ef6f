"""A run folder is read whole, or refused in one line that says what to do."""
from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fira.report.read import differences, numbers, read_run


def append(run: Path, text: str) -> None:
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(text)


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError) as error:
        read_run(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_every_kind_of_row_is_read(run_folder: Callable[..., Path]) -> None:
    run = read_run(run_folder(steps=40))
    assert [row["step"] for row in run.steps] == list(range(1, 41))
    assert len(run.validations) == len(run.routings) == 10
    assert run.samples[0]["prompt"] == "The state" and run.events[0]["text"] == "training starts"
    assert run.best == min(run.validations, key=lambda row: row["bits_per_byte"])
    assert run.name == "tiny" and run.notes == []


def test_the_best_validation_follows_the_direction_of_its_score(
        run_folder: Callable[..., Path]) -> None:
    folder = run_folder(steps=0)
    for step, accuracy in enumerate((0.2, 0.7, None, 0.5)):
        row = {"kind": "validation", "step": step, "tokens": step, "seconds": step,
               "score": "accuracy", "lower_is_better": False, "accuracy": accuracy}
        append(folder, json.dumps(row) + "\n")
    best = read_run(folder).best
    assert best and best["step"] == 1


def test_a_torn_last_line_is_left_out_and_said(run_folder: Callable[..., Path]) -> None:
    folder = run_folder(steps=5)
    append(folder, '{"kind": "step", "step": 6, "lo')
    run = read_run(folder)
    assert len(run.steps) == 5
    assert len(run.notes) == 1 and "incomplete" in run.notes[0]


def test_damage_before_the_last_line_is_an_error_with_its_line(
        run_folder: Callable[..., Path]) -> None:
    folder = run_folder(steps=1)
    lines = len((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    append(folder, '{"kind": "st\n{"kind": "event", "step": 1, "text": "end"}\n')
    assert f"line {lines + 1} is damaged" in refusal(folder)


def test_a_row_without_its_fields_is_an_error_with_its_line(
        run_folder: Callable[..., Path]) -> None:
    folder = run_folder(steps=1)
    append(folder, '{"kind": "validation", "step": 1, "loss": 2.0}\n')
    assert "needs bits_per_byte, seconds, tokens" in refusal(folder)


def test_losses_that_are_not_finite_are_read_as_nan(run_folder: Callable[..., Path]) -> None:
    folder = run_folder(steps=1)
    row = {"kind": "step", "step": 2, "loss": None, "lr": 1e-3, "grad_norm": math.inf, "tokens": 9,
           "tokens_per_second": 1.0, "seconds": 1.0, "imbalance": None, "dead": 0}
    append(folder, json.dumps(row) + "\n")
    assert np.isnan(numbers(read_run(folder).steps, "loss")[-1])


def test_rows_of_other_stages_are_passed_over(run_folder: Callable[..., Path]) -> None:
    folder = run_folder(steps=2)
    append(folder, '{"kind": "reward", "step": 2, "value": 1}\n')
    assert len(read_run(folder).steps) == 2


def test_what_is_no_run_is_refused_with_a_remedy(tmp_path: Path,
                                                 run_folder: Callable[..., Path]) -> None:
    run = run_folder("first")
    (run / "step-000040").mkdir()
    (run / "notes.txt").write_text("x")
    assert "no config.json and no metrics.jsonl" in refusal(tmp_path / "nowhere")
    assert "give a folder that" in refusal(run / "notes.txt")
    assert "runs inside: first" in refusal(tmp_path)
    assert f"the whole run: {run}" in refusal(run / "step-000040")
    for text in ("{", "3"):
        (run / "config.json").write_text(text)
        assert "holds no JSON object" in refusal(run)


def test_differences_are_from_the_preset_and_the_command_line(
        tmp_path: Path, run_folder: Callable[..., Path]) -> None:
    preset = tmp_path / "mine.toml"
    preset.write_text("[optim]\nlr = 0.001\n[train]\nsteps = 40\n")
    argv = ["fira", "train", str(preset), "optim.lr=0.002", "model.num_experts=8"]
    run = read_run(run_folder(preset=str(preset), argv=argv))
    assert differences(run) == [("model.num_experts", None, 8), ("optim.lr", 0.001, 0.002)]
    preset.unlink()
    assert ("optim.lr", None, 0.002) in differences(run)
    assert "not compared" in run.notes[0]
