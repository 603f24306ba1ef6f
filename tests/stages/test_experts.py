"""Tuning chosen experts only, and what happens to the routers of a model that is tuned."""
from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open

from fira.config import parse
from fira.data.conversations import Row
from fira.data.packs import Packs, in_order
from fira.model import load_pretrained
from fira.model.moe import MoE
from fira.model.router import METHODS, Watch, end_step, routers
from fira.model.usage import read_use
from fira.stages.choice import parse_experts, prepare_router
from fira.stages.tune import TuneConfig, open_data
from tests.models import NAMES, build, build_moe, tiny_spec


@pytest.fixture
def words(run, tmp_path):
    """The command that tunes `run` for two steps in the folder `tuned`."""
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(
        {"prompt": f"After {n}?", "completion": f"It is {n + 1}."}) + "\n" for n in range(40)))
    return ("tune", run, "--chat", tmp_path / "chats.jsonl", "--device", "cpu", "--no-card",
            "--run", tmp_path / "tuned", "train.steps=2", "train.sequence_length=64",
            "train.batch_tokens=256", "optim.lr=0.02")


def record(tmp_path):
    return parse(TuneConfig, json.loads((tmp_path / "tuned/config.json").read_text())["config"])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("context", [False, True])
def test_the_use_of_experts_in_packed_rows_is_that_of_rows_read_alone(name, context):
    model, wanted = build(tiny_spec(name), 1).eval().requires_grad_(False), torch.zeros(3, 2, 4)
    rows = [Row(np.arange(size) % 31, np.arange(size) > size // 2) for size in (9, 4, 7, 3)]
    use = read_use(model, in_order(Packs(rows, 12), 2), context)
    read = []
    for part in (part for part in model.modules() if isinstance(part, MoE)):
        part.register_forward_pre_hook(lambda part, x: read.append((part.experts, x[0][0])))
    for row in rows:
        read.clear()
        with Watch(model) as watch:
            model(torch.tensor(row.ids[None, :-1]))
        for layer, (experts, x_TD) in enumerate(read):
            for place, x_D in enumerate(x_TD):
                if row.trained[place + 1] or (context and place):
                    for expert, gate in zip(watch.experts[layer][place], watch.gates[layer][place],
                                            strict=True):
                        norm = experts(x_D[None], torch.arange(4).eq(expert).long()).norm()
                        wanted[:, layer, expert] += torch.stack([gate / gate, gate, gate * norm])
    found = [use.total(values, 4).float() for values in (
        torch.ones_like(use.gates_LNK), use.gates_LNK, use.gates_LNK * use.norms_LNK)]
    torch.testing.assert_close(torch.stack(found), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share", ["0.5", "random:0.5"])
def test_experts_that_are_not_chosen_stay_to_the_bit(share, words, run, fira, tmp_path):
    answer = fira(*words, "--method", "experts", "--experts", share)
    assert answer.code == 0 and "layer 1: " in answer.err, answer.err
    chosen, use = record(tmp_path).tune.chosen, read_use(
        load_pretrained(run), in_order(open_data(record(tmp_path)).data.train, 4))
    used_most = use.total(use.gates_LNK, 4).topk(2, dim=1).indices.sort(dim=1).values.tolist()
    assert [len(layer) for layer in chosen] == [2, 2] and (share != "0.5" or chosen == used_most)
    before, after = (load_pretrained(one) for one in (run, tmp_path / "tuned"))
    for layer, experts in enumerate(chosen):
        old, new = (model.blocks[layer].moe.experts.state_dict() for model in (before, after))
        for name, weight in old.items():
            changed = [not torch.equal(*pair) for pair in zip(weight, new[name], strict=True)]
            assert changed == [expert in experts for expert in range(4)], name
    with safe_open(tmp_path / "tuned/step-000002/optimizer.safetensors", "pt") as file:
        moments = {key: file.get_slice(key).get_shape() for key in file.keys()}
    assert {shape[0] for key, shape in moments.items() if ".experts." in key and shape} == {2}
    assert fira("tune", "--resume", "--no-card", "--run", tmp_path / "tuned",
                "train.steps=3").code == 0 and record(tmp_path).tune.chosen == chosen


@pytest.mark.parametrize("share", ["0", "0.1", "1.01", "-1", "nan", "a quarter", "random:0"])
def test_a_share_that_gives_no_expert_is_refused(share, words, refused, tmp_path):
    line = refused(*words, "--method", "experts", f"--experts={share}", code=2)
    assert f"--experts {share}" in line and not (tmp_path / "tuned").exists()
    assert "needs --method experts" in refused(*words, f"--experts={share}", code=2)


@pytest.mark.parametrize("text, experts, ranks, found", [
    ("0.25", 4, 1, (False, 1)), ("random", 64, 1, (True, 16)), ("random:0.1", 64, 1, (True, 6)),
    ("0.25", 1, 1, "dense.*--method lora")])
def test_how_many_experts_are_chosen(text, experts, ranks, found):
    config = SimpleNamespace(tune=SimpleNamespace(experts=text), model=SimpleNamespace(
        num_experts=experts), parallel=SimpleNamespace(expert=ranks))
    if isinstance(found, tuple):
        assert parse_experts(config) == found
        return
    with pytest.raises(ValueError, match=found):
        parse_experts(config)


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("train", [False, True])
def test_a_frozen_router_adds_no_loss_and_keeps_its_bias_and_a_trained_one_is_balanced(method,
                                                                                        train):
    moe = build_moe(method, balance_weight=1.0, z_weight=0.001).train()
    router, uneven = routers(moe)[0], torch.tensor([0.7, 0.1, 0.1, 0.1])
    router.load_share_E.copy_(uneven)
    if router.selection_bias_E is not None:
        router.selection_bias_E.copy_(uneven - 0.25)
    prepare_router(router, train)
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    moe(x[None]).square().sum().backward()
    gradient, x.grad = x.grad, None
    moe.eval()(x[None]).square().sum().backward()  # without the router's own losses
    end_step(moe)
    assert torch.equal(gradient, x.grad) != train
    assert (router.weight.grad is not None) == train
    if router.selection_bias_E is not None:
        moved = not torch.equal(router.selection_bias_E, uneven - 0.25)
        assert moved == (train and method in ("bias", "quantile"))


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("router", ["freeze", "train"])
def test_routers_of_a_tuned_run_change_only_if_they_are_trained(method, router, words, run, fira,
                                                                tmp_path):
    assert fira(*words, "--method", method, "--router", router).code == 0
    before, after = (routers(load_pretrained(one))[1].state_dict()
                     for one in (run, tmp_path / "tuned"))
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed - {"load_share_E"} == ({"weight"} if router == "train" else set())
