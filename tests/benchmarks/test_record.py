"""Every benchmark can be imported; sides are timed in turns; records name what was measured."""
from __future__ import annotations

import importlib
import json
import subprocess
from pathlib import Path

import pytest
import record

PROGRAMS = [path.stem for path in Path(record.__file__).parent.glob("*.py")]


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_benchmark_can_be_imported(program):
    importlib.import_module(program)


def test_sides_take_turns_and_each_begins_a_round():
    calls = []
    seconds = record.time_in_turns({name: lambda name=name: calls.append(name) for name in "ab"},
                                   repeats=2, warm_up=1)
    assert "".join(calls) == "abbaab"
    assert {name: len(found) for name, found in seconds.items()} == {"a": 2, "b": 2}


def test_a_record_names_the_versions_of_the_peers(tmp_path):
    for command in (["init", "-q"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q",
                                     "--allow-empty", "-m", "x"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    record.append(tmp_path / "r.jsonl", {"ratio": 1.0}, {"nanoGPT": tmp_path, "nanochat": None})
    versions = json.loads((tmp_path / "r.jsonl").read_text())["versions"]
    assert len(versions["nanoGPT"]) == 40 and "nanochat" not in versions
    assert "transformers" in versions and "torch" in versions
