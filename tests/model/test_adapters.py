"""Extra parameters and frozen weights: what adapters need of the model."""
from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fira.model import build, build_meta, load_pretrained
from fira.model.files import save_weights
from fira.model.fira import FIRA
from fira.model.initialize import initialize, whole
from fira.model.moe import ExpertLinear
from fira.model.transformer import count_parameters
from tests.models import NAMES, tiny_spec

RANK = 2
TOKENS = torch.randint(31, (2, 12), generator=torch.Generator().manual_seed(0))


class Adapted(nn.Module):
    """W x + B A x around a linear or an expert linear, whose own parameters are frozen."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        *experts, width_out, width_in = inner.weight.shape
        self.inner = inner.requires_grad_(False)
        self.a = nn.Parameter(inner.weight.new_empty(*experts, RANK, width_in))
        self.b = nn.Parameter(inner.weight.new_empty(*experts, width_out, RANK))

    @property
    def weight(self):
        return self.inner.weight + self.b @ self.a

    @property
    def bias(self):
        return self.inner.bias

    def initial_std(self, leaf):
        return {"a": 0.5, "b": 0.0}[leaf]

    def forward(self, x, counts_E=None):
        if counts_E is None:
            return self.inner(x) + x @ self.a.T @ self.b.T
        parts = zip(x.split(counts_E.tolist()), self.a, self.b, strict=True)
        return self.inner(x, counts_E) + torch.cat([rows @ a.T @ b.T for rows, a, b in parts])


def adapt(model):
    for name, module in list(model.named_modules()):
        if type(module) in (nn.Linear, ExpertLinear):
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, Adapted(module))
    return model


@pytest.mark.parametrize("name", NAMES)
def test_an_adapted_model_equals_one_with_merged_weights_and_trains_only_adapters(name):
    model = build(tiny_spec(name), seed=0)
    merged = copy.deepcopy(model)
    adapters = [one for one in whole(adapt(model).named_parameters()) if one.name[-1] in "ab"]
    initialize(model, seed=0, slices=adapters)
    torch.testing.assert_close(model(TOKENS), merged(TOKENS))  # B begins at 0
    with torch.no_grad():
        for path, module in model.named_modules():
            if isinstance(module, Adapted):
                module.b.normal_(0, 0.2)
                merged.get_parameter(f"{path}.weight").copy_(module.weight)
    ours, theirs = model.train()(TOKENS), merged.train()(TOKENS)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    ours.square().mean().backward()
    theirs.square().mean().backward()
    for path, module in model.named_modules():
        if isinstance(module, Adapted):
            gradient = merged.get_parameter(f"{path}.weight").grad
            torch.testing.assert_close(module.a.grad, module.b.mT @ gradient, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(module.b.grad, gradient @ module.a.mT, rtol=1e-3, atol=1e-5)
            assert module.inner.weight.grad is None


def test_initial_adapters_follow_their_own_rule_and_equal_seeds():
    model, again = (adapt(build_meta(tiny_spec("fira2"))).to_empty(device="cpu") for _ in range(2))
    for one in (model, again):
        initialize(one, seed=3)
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    adapter = model.blocks[0].moe.experts.up
    assert adapter.b.eq(0).all() and adapter.a.std().item() == pytest.approx(0.5, rel=0.2)
    assert not torch.equal(adapter.a[0], adapter.a[1])
    assert not adapter.inner.weight.requires_grad and adapter.a.requires_grad


def test_adapters_are_counted_with_their_part():
    plain, adapted = build_meta(tiny_spec("fira")), adapt(build_meta(tiny_spec("fira")))
    before, after = (
        {row.part: row.total for row in count_parameters(model).rows} for model in (plain, adapted))
    extra = {"experts": 2 * 2 * 4 * RANK * (16 + 24), "head": RANK * (16 + 31),
             "attention": 2 * RANK * (16 + 3 * 16 + 16 + 16)}
    assert after == {part: size + extra.get(part, 0) for part, size in before.items()}


def test_frozen_weights_stay_frozen_when_a_model_is_loaded(tmp_path, monkeypatch):
    save_weights(build(tiny_spec("fira"), seed=0), tmp_path)
    monkeypatch.setattr(FIRA, "__init__", _frozen(FIRA.__init__))
    model = load_pretrained(tmp_path)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "norm.weight", "norm.bias"]


def _frozen(construct):
    def construct_frozen(self, **fields):
        construct(self, **fields)
        self.requires_grad_(False)
        self.norm.requires_grad_(True)
    return construct_frozen
