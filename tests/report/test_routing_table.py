"""The routing table fits a terminal and says what the rows say."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from fira.report.page import report
from fira.report.read import read_run
from fira.report.routing import DENSE, routing_table, routing_view

HEALTH = {"step": 7, "cv": [0.71], "max_mean": [2.0], "entropy": [0.8], "dead": [1]}


def shown(thing: object, width: int = 80) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(thing)
    return capture.get()


@pytest.mark.parametrize("experts", [2, 4, 8, 9, 16, 33, 64, 65, 256])
def test_the_table_fits_eighty_columns_uncut(run_folder: Callable[..., Path], experts: int) -> None:
    text = shown(routing_view(read_run(run_folder(steps=1, experts=experts, layers=12))))
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert all(word in text for word in ("CV", "max/mean", "entropy", "dead"))


def test_loads_stand_as_percentages() -> None:
    text = shown(routing_table({"load": [[0.5, 0.25, 0.25, 0.0]], **HEALTH}))
    row = next(line for line in text.splitlines() if line.strip().startswith("0 "))
    assert row.split() == ["0", "50.0", "25.0", "25.0", "0.0", "0.71", "2.00", "0.80", "1"]


def test_bars_show_even_busy_and_dead_experts() -> None:
    load = [1 / 16] * 14 + [2 / 16, 0.0]
    text = shown(routing_table({"load": [load], **HEALTH}))
    assert "▅" * 14 + "█×" in text


def test_a_dense_run_gets_one_line_and_no_picture(run_folder: Callable[..., Path]) -> None:
    folder = run_folder(experts=1)
    assert shown(routing_view(read_run(folder))).strip() == DENSE
    report(folder)
    assert not (folder / "routing.png").exists()


@pytest.mark.parametrize("experts,steps", [(4, 1), (64, 20)])
def test_the_heat_map_is_drawn(run_folder: Callable[..., Path], experts: int, steps: int) -> None:
    picture = report(run_folder(steps=steps, experts=experts))[-1]
    assert picture.name == "routing.png" and picture.read_bytes().startswith(b"\x89PNG")
