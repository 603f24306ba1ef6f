"""fira trim: a run with fewer experts."""
from __future__ import annotations

import json

import pytest
import torch

from fira.convert.trim import find_salient, trim
from fira.data.conversations import Row
from fira.data.packs import Packs, in_order
from fira.model import load_pretrained
from fira.model.moe import Dense
from fira.model.usage import Use, read_use
from tests.models import NAMES, build, tiny_spec


@pytest.mark.parametrize("name", NAMES)
def test_experts_that_a_text_never_uses_can_go_without_a_change(name):
    model, ids = build(tiny_spec(name, num_experts=16), 0).eval(), torch.tensor([3, 9, 27, 19, 26])
    row = Row(torch.cat([ids, ids[:1]]).numpy(), torch.arange(6).numpy() > 0)
    use = read_use(model, in_order(Packs([row], 12), 1))
    small = trim(model, find_salient(use, 16, 10))  # five tokens use at most ten
    assert (small.spec.num_experts, small.spec.top_k) == (10, 2)
    torch.testing.assert_close(small(ids[None]), model(ids[None]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kept, top_k", [([0, 2, 3], 2), ([1, 3], 2), ([2], 1)])
def test_gates_of_the_experts_that_stay_are_renormalized_and_one_expert_is_dense(name, kept, top_k):
    model = build(tiny_spec(name, balance="loss"), 0).eval()
    whole, small = model.blocks[1].moe, trim(model, [[0] * len(kept), kept]).blocks[1].moe
    x_ND = torch.randn(9, 16, generator=torch.Generator().manual_seed(0))
    router = whole.router
    gates_NK, places_NK = torch.nn.functional.linear(x_ND, router.weight, router.bias)[
        :, kept].softmax(dim=1).topk(top_k, dim=1)
    gates_NK /= gates_NK.sum(dim=1, keepdim=True)
    wanted = sum(gates_NK[:, [k]] * torch.cat([whole.experts(x_D[None], torch.arange(4).eq(
        kept[place]).long()) for x_D, place in zip(x_ND, places_NK[:, k], strict=True)])
        for k in range(top_k))
    torch.testing.assert_close(small(x_ND[None])[0], wanted, rtol=1e-4, atol=1e-5)
    assert isinstance(small, Dense) == (len(kept) == 1)
    assert isinstance(small, Dense) or small.router.load_share_E.sum().item() == pytest.approx(1)


def test_experts_stay_by_what_they_contribute_to_the_text():
    experts, norms = [0] * 3 + [1] * 9 + [2, 3], [2.0] * 3 + [1.0] * 9 + [5.0, 9.5]
    use = Use(*(torch.tensor(each)[None, :, None] for each in (experts, [0.5] * 14, norms)))
    assert find_salient(use, 4, 2) == [[1, 3]]


def test_a_trimmed_run_is_a_run(run, fira, text_file, preset, data_folder, tmp_path):
    out, one = tmp_path / "half", tmp_path / "one"
    answer = fira("trim", run, out, "--keep", "0.5", "--text", text_file, "--general", text_file)
    target, general = (line.split()[1:] for line in answer.err.splitlines()
                       if line.split()[0] in ("target", "general"))
    assert answer.code == 0 and target == general and len(target) == 4  # the same text
    kept, small = json.loads((out / "config.json").read_text())["kept"], load_pretrained(out)
    assert torch.equal(small.blocks[1].moe.experts.up.weight,
                       load_pretrained(run).blocks[1].moe.experts.up.weight[kept[1]])
    for words in (("check", out), ("export", "hf", out, tmp_path / "hf"), ("card", out),
                  ("eval", out, "--text", text_file),
                  ("train", preset, "--from", out, f"data.folder={data_folder}", "train.steps=1",
                   "--device", "cpu", "--run", tmp_path / "more"),
                  ("trim", out, one, "--keep", "0.5", "--text", text_file)):
        assert fira(*words).code == 0, words
    assert isinstance(load_pretrained(one).blocks[0].moe, Dense)
    assert "dense" in fira("trim", one, tmp_path / "no", "--keep", "0.5", "--text", text_file).err


@pytest.mark.parametrize("keep", ["0", "0.1", "1", "0.99", "nan", "-1"])
def test_a_share_that_keeps_none_or_all_is_refused(keep, run, refused, text_file, tmp_path):
    line = refused("trim", run, tmp_path / "out", f"--keep={keep}", "--text", text_file, code=2)
    assert f"--keep {keep}" in line and "from 0.25 (one) to 0.75 (all but one)" in line
    (tmp_path / "chats.jsonl").write_text(json.dumps({"prompt": "a " * 99, "completion": "b"}))
    assert "no conversation has" in refused("trim", run, tmp_path / "a", "--keep", "0.5", "--chat",
                                            tmp_path / "chats.jsonl")
    assert "give --text or --chat" in refused("trim", run, tmp_path / "a", "--keep", "0.5", code=2)
