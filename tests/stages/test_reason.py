"""The showcase in its smallest form: every model has a run, and an interrupted one goes on."""
from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from fira.config import ConfigError
from fira.report.page import report
from fira.stages import reason as showcase
from fira.stages import rl
from fira.stages.reason import Size, reason

RUNS = ("think", "student", "gold-student", "rl", "more")
SMALL = ("model.d_model=32", "model.n_head=2", "model.n_kv_head=1", "model.head_dim=16",
         "model.num_layers=2", "model.d_ff=32", "model.num_experts=4")


def play(out, tasks=("deduce",), resume=False, settings=SMALL, **given):
    reason(out, tasks, *(given.get(name) for name in ("depth", "base")), True, settings, "cpu",
           resume, Console(quiet=True))


@pytest.fixture(scope="module")
def small(corpus):
    """Sizes with which it takes seconds, and tasks of which no answer is certain."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(showcase, "TEXT", str(corpus))
        patch.setattr(showcase, "QUICK", Size(1, 2, 400, 60, 40, 8, 2, 1, 10, 4))
        patch.setattr(showcase, "EDGE", (-1.0, 1.0))
        patch.setattr(rl, "FIRST", 16)
        patch.setattr(rl, "HARDEST", 0.0)
        yield


@pytest.fixture(scope="module")
def shown(small, tmp_path_factory):
    out = tmp_path_factory.mktemp("reason") / "out"
    play(out)
    return out


def test_every_model_is_a_run_and_is_on_the_card(shown):
    card = json.loads((shown / "reason.json").read_text())
    assert tuple(card["models"]) == RUNS
    assert all(list((shown / name).glob("step-*/manifest.json")) for name in RUNS)
    cells = card["models"]["think"]["tasks"]
    assert [*cells] == ["deduce:2", "deduce:3"]  # no form of depth 1 is of the test split
    assert all({"think", "direct", "swapped", "sampled", "floors"} == {*one}
               for one in cells.values())
    active = [card["models"][name]["active"] for name in RUNS]
    assert active[1] == active[2] and active[0] == active[3] == active[4]
    assert len(card["goals"]) == 4
    page = report(shown / "think")[0].read_text()
    assert "<h2>Reasoning</h2>" in page and "deduce:2" in page


def test_an_interrupted_showcase_goes_on_with_what_is_missing(shown, tmp_path):
    out = shutil.copytree(shown, tmp_path / "out")
    card = json.loads((out / "reason.json").read_text())
    whole = json.loads(json.dumps(card))
    del card["seconds"]["card"], card["goals"], card["models"]["student"], card["models"]["rl"]
    (out / "reason.json").write_text(json.dumps(card))
    before = [path.stat().st_mtime_ns for path in sorted(out.rglob("metrics.jsonl"))]
    play(out, (), True, ())
    again = json.loads((out / "reason.json").read_text())
    assert [path.stat().st_mtime_ns for path in sorted(out.rglob("metrics.jsonl"))] == before
    assert again["goals"] == whole["goals"] and again["models"] == whole["models"]


@pytest.mark.parametrize("given, message", [
    ({}, "already holds a showcase; --resume goes on with it"),
    ({"resume": True, "tasks": ["swap"]}, "was begun with tasks .*'deduce'.*, not .*'swap'"),
    ({"resume": True, "depth": 3}, "was begun with depth 1, not 3; leave that out to resume"),
    ({"tasks": ["dedce"]}, "--tasks dedce is none of runsum.*; try deduce"),
    ({"settings": ["train.seed=x"]}, "train.seed"),
    ({"settings": ["model.d_model=32"], "base": Path("run")}, "is a setting of the base, which"),
    ({"depth": 9}, "the depths of deduce are 1 to 8; try deduce:1-8")])
def test_another_showcase_is_refused_in_one_line(shown, given, message):
    with pytest.raises((ValueError, ConfigError), match=message) as error:
        play(shown, **given)
    assert "\n" not in str(error.value)
