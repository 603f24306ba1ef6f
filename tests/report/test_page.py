"""The page is one file that needs no other and shows text as text; the table fits a terminal."""
from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from fira.report.page import print_summary, report
from fira.report.read import read_run
from fira.report.routing import DENSE, routing_table, routing_view

HOSTILE = '<script>alert("x")</script> [bold]&amp;'


class Tags(HTMLParser):
    def __init__(self, page: Path):
        super().__init__()
        self.names: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]):
        self.names.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "srcset", "href")]

    def handle_data(self, data: str):
        self.text += data


def shown(thing: object):
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(thing)
    return capture.get()


def test_the_page_is_self_contained(run_folder):
    written = report(run_folder(steps=20))
    names = [path.name for path in written]
    assert names == ["report.html", "training_progress.png", "routing.png"]
    tags = Tags(written[0])
    assert len(tags.links) == 2
    assert all(link.startswith("data:image/png;base64,") for link in tags.links)
    assert "max/mean" in tags.text and '"num_experts": 8' in tags.text and "2.13.0" in tags.text
    assert "script" not in tags.names and "link" not in tags.names
    assert not re.search(r"https?:|@import|url\(", written[0].read_text(encoding="utf-8"))


def test_text_of_the_run_never_becomes_markup(run_folder):
    folder = run_folder(steps=5, commit=HOSTILE)
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        for row in ({"kind": "sample", "step": 5, "prompt": HOSTILE, "text": HOSTILE},
                    {"kind": "event", "step": 5, "text": HOSTILE}):
            file.write(json.dumps(row) + "\n")
    tags = Tags(report(folder)[0])
    assert "script" not in tags.names
    assert tags.text.count(HOSTILE) == 4
    console = Console(width=100, color_system=None)
    with console.capture() as capture:
        print_summary(folder, console)
    text = capture.get()
    assert "best bits per byte" in text and "12.3M" in text and "max/mean" in text
    assert HOSTILE in text.replace("\n", "")


@pytest.mark.parametrize("options", [{"experts": 1}, {"steps": 0}, {"steps": 1}, {"experts": 128}])
def test_every_kind_of_run_has_a_page(run_folder, options):
    folder = run_folder(**{"steps": 10, **options})
    assert "Settings" in Tags(report(folder)[0]).text
    dense = options.get("experts") == 1
    assert (shown(routing_view(read_run(folder))).strip() == DENSE) == dense
    assert (folder / "routing.png").exists() == (not dense and options.get("steps") != 0)


@pytest.mark.parametrize("experts", [2, 8, 32, 33, 256])
def test_the_table_fits_eighty_columns_uncut(run_folder, experts):
    text = shown(routing_view(read_run(run_folder(steps=1, experts=experts, layers=12))))
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text and (" of 256 " in text) == (experts == 256)
    assert all(word in text for word in ("CV", "max/mean", "entropy", "dead"))


def test_bars_show_dead_even_and_much_used_experts():
    load = [1 / 16] * 7 + [2 / 16, 0.0] + [1 / 16] * 7
    text = shown(routing_table({"load": [load], "step": 7, "cv": [0.71], "max_mean": [2.0],
                                "entropy": [0.8], "dead": [1]}))
    row = next(line for line in text.splitlines() if "×" in line)
    assert row.split() == ["0", "×" + "▅" * 14 + "█", "0.71", "2.00", "0.80", "1"]
