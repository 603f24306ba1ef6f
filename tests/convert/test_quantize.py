"""Small integers stand for the weights they came from, in every tensor."""
from __future__ import annotations

import copy
import time

import pytest
import torch
from torch import nn

from fira.convert.quantize import (
    GROUP,
    Quantized,
    QuantizedExpertLinear,
    dequantize,
    product,
    quantize,
    quantize_int4,
    quantize_int8,
    stored,
)
from fira.infer.load import load
from fira.model.moe import SwiGLUExperts


def test_int8_is_within_half_a_step_of_a_row():
    weight = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0))
    numbers, scale = quantize_int8(weight)
    assert numbers.dtype == torch.int8 and scale.shape == (3, 5) and numbers.abs().max() == 127
    assert ((dequantize(numbers, scale) - weight).abs() <= scale[..., None] / 2 + 1e-7).all()
    assert dequantize(*quantize_int8(torch.zeros(2, 32))).eq(0).all()


def test_int4_follows_the_layout_on_the_page():
    weight = torch.randn(4, 2 * GROUP, generator=torch.Generator().manual_seed(0))
    numbers, scale = quantize_int4(weight)
    assert numbers.shape == (4, GROUP) and scale.shape == (4, 2)
    for row in range(4):
        for place in range(2 * GROUP):
            group, at = divmod(place, GROUP)
            byte = int(numbers[row, group * 16 + at % 16])
            step = (byte & 15 if at < 16 else byte >> 4) - 8
            value = step * scale[row, group]
            assert dequantize(numbers, scale)[row, place] == value
            # the far end of the range may lie one step off, everything else half a step
            assert abs(value - weight[row, place]) <= scale[row, group].abs() * 1.0001
    groups, found = weight.unflatten(-1, (-1, GROUP)), dequantize(numbers, scale)
    assert torch.allclose(groups.abs().amax(-1), found.unflatten(-1, (-1, GROUP)).abs().amax(-1))
    assert dequantize(*quantize_int4(torch.zeros(2, 32))).eq(0).all()


@pytest.mark.parametrize("which", ["run", "founding_run", "dense_run"])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_every_tensor_is_quantized_or_named(which, kind, request):
    model = load(request.getfixturevalue(which), "cpu").model
    before = {name: tensor.numel() for name, tensor in model.named_parameters()}
    quantize(model, kind)
    for name in before:
        owner, _, leaf = name.rpartition(".")
        heavy = (leaf == "weight" and "norm" not in name and "router" not in name
                 and "position" not in name)
        assert isinstance(model.get_submodule(owner), Quantized) == (heavy or (
            leaf == "bias" and ("experts" in name or name == "head.bias"))), name
    rows = stored(model).values()
    assert sum(float32 for _, float32, _ in rows) == 4 * sum(before.values()) + sum(
        buffer.nbytes for name, buffer in model.state_dict().items()
        if name.endswith(("load_share_E", "selection_bias_E")))
    assert sum(now for *_, now in rows) == sum(
        tensor.nbytes for tensor in model.state_dict().values())
    assert {how for how, *_ in rows} <= {"int8 in rows", "int4 in 32s", "not quantized"}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantized_model_computes_with_the_dequantized_weights(loaded, kind, monkeypatch):
    small = quantize(copy.deepcopy(loaded.model), kind)
    plain = copy.deepcopy(loaded.model)
    for name, module in small.named_modules():
        if isinstance(module, Quantized):
            plain.get_submodule(name).weight.copy_(module.weight)
    tokens_BT = torch.randint(600, (2, 32), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(small(tokens_BT), plain(tokens_BT), atol=1e-5)
    assert not torch.equal(small(tokens_BT), loaded.model(tokens_BT))
    monkeypatch.setattr("fira.convert.quantize.BLOCK", 100)  # a smaller block last
    assert torch.allclose(small(tokens_BT), plain(tokens_BT), atol=1e-5)


@pytest.mark.parametrize("kind, share, cost", [("int8", 0.27, 0.02), ("int4", 0.2, 0.2)])
def test_a_quantized_run_is_small_and_every_verb_reads_it(kind, share, cost, run, fira, text_file,
                                                          tmp_path):
    answer = fira("export", kind, run, tmp_path / "small", "--text", text_file)
    assert answer.code == 0 and "not quantized" in answer.err and "bits per byte" in answer.err
    def weights(folder):
        return load(folder, "cpu").folder / "model.safetensors"
    assert weights(tmp_path / "small").stat().st_size < share * weights(run).stat().st_size
    before, after = (float(fira("eval", folder, "--text", text_file).out.split("per byte: ")[1]
                           .split()[0]) for folder in (run, tmp_path / "small"))
    assert 0 < abs(after - before) < cost
    assert f"{before:.5f} before, {after:.5f} in {kind}" in " ".join(answer.err.split())
    assert fira("generate", tmp_path / "small", "The", "--max-new-tokens", 4).code == 0
    assert "active" in fira("show", tmp_path / "small").out


@torch.no_grad()
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_only_the_weights_of_experts_with_rows_become_floats(kind, monkeypatch):
    experts = SwiGLUExperts(4, 32, 32)
    for name in ("gate", "up", "down"):
        nn.init.normal_(getattr(experts, name).weight)
        setattr(experts, name, QuantizedExpertLinear(getattr(experts, name), kind))
    seen = []
    monkeypatch.setattr("fira.convert.quantize.product",
                        lambda x, *weight: seen.append(weight[0]) or product(x, *weight))
    experts(torch.randn(3, 32), torch.tensor([0, 3, 0, 0]))
    assert [numbers.dim() for numbers in seen] == [2, 2, 2]


@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("transpose", [True, False])
def test_a_product_with_int8_equals_that_with_the_weight(transpose, dtype, close):
    numbers, scale = quantize_int8(torch.randn(256, 512))
    x, weight = torch.randn(4, 512 if transpose else 256), dequantize(numbers, scale)
    expected = x.to(dtype).float() @ (weight.mT if transpose else weight)
    found = product(x.to(dtype), numbers, scale, transpose)
    assert found.dtype == dtype
    assert (found - expected).abs().max() < close * expected.abs().max()


def test_a_product_with_int8_takes_less_time_than_one_with_the_dequantized_weight():
    (numbers, scale), x = quantize_int8(torch.randn(256, 512)), torch.randn(4, 512)

    def seconds(operation):
        began = time.thread_time()
        operation()
        return time.thread_time() - began

    pairs = [(seconds(lambda: product(x, numbers, scale)),
              seconds(lambda: x @ dequantize(numbers, scale).mT)) for _ in range(30)]
    ours, dequantizing = map(min, zip(*pairs, strict=True))
    assert ours < 0.9 * dequantizing  # 0.65


def test_quantized_weights_go_nowhere_else(run, loaded, fira, refused, tmp_path):
    assert fira("export", "int8", run, tmp_path / "small").code == 0
    for verb in (("export", "hf"), ("export", "int4"), ("export", "gguf")):
        line = refused(*verb, tmp_path / "small", tmp_path / "x")
        assert "holds int8 weights" in line
    assert "exists already" in refused("export", "int4", run, tmp_path / "small")
    from fira import FIRA2
    with pytest.raises(ValueError, match="are int4 already"):
        quantize(quantize(copy.deepcopy(loaded.model), "int4"), "int8")
    with pytest.raises(ValueError, match="holds int8 weights"):
        FIRA2.from_pretrained(tmp_path / "small")
