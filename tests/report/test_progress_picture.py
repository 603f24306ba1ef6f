"""training_progress.png is drawn for every kind of run, whole or not at all."""
from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from fira.report.plot import duration, progress_figure, save_progress, short, smooth
from fira.report.read import read_run


def titles(folder: Path) -> list[str]:
    return [axes.get_title(loc="left") for axes in progress_figure(read_run(folder)).axes]


def test_a_dense_run_has_no_imbalance_panel(run_folder: Callable[..., Path]) -> None:
    sparse, dense = run_folder("sparse"), run_folder("dense", experts=1)
    assert sum("imbalance" in title for title in titles(sparse)) == 1
    assert not any("imbalance" in title for title in titles(dense))


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


def test_smoothing_keeps_a_straight_line_and_passes_over_gaps() -> None:
    line = [float(value) for value in range(400)]
    middle = smooth(line)[:395]
    assert middle == pytest.approx(line[:395])
    assert smooth([1.0, math.nan, 3.0])[::2] == [1.0, 3.0]
    gap = smooth([2.0] * 100 + [math.inf] + [2.0] * 100)
    assert gap == pytest.approx([2.0] * 201)


def test_numbers_and_times_read_well() -> None:
    assert [short(n) for n in (0, 950, 12_345, 999_999, 334_740_144, 2e9)] == \
        ["0", "950", "12.3k", "1M", "335M", "2B"]
    assert [duration(s) for s in (0.2, 45, 290, 3600, 12_000, 190_000)] == \
        ["0 s", "45 s", "4 min 50 s", "1 h", "3 h 20 min", "2 d 4 h"]
