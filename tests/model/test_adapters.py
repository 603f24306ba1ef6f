"""Adapters and frozen weights: what is added, what it learns, and what stays as it is."""
from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import fira.model.fast as fast
from fira.convert.quantize import quantize
from fira.model import build_meta
from fira.model.adapter import SCALE, LowRank, adapters, attach, attach_like, hold_frozen, merge
from fira.model.initialize import initialize
from fira.model.transformer import count_parameters
from fira.parallel.layout import Layout
from fira.parallel.mesh import Mesh
from fira.train.recompute import recompute_blocks
from tests.models import NAMES, build, tiny_spec

TOKENS = torch.randint(31, (2, 12), generator=torch.Generator().manual_seed(0))
CHOSEN = ((0, 3), ())  # experts of the two layers
SHAPES = [(name, experts, fields) for name in NAMES for experts, fields in (
    (None, {}), (CHOSEN, {}), (None, {"num_experts": 1, "top_k": 1}))]


def adapt(model, experts=None, tokens=(3, 7), rank=4):
    """Adapters with values in all their parts, as after some training."""
    attach(model, rank, experts, tokens)
    generator = torch.Generator().manual_seed(1)
    for module in adapters(model).values():
        module.lora.reset_buffers()
        for parameter in module.lora.parameters():
            parameter.data.normal_(0, 0.2, generator=generator)
    return model


@pytest.mark.parametrize("name, experts, fields", SHAPES)
def test_an_adapted_model_equals_one_with_merged_weights_and_trains_only_adapters(
        name, experts, fields):
    model = adapt(build(tiny_spec(name, **fields), seed=0), experts).train()
    merged = merge(copy.deepcopy(model)).requires_grad_(True)
    assert not adapters(merged) and type(merged.blocks[0].attention.qkv) is torch.nn.Linear
    ours, theirs = model(TOKENS), merged(TOKENS)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)
    for logits in (ours, theirs):
        logits.square().mean().backward()
    for path, module in adapters(model).items():
        gradient, lora = merged.get_parameter(f"{path}.weight").grad, module.lora
        if isinstance(lora, LowRank):
            chosen = gradient if lora.experts is None else gradient[lora.experts]
            expected = SCALE * lora.b.mT @ chosen, SCALE * chosen @ lora.a.mT
            found = lora.a.grad, lora.b.grad
        else:
            expected, found = gradient[lora.tokens], lora.delta.grad
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    trained = {path for path, p in model.named_parameters() if p.grad is not None}
    assert trained == {path for path, _ in model.named_parameters() if ".lora." in path}
    assert {".".join(path.split(".")[2:5]) for path in adapters(model)} >= {
        "attention.qkv", "attention.output", "moe.experts.up", "moe.experts.down"}


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_without_training_changes_nothing_and_frozen_weights_get_no_product(
        name, monkeypatch):
    model = build(tiny_spec(name), seed=0)
    before = model(TOKENS)
    attach(model, 4, tokens=(3,))
    initialize(model, seed=3, slices=[])  # buffers only
    for module in adapters(model).values():
        for leaf, parameter in module.lora.named_parameters():
            std = module.lora.initial_std(leaf)
            parameter.data = std * torch.randn(parameter.shape)
    torch.testing.assert_close(model(TOKENS), before)

    widths, plain = [], fast.sorted_weight_gradient
    monkeypatch.setattr(fast, "sorted_weight_gradient", lambda grad, rows, counts: (
        widths.append(min(grad.shape[1], rows.shape[1])) or plain(grad, rows, counts)))
    model(TOKENS).square().mean().backward()
    assert set(widths) == {2}  # an expert's rank: no gradient of a whole matrix is computed


def test_initial_adapters_follow_their_own_rule_and_equal_seeds():
    model, again = (build_meta(tiny_spec("fira2")) for _ in range(2))
    for one in (model, again):
        attach(one, 4, CHOSEN, (3, 7))
        initialize(one.to_empty(device="cpu"), seed=3)
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
    lora = model.blocks[0].moe.experts.up.lora
    assert lora.a.shape == (2, 2, 16) and lora.experts.tolist() == [0, 3]
    assert lora.b.eq(0).all() and lora.a.std().item() == pytest.approx(16 ** -0.5, rel=0.25)
    assert not torch.equal(lora.a[0], lora.a[1])
    assert not hasattr(model.blocks[1].moe.experts.up, "lora")  # no expert of that layer is chosen
    copied = build_meta(tiny_spec("fira2"))
    attach_like(copied, model.state_dict())
    assert {n: t.shape for n, t in copied.state_dict().items()} == {
        n: t.shape for n, t in model.state_dict().items()}


@pytest.mark.parametrize("rank, experts, line", [
    (17, None, r"rank=17 is above 16, the smaller width of a matrix of \d+ x 16; give a rank of"),
    (2, ((4,), (0,)), r"experts \[4\] are not all among the 4 of a stack")])
def test_what_cannot_be_attached_is_refused(rank, experts, line):
    with pytest.raises(ValueError, match=line):
        attach(build_meta(tiny_spec("fira2")), rank, experts)


@pytest.mark.parametrize("experts", [None, CHOSEN])
def test_recomputed_blocks_give_adapters_the_same_gradients(experts):
    model = adapt(build(tiny_spec("fira2"), seed=0), experts)
    again = copy.deepcopy(model)
    recompute_blocks(again)
    for one in (model, again):
        F.cross_entropy(one.train()(TOKENS).flatten(0, 1), TOKENS.flatten()).backward()
    for (name, ours), theirs in zip(again.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)


@pytest.mark.parametrize("arch", NAMES)
def test_frozen_matrices_in_bfloat16_change_nothing_where_products_are_bfloat16(arch):
    held = copy.deepcopy(model := adapt(build(tiny_spec(arch), seed=0)))
    hold_frozen(held, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        for one in (model, held):
            F.cross_entropy(one.train()(TOKENS).flatten(0, 1), TOKENS.flatten()).backward()
    for (name, ours), theirs in zip(held.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=0, msg=name)
    assert {p.dtype for p in held.blocks[0].moe.parameters()} == {torch.float32, torch.bfloat16}


def test_a_base_that_is_read_from_a_file_is_not_drawn_before():
    attach(model := build_meta(tiny_spec("fira2")), 4)
    with mock.patch("fira.model.initialize._draw") as drawn:
        Layout(Mesh(), model)
    assert {".lora." in call[0][0].name for call in drawn.call_args_list} == {True}


@pytest.mark.parametrize("kind", ["float32", "chosen", "int8"])
def test_adapted_blocks_are_one_graph(kind):
    model = build(tiny_spec("fira2", num_layers=4), seed=0)
    model = adapt(quantize(model, "int8") if kind == "int8" else model,
                  ((0, 3), (1, 2)) * 2 if kind == "chosen" else None)
    expected = model(TOKENS)
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    for block in model.blocks:
        block.compile(fullgraph=True, backend=graphs)
    torch.testing.assert_close(model(TOKENS), expected)
    assert graphs.frame_count == 1


def test_adapters_are_counted_with_their_part():
    plain, adapted = (build_meta(tiny_spec("fira")) for _ in range(2))
    attach(adapted, 4)
    before, after = (
        {row.part: row.total for row in count_parameters(model).rows} for model in (plain, adapted))
    extra = {"experts": 2 * 2 * 4 * 2 * (16 + 24), "attention": 2 * 4 * (16 + 3 * 16 + 16 + 16)}
    assert after == {part: size + extra.get(part, 0) for part, size in before.items()}
