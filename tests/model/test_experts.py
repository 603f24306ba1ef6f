"""The expert linear: every implementation equals the row-by-row definition."""
from __future__ import annotations

import pytest
import torch

from fira.model.fast import expert_linear
from fira.model.fast.experts import HAS_BATCH, SortedLinear, add_bias, grouped_linear
from fira.model.moe import GELUExperts, SwiGLUExperts, expert_linear_plain, grouping_obstacle

LOADS = [[3, 1, 4, 2], [0, 10, 0, 0], [5, 0, 0, 5], [0, 0, 1, 0]]



def with_bias(multiply):
    def linear(rows, counts, weight, bias):
        out = multiply(rows, counts, weight)
        return out if bias is None else add_bias(out, counts, bias)
    return linear


FAST = {"sorted": with_bias(SortedLinear.apply), "grouped": with_bias(grouped_linear),
        "chosen": expert_linear}


def problem(load: list[int], bias: bool, dtype=torch.float32) -> list[torch.Tensor | None]:
    torch.manual_seed(sum(load))
    rows = torch.randn(sum(load), 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(4, 16, 8, dtype=dtype, requires_grad=True)
    biases = torch.randn(4, 16, dtype=dtype, requires_grad=True) if bias else None
    return [rows, torch.tensor(load), weight, biases]


@pytest.mark.parametrize("path", FAST)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("load", LOADS)
def test_fast_paths_equal_row_by_row_in_values_and_gradients(path, bias, load):
    inputs = problem(load, bias)
    fast, slow = FAST[path](*inputs), expert_linear_plain(*inputs)
    torch.testing.assert_close(fast, slow)
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    upstream = torch.randn_like(slow)
    for ours, theirs in zip(torch.autograd.grad(fast, wanted, upstream),
                            torch.autograd.grad(slow, wanted, upstream), strict=True):
        torch.testing.assert_close(ours, theirs)


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
    experts = SwiGLUExperts(4, 8, 16)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    wanted = [rows, *experts.parameters()]
    results = []
    for batch in (True, False):
        monkeypatch.setattr("fira.model.fast.HAS_BATCH", batch)
        if not batch:
            monkeypatch.setattr("fira.model.fast.expert_linear", expert_linear_plain)
        out = experts(rows, counts)
        assert ("BatchedSwiGLU" in type(out.grad_fn).__name__) == batch
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        results.append([out, *torch.autograd.grad(out, wanted, upstream)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not HAS_BATCH, reason="this torch has no cblas_sgemm_batch")
def test_batched_experts_without_a_row_get_zero_gradients():
    experts = SwiGLUExperts(4, 8, 16)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    out = experts(torch.empty(0, 8, requires_grad=True), torch.zeros(4, dtype=torch.long))
    out.sum().backward()
    assert out.shape == (0, 8)
    assert all(parameter.grad.eq(0).all() for parameter in experts.parameters())


def test_sorted_gradient_is_exact():
    rows, counts, weight, _ = problem([2, 0, 3, 1], False, torch.float64)
    assert torch.autograd.gradcheck(
        lambda rows, weight: SortedLinear.apply(rows, counts, weight), [rows, weight])


def test_experts_without_rows_get_zero_gradients():
    rows, counts, weight, bias = problem([0, 10, 0, 0], bias=True)
    expert_linear(rows.repeat(1000, 1), counts * 1000, weight, bias).square().sum().backward()
    for grad in (weight.grad, bias.grad):
        assert grad[[0, 2, 3]].eq(0).all()
        assert grad[1].ne(0).all()


@pytest.mark.parametrize("kind", [GELUExperts, SwiGLUExperts])
def test_experts_equal_their_feed_forward_written_out(kind):
    torch.manual_seed(0)
    experts = kind(3, 8, 16).double()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
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
