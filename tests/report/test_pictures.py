"""training_progress.png and routing.png are drawn for every kind of run, whole or not at all."""
from __future__ import annotations

import json

import numpy as np
import pytest

from fira.report.page import report
from fira.report.plot import draw_progress, save_progress, short, smooth
from fira.report.read import read_run


def titles(folder):
    return [axes.get_title(loc="left") for axes in draw_progress(read_run(folder)).axes]


def change_rows(folder, kind, /, **values):
    """Add `values` to all rows of a kind, and take away the keys whose value is None."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    rows = [{key: value for key, value in (row | values).items() if value is not None}
            if row["kind"] == kind else row for row in rows]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    return folder


def test_each_further_metric_of_a_step_has_a_panel(run_folder):
    plain, dense = titles(run_folder("plain")), titles(run_folder("dense", experts=1))
    assert [title for title in plain if title not in dense] == [
        "expert imbalance (CV of load; 0 is even)"]
    folder = change_rows(run_folder("more"), "step", reward=0.5, kl_divergence=-0.1, note="x")
    assert titles(folder) == [*plain, "reward", "kl divergence"]
    assert save_progress(folder).exists()


def test_a_validation_names_its_score_and_its_direction(run_folder):
    assert "validation bits per byte (lower is better)" in titles(run_folder("old"))
    folder = change_rows(run_folder("named"), "validation", accuracy=0.5, score="accuracy",
                         lower_is_better=False, loss=None, bits_per_byte=None)
    assert "validation accuracy (higher is better)" in titles(folder)
    assert save_progress(folder).exists()


@pytest.mark.parametrize("steps", [0, 1, 2, 200])
def test_any_length_of_run_is_drawn(run_folder, steps):
    folder = run_folder("a$\\frac$b", steps=steps)  # dollar signs are not mathematics
    picture = save_progress(folder)
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    change_rows(folder, "validation", kind="other")  # no validation, and a loss that was lost
    save_progress(change_rows(folder, "step", loss=float("nan")))
    assert not list(picture.parent.glob(".*"))


@pytest.mark.parametrize("experts, steps", [(4, 1), (64, 20)])
def test_the_heat_map_is_drawn(run_folder, experts, steps):
    picture = report(run_folder(steps=steps, experts=experts))[-1]
    assert picture.name == "routing.png" and picture.read_bytes().startswith(b"\x89PNG")


def test_a_place_that_cannot_be_written_is_one_line_and_leaves_nothing(run_folder):
    folder = run_folder(steps=1)
    (folder / "training_progress.png").mkdir()  # refuses the rename, for root too
    with pytest.raises(ValueError, match=r"cannot write .* give a place that you may write to"):
        save_progress(folder)
    assert not list(folder.glob(".*"))


def test_smoothing_keeps_a_straight_line_and_large_numbers_are_shortened():
    line = np.arange(400.0)
    assert smooth(line)[5:395] == pytest.approx(line[5:395])
    assert [short(n) for n in (0, 950, 12_345, 999_999, 2e9)] == ["0", "950", "12.3k", "1M", "2B"]
