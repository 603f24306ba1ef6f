"""A run folder is read whole, or refused in one line that says what to do."""
from __future__ import annotations

import json
import math

import numpy as np
import pytest

from fira.report.read import numbers, read_run


def append(run, *rows: dict | str):
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        for row in rows:
            file.write(row if isinstance(row, str) else json.dumps(row) + "\n")


def refusal(folder):
    with pytest.raises(ValueError) as error:
        read_run(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_every_kind_of_row_is_read(run_folder):
    folder = run_folder(steps=40)
    append(folder, {"kind": "reward", "step": 2, "value": 1},  # a row of another stage
           {"kind": "step", "step": 41, "loss": None, "lr": 1e-3, "grad_norm": math.inf,
            "tokens": 9, "tokens_per_second": 1.0, "seconds": 1.0, "imbalance": None},
           '{"kind": "step", "step": 42, "lo')  # torn by a kill
    run = read_run(folder)
    assert [row["step"] for row in run.steps] == list(range(1, 42))
    assert np.isnan(numbers(run.steps, "loss")[-1])
    assert len(run.validations) == len(run.routings) == 10
    assert run.samples[0]["prompt"] == "The state" and run.events[0]["text"] == "training starts"
    assert run.best == min(run.validations, key=lambda row: row["bits_per_byte"])
    assert run.name == "tiny"


def test_the_best_validation_follows_the_direction_of_its_score(run_folder):
    folder = run_folder(steps=0)
    append(folder, *({"kind": "validation", "step": step, "tokens": step, "seconds": step,
                      "score": "accuracy", "lower_is_better": False, "accuracy": accuracy}
                     for step, accuracy in enumerate((0.2, 0.7, None, 0.5))))
    assert read_run(folder).best["step"] == 1


@pytest.mark.parametrize("row, reason", [
    ('{"kind": "st\n', "Invalid"), ('{"step": 1}\n', "it has no kind"), ("3\n", "int"),
    ('{"kind": "validation", "step": 1, "tokens": 1}\n', "it has no seconds")])
def test_a_damaged_row_is_an_error_with_its_line(run_folder, row, reason):
    folder = run_folder(steps=1)
    lines = len((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    append(folder, row, {"kind": "event", "step": 1, "text": "end"})
    line = refusal(folder)
    assert f"line {lines + 1} is damaged" in line and reason in line


def test_what_is_no_run_is_refused_with_a_remedy(tmp_path, run_folder):
    run = run_folder("first")
    (run / "step-000040").mkdir()
    assert "no config.json and no metrics.jsonl" in refusal(tmp_path / "nowhere")
    assert "give a folder that" in refusal(run / "metrics.jsonl")
    assert "runs inside: first" in refusal(tmp_path)
    assert f"the whole run: {run}" in refusal(run / "step-000040")
    for text, reason in (("{", "is not valid JSON"), ("3", "holds no JSON object")):
        (run / "config.json").write_text(text)
        assert reason in (line := refusal(run)) and "; restore it" in line
