"""A collapsed router is noticed; an uneven one is left alone."""
import pytest
import torch

from fira.runlog import read_rows
from fira.train import loop
from fira.train.loop import describe_collapse


def health(*counts):
    load = torch.tensor(counts, dtype=torch.float64)
    relative = load / load.mean(1, keepdim=True)
    return {"load": (load / load.sum(1, keepdim=True)).tolist(),
            "cv": relative.std(1, correction=0).tolist(), "dead": (load == 0).sum(1).tolist()}


@pytest.mark.parametrize("counts, layers", [
    ([[9, 8, 7, 8], [30, 20, 10, 4]], None),
    ([[9, 8, 7, 8], [100, 1, 1, 1]], "layers 1 "),
    ([[0, 10, 10, 10], [10, 10, 10, 10]], None),
    ([[0, 0, 10, 10], [10, 0, 0, 0]], "layers 0, 1 "),
])
def test_dead_experts_and_near_total_imbalance_are_collapse(counts, layers):
    text = describe_collapse(health(*counts), top_k=1)
    assert text is None if layers is None else layers in text


def test_every_expert_chosen_is_never_collapse():
    assert describe_collapse(health([5, 5, 5]), top_k=3) is None


def test_a_run_warns_once_in_the_log_and_on_the_screen(fira, preset, data_folder, tmp_path,
                                                       monkeypatch):
    monkeypatch.setattr(loop, "COLLAPSE_STEPS", 3)
    monkeypatch.setattr(loop, "describe_collapse", lambda health, top_k: "layers 0 are bad")
    answer = fira("train", preset, f"data.folder={data_folder}", "train.steps=6", "--run",
                  tmp_path / "run", "--device", "cpu")
    events = [row for row in read_rows(tmp_path / "run") if row["kind"] == "event"]
    assert [row["step"] for row in events] == [3]
    assert "collapsed for 3 steps" in events[0]["text"]
    assert answer.err.count("layers 0 are bad") == 1
