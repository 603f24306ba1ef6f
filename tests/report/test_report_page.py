"""The page is one file that needs no other, and shows text as text."""
from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from fira.report.page import print_summary, report

HOSTILE = '<script>alert("x")</script> [bold]&amp;'


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "srcset", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def parsed(folder: Path) -> Tags:
    tags = Tags()
    tags.feed((folder / "report.html").read_text(encoding="utf-8"))
    return tags


def write_hostile_rows(folder: Path) -> None:
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        for row in ({"kind": "sample", "step": 5, "prompt": HOSTILE, "text": HOSTILE},
                    {"kind": "event", "step": 5, "text": HOSTILE}):
            file.write(json.dumps(row) + "\n")


def test_the_page_is_self_contained(run_folder: Callable[..., Path]) -> None:
    folder = run_folder(steps=20)
    written = report(folder)
    names = [path.name for path in written]
    assert names == ["report.html", "training_progress.png", "routing.png"]
    tags = parsed(folder)
    assert len(tags.links) == 2
    assert all(link.startswith("data:image/png;base64,") for link in tags.links)
    assert "max/mean" in tags.text
    assert "script" not in tags.names and "link" not in tags.names
    assert not re.search(r"https?:|@import|url\(", written[0].read_text(encoding="utf-8"))


def test_text_of_the_run_never_becomes_markup(run_folder: Callable[..., Path]) -> None:
    folder = run_folder(steps=5, preset=None, argv=[HOSTILE, "optim.lr=0.002"], commit=HOSTILE)
    write_hostile_rows(folder)
    report(folder)
    tags = parsed(folder)
    assert "script" not in tags.names
    assert tags.text.count(HOSTILE) >= 5


@pytest.mark.parametrize("options", [{"experts": 1}, {"steps": 0}, {"steps": 1}, {"experts": 128}])
def test_every_kind_of_run_has_a_page(run_folder: Callable[..., Path], options: dict) -> None:
    folder = run_folder(**{"steps": 10, **options})
    assert report(folder)[0].is_file()
    assert "Settings" in parsed(folder).text


def test_the_summary_shows_the_run_and_no_markup_of_its_own(
        run_folder: Callable[..., Path]) -> None:
    folder = run_folder(steps=10)
    write_hostile_rows(folder)
    console = Console(width=100, color_system=None)
    with console.capture() as capture:
        print_summary(folder, console)
    text = capture.get()
    assert "best bits per byte" in text and "12.3M" in text and "max/mean" in text
    assert HOSTILE in text.replace("\n", "")
