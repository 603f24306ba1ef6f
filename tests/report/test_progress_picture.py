"""training_progress.png is drawn for every kind of run, whole or not at all."""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fira.report.plot import draw_progress, save_progress, short, smooth
from fira.report.read import read_run


def titles(folder: Path) -> list[str]:
    return [axes.get_title(loc="left") for axes in draw_progress(read_run(folder)).axes]


def change_rows(folder: Path, kind: str, **values: object) -> Path:
    """Add `values` to all rows of a kind, and take away the keys whose value is None."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    rows = [{key: value for key, value in (row | values).items() if value is not None}
            if row["kind"] == kind else row for row in rows]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    return folder


def test_a_dense_run_has_no_imbalance_panel(run_folder: Callable[..., Path]) -> None:
    sparse, dense = run_folder("sparse"), run_folder("dense", experts=1)
    assert sum("imbalance" in title for title in titles(sparse)) == 1
    assert not any("imbalance" in title for title in titles(dense))


def test_each_further_metric_of_a_step_has_a_panel(run_folder: Callable[..., Path]) -> None:
    plain = titles(run_folder("plain"))
    folder = change_rows(run_folder("more"), "step", reward=0.5, kl_divergence=-0.1, note="x")
    assert titles(folder) == [*plain, "reward", "kl divergence"]
    assert save_progress(folder).exists()


def test_a_validation_names_its_score_and_its_direction(run_folder: Callable[..., Path]) -> None:
    assert "validation bits per byte (lower is better)" in titles(run_folder("old"))
    folder = change_rows(run_folder("named"), "validation", accuracy=0.5, score="accuracy",
                         lower_is_better=False, loss=None, bits_per_byte=None)
    assert "validation accuracy (higher is better)" in titles(folder)
    assert save_progress(folder).exists()


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 200])
def test_any_length_of_run_is_drawn(run_folder: Callable[..., Path], steps: int) -> None:
    picture = save_progress(run_folder(steps=steps))
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    assert not list(picture.parent.glob("*.partial"))


def test_a_run_without_validation_or_with_a_lost_loss_is_drawn(
        run_folder: Callable[..., Path]) -> None:
    folder = run_folder(steps=20)
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if '"validation"' not in line]
    kept.append('{"kind": "step", "step": 21, "loss": null, "lr": 0, "grad_norm": null, '
                '"tokens": 344064, "tokens_per_second": 1, "seconds": 20, "imbalance": 0.1}\n')
    (folder / "metrics.jsonl").write_text("".join(kept), encoding="utf-8")
    assert save_progress(folder).exists()


def test_a_name_with_dollar_signs_is_not_mathematics(run_folder: Callable[..., Path]) -> None:
    assert save_progress(run_folder("a$\\frac$b", steps=2)).exists()


def test_a_place_that_cannot_be_written_is_one_line_and_leaves_nothing(
        run_folder: Callable[..., Path]) -> None:
    folder = run_folder(steps=1)
    (folder / "training_progress.png").mkdir()  # refuses the rename, for root too
    with pytest.raises(ValueError, match=r"cannot write .* make the folder writable"):
        save_progress(folder)
    assert not list(folder.glob(".*"))


def test_smoothing_keeps_a_straight_line() -> None:
    line = np.arange(400.0)
    assert smooth(line)[5:395] == pytest.approx(line[5:395])
    assert list(smooth(line[:3])) == [0, 1, 2]


def test_numbers_read_well() -> None:
    assert [short(n) for n in (0, 950, 12_345, 999_999, 334_740_144, 2e9)] == \
        ["0", "950", "12.3k", "1M", "335M", "2B"]
