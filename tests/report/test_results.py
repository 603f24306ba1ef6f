"""A report shows the results of the newest weights, names others, and refuses damaged ones."""
from __future__ import annotations

import json

import pytest
from rich.console import Console

from fira.report.page import print_summary, report
from tests.report.test_page import Tags

TASK = {"n": 200, "bits_per_byte": 2.5, "accuracy": 0.75, "accuracy_per_byte": 0.7,
        "interval": [0.685, 0.805], "floors": {"majority": 0.5, "unigram": 0.6, "random": 0.4},
        "at_chance": False, "centred": 0.5, "experts": None}
SUITE = {"protocol": {"sha256": "1" * 64}, "tasks": {"blimp/passive": TASK, "chance": {
    **TASK, "bits_per_byte": 3.5, "at_chance": True}}, "missing": ["winograd"]}


@pytest.fixture
def measured(run_folder):
    """A run of two steps, and what a page and a terminal show beside a results file."""
    folder = run_folder(steps=10)
    for step, weights in ((5, "old"), (10, "new")):
        (folder / f"step-{step:06d}").mkdir()
        (folder / f"step-{step:06d}" / "manifest.json").write_text(
            json.dumps({"files": {"model.safetensors": {"sha256": weights, "bytes": 1}}}))

    def show(**content):
        (folder / "eval-x.json").write_text(json.dumps(content))
        console = Console(width=80, color_system=None)
        with console.capture() as capture:
            print_summary(folder, console)
        return Tags(report(folder)[0]).text, capture.get()
    return show


def test_suites_of_the_newest_weights_are_on_the_page_and_the_terminal(measured):
    page, screen = measured(model_sha256="new", suites={"blimp": SUITE})
    rows = {line.split()[0]: line.split() for line in page.splitlines() if line.strip()}
    assert rows["passive"] == "passive 200 2.500 75.0 68.5 80.5 50.0 50.0 60.0 40.0".split()
    assert rows["chance"][-2:] == ["at", "chance"] and "without winograd" in page
    means = "3.000 bits per byte, accuracy 75.0, centred 50.0, 1 of 2 tasks at chance"
    assert f"blimp (eval-x.json, protocol {'1' * 12}): {means}" in page
    assert f"blimp: {means}" in " ".join(screen.split())


@pytest.mark.parametrize("content, told", [
    ({"model_sha256": "old", "suites": {"blimp": SUITE}}, "eval-x.json: of other weights"),
    ({"bits_per_byte": 1.0}, ""), ({}, "")])
def test_other_files_are_named_or_no_results_of_tasks(measured, content, told):
    page, screen = measured(**content)
    assert "passive" not in page + screen and (told in page and told in screen)
    assert ("Results on tasks" in page) == bool(told)


@pytest.mark.parametrize("suites", [[], {"a": 1}, {"a": {"tasks": {"b": {"n": 1}}}},
                                    {"a": {"tasks": {"b": {**TASK, "accuracy": "x"}}}},
                                    {"a": {"tasks": {"b": TASK}}}])
def test_a_file_that_cannot_be_shown_is_named(measured, suites):
    with pytest.raises(ValueError, match=r"eval-x.json has a suite.* measure again with fira eval"):
        measured(model_sha256="new", suites=suites)
