"""fira merge --share: part of what a tuning changed, the rest from the run it began with."""
from __future__ import annotations

import json

import pytest
import torch

from fira.convert.average import average, load_whole
from fira.infer.load import load
from fira.model.files import CONFIG
from tests.convert.test_lora import tuned  # noqa: F401


@pytest.fixture
def chat(run, fira, tmp_path):
    """A full tuning of two steps on conversations, of a base that never read any."""
    folder = tmp_path / "tuning"
    folder.mkdir()
    (folder / "chats.jsonl").write_text("\n".join(
        json.dumps({"prompt": f"Add {n} and 1.", "completion": str(n + 1)}) for n in range(40)))
    answer = fira("tune", run, "--chat", folder / "chats.jsonl", "--method", "full", "--no-card",
                  "--run", folder / "chat", "train.steps=2", "optim.lr=0.1", "schedule.warmup=0")
    assert answer.code == 0, answer.err
    return folder / "chat"


def test_every_weight_is_that_share_of_the_way_but_new_tokens_are_kept_whole(chat, run, fira,
                                                                             tmp_path):
    answer = fira("merge", chat, tmp_path / "mean", "--share", 0.25)
    assert answer.code == 0 and f"0.25 of the way from {run}" in answer.err, answer.err
    base, after, mean = (load(one, "cpu") for one in (run, chat, tmp_path / "mean"))
    new = [number for name, number in base.tokenizer.added.items() if name != "<|endoftext|>"]
    old, tuned, found = (one.model.state_dict() for one in (base, after, mean))  # noqa: F811
    assert mean.model.chat and not base.model.chat
    for name, tensor in found.items():
        wanted = 0.75 * old[name] + 0.25 * tuned[name]
        if name == "token_embedding.weight":
            assert (old[name][new] - tuned[name][new]).abs().max() > 0.01
            wanted[new] = tuned[name][new]
        torch.testing.assert_close(tensor, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("which, kind", [("untied_run", None), ("run", "int8")])
def test_a_share_of_an_adapter_is_the_adapter_times_the_share(tuned, which, kind,  # noqa: F811
                                                              fira, tmp_path):
    adapted, model = tuned(which, kind)
    base = json.loads((adapted / "step-000005" / CONFIG).read_text())["base"]["path"]
    answer = fira("merge", adapted, tmp_path / "mean", "--share", 0.5, "--base", base)
    assert answer.code == 0, answer.err
    for name, parameter in model.named_parameters():
        if name.endswith(("lora.b", "lora.delta")):
            parameter.data /= 2
    ids = torch.randint(500, (2, 24))
    torch.testing.assert_close(load(tmp_path / "mean", "cpu").model(ids), model(ids),
                               rtol=1e-4, atol=1e-4)


def test_runs_that_cannot_be_averaged_are_refused(chat, run, founding_run, refused, tmp_path):
    out = tmp_path / "mean"
    assert "was trained from new weights; give --base RUN" in refused(
        "merge", run, out, "--share", 0.5, code=2)
    assert "average runs of one shape" in refused(
        "merge", chat, out, "--share", 0.5, "--base", founding_run, code=2)
    assert "needs --share" in refused("merge", chat, out, "--base", run, code=2)
    record = json.loads((chat / CONFIG).read_text())
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / CONFIG).write_text(json.dumps(record | {"from": "/nowhere/run"}))
    step = next(chat.glob("step-*"))
    (tmp_path / "moved" / step.name).symlink_to(step)
    assert "from /nowhere/run, which is gone; give --base RUN" in refused(
        "merge", tmp_path / "moved", out, "--share", 0.5, code=2)
    assert not out.exists()


def test_the_ends_are_both_models(run, untied_run):
    whole, other = load_whole(run), load_whole(run)
    for parameter in other.model.parameters():
        parameter.data += 1
    assert torch.equal(average(other.model, whole.model, 0.0, whole.tokenizer).blocks[
        0].attention.qkv.weight, whole.model.blocks[0].attention.qkv.weight)
