"""The expert linear: every implementation equals the row-by-row definition."""
from __future__ import annotations

import pytest
import torch

from fira.model.fast import HAS_BATCH, SortedLinear, add_bias, expert_linear, grouped_linear
from fira.model.moe import GELUExperts, SwiGLUExperts, expert_linear_plain, grouping_obstacle
from tests.models import assert_equal_with_gradients

LOADS = [[3, 1, 4, 2], [0, 10, 0, 0], [5, 0, 0, 5], [0, 0, 1, 0]]


def with_bias(multiply):
    def linear(rows, counts, weight, bias):
        out = multiply(rows, counts, weight)
        return out if bias is None else add_bias(out, counts, bias)
    return linear


FAST = {"sorted": with_bias(SortedLinear.apply), "grouped": with_bias(grouped_linear),
        "chosen": expert_linear}


def problem(load: list[int], bias: bool) -> list[torch.Tensor | None]:
    torch.manual_seed(sum(load))
    rows = torch.randn(sum(load), 8, requires_grad=True)
    weight = torch.randn(4, 16, 8, requires_grad=True)
    biases = torch.randn(4, 16, requires_grad=True) if bias else None
    return [rows, torch.tensor(load), weight, biases]


def draw(experts):
    """The experts, with normally distributed weights and biases."""
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    return experts


@pytest.mark.parametrize("path", FAST)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("load", LOADS)
def test_fast_paths_equal_row_by_row_in_values_and_gradients(path, bias, load):
    inputs = problem(load, bias)
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    assert_equal_with_gradients(FAST[path](*inputs), expert_linear_plain(*inputs), wanted)


def test_what_no_grouped_product_can_take_has_a_reason(monkeypatch):
    device, experts = torch.device("cuda"), SwiGLUExperts(4, 8, 12)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert "divide by 8, not 12" in grouping_obstacle(experts, device)
    assert grouping_obstacle(experts, torch.device("cpu")) is None
    assert grouping_obstacle(SwiGLUExperts(4, 8, 16), device) is None
    assert grouping_obstacle(SwiGLUExperts(1, 8, 12), device) is None  # an ordinary product
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert "8.0 or newer" in grouping_obstacle(SwiGLUExperts(4, 8, 16), device)


@pytest.mark.skipif(not HAS_BATCH, reason="this torch has no cblas_sgemm_batch")
@pytest.mark.parametrize("load", LOADS)
def test_batched_experts_equal_row_by_row_in_values_and_gradients(load, monkeypatch):
    rows, counts, *_ = problem(load, bias=False)
    experts = draw(SwiGLUExperts(4, 8, 16))
    batched = experts(rows, counts)
    assert "BatchedSwiGLU" in type(batched.grad_fn).__name__
    monkeypatch.setattr("fira.model.fast.HAS_BATCH", False)
    monkeypatch.setattr("fira.model.fast.expert_linear", expert_linear_plain)
    wanted = [rows, *experts.parameters()]
    assert_equal_with_gradients(batched, experts(rows, counts), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not HAS_BATCH, reason="this torch has no cblas_sgemm_batch")
def test_batched_experts_without_a_row_get_zero_gradients():
    experts = draw(SwiGLUExperts(4, 8, 16))
    out = experts(torch.empty(0, 8, requires_grad=True), torch.zeros(4, dtype=torch.long))
    out.sum().backward()
    assert out.shape == (0, 8)
    assert all(parameter.grad.eq(0).all() for parameter in experts.parameters())


@pytest.mark.parametrize("kind", [GELUExperts, SwiGLUExperts])
def test_experts_equal_their_feed_forward_written_out(kind):
    torch.manual_seed(0)
    experts = draw(kind(3, 8, 16).double())
    rows, counts = torch.randn(6, 8, dtype=torch.float64), torch.tensor([2, 0, 4])
    expected = []
    for row, e in zip(rows, [0, 0, 2, 2, 2, 2], strict=True):
        if kind is SwiGLUExperts:
            gate = experts.gate.weight[e] @ row
            hidden = gate * torch.sigmoid(gate) * (experts.up.weight[e] @ row)
            expected.append(experts.down.weight[e] @ hidden)
        else:
            x = experts.up.weight[e] @ row + experts.up.bias[e]
            hidden = 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
            expected.append(experts.down.weight[e] @ hidden + experts.down.bias[e])
    torch.testing.assert_close(experts(rows, counts), torch.stack(expected))


def test_autocast_computes_in_its_dtype_and_returns_fp32_gradients():
    rows, counts, weight, bias = problem([3, 1, 4, 2], bias=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = expert_linear(rows, counts, weight, bias)
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    assert rows.grad.dtype == weight.grad.dtype == bias.grad.dtype == torch.float32
    torch.testing.assert_close(out.float(), expert_linear(rows, counts, weight, bias),
                               rtol=0.03, atol=0.05)
