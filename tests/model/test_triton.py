"""Triton's kernels against the plain layer, interpreted where there is no GPU, and
compiled for one."""
from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fira.model import triton_swiglu
from fira.model.experts import GELUExperts, SwiGLUExperts
from fira.model.initialize import initialize
from fira.model.moe import Dense, MoE
from fira.model.router import Router

pytest.importorskip("triton", reason="Triton has no build for this platform")


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # else interpreted
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16  # the interpreter cannot do bf16


@pytest.fixture(autouse=True)
def many_tiles(monkeypatch):
    """Of a small layer."""
    for name in ("WIDE", "NARROW"):
        monkeypatch.setattr(triton_swiglu, name, triton_swiglu.Tile(16, 16, 16))


def layer(width, hidden, num_experts, top_k):
    router = Router(width, num_experts, top_k, bias=False, balance_weight=0.01, z_weight=0.001)
    moe = MoE(router, SwiGLUExperts(num_experts, width, hidden))
    initialize(torch.nn.ModuleDict({"moe": moe}), 1, 0.2, seed=1)
    return moe.to(DEVICE)


SHAPES = [(50, 40, 24, 5, 2), (33, 16, 48, 4, 1), (7, 20, 8, 9, 3), (1, 16, 16, 4, 4)]


@pytest.mark.parametrize("tokens, width, hidden, experts, top_k", SHAPES)
def test_kernels_equal_the_plain_layer_in_values_and_gradients(tokens, width, hidden, experts,
                                                               top_k):
    moe = layer(width, hidden, experts, top_k)
    x_BTD = torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    upstream, results = torch.randn_like(x_BTD), []
    for in_one in (None, triton_swiglu.swiglu_in_one):
        moe.in_one, x = in_one, x_BTD.clone().requires_grad_()
        out = moe(x)
        out.backward(upstream)
        results.append([out, x.grad, *(p.grad for p in moe.parameters())])
        moe.zero_grad()
    for plain, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_the_result_is_the_same_to_the_bit_every_time():
    moe, outs = layer(40, 24, 5, 2), []
    moe.in_one = triton_swiglu.swiglu_in_one
    for _ in range(2):
        moe.zero_grad()
        out = moe(torch.ones(1, 30, 40, device=DEVICE))
        out.sum().backward()
        outs.append([out, *(p.grad for p in moe.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*outs, strict=True))


@pytest.mark.parametrize("counts", [[0, 5, 0, 40, 16], [16], [0, 0, 3], [15, 17, 1]])
def test_tiles_hold_every_row_of_an_expert_once(counts):
    height, rows = triton_swiglu.WIDE.rows, sum(counts)
    tiles = triton_swiglu.Tiles.of(torch.tensor(counts), rows)
    ends, found = torch.tensor(counts).cumsum(0).tolist(), []
    for owner, first in zip(tiles.owner_T.tolist(), tiles.first_T.tolist(), strict=True):
        if owner < len(counts):
            found += [(owner, row) for row in range(first, min(first + height, ends[owner]))]
    owners = [expert for expert, count in enumerate(counts) for _ in range(count)]
    assert found == list(zip(owners, range(rows), strict=True))


@pytest.mark.parametrize("layers, device, reason", [
    ([], "cuda", "dense model"),
    ([layer(16, 16, 4, 2)], "cpu", "need a CUDA device, not cpu"),
])
def test_what_the_kernels_cannot_take_has_a_reason(layers, device, reason):
    assert reason in triton_swiglu.obstacle(layers, torch.device(device))


def test_only_plain_swiglu_experts_are_taken():
    assert triton_swiglu.is_plain(SwiGLUExperts(2, 8, 8))
    assert not triton_swiglu.is_plain(GELUExperts(2, 8, 8))
    assert not triton_swiglu.is_plain(Dense(SwiGLUExperts(1, 8, 8)))


def test_half_precision_under_autocast_stays_near_float32():
    moe, outs = layer(40, 24, 5, 2), []
    x_BTD = torch.randn(1, 50, 40, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for enabled in (False, True):
        moe.zero_grad()
        moe.in_one = triton_swiglu.swiglu_in_one if enabled else None
        with torch.autocast(DEVICE.type, HALF, enabled=enabled):
            out = moe(x_BTD)
        assert out.dtype == (HALF if enabled else torch.float32)
        out.sum().backward()
        outs.append([out.float(), *(p.grad for p in moe.parameters())])
    for plain, ours in zip(*outs, strict=True):
        assert (ours - plain).norm() < 0.02 * plain.norm()


def test_compiled_they_are_nodes_of_one_graph():
    moe = layer(16, 16, 4, 2)
    moe.in_one, x = triton_swiglu.swiglu_in_one, torch.ones(1, 9, 16, device=DEVICE)
    moe(x).sum().backward()
    plain = [p.grad for p in moe.parameters()]
    moe.zero_grad()
    torch._dynamo.reset()
    torch.compile(moe, backend="aot_eager", fullgraph=True)(x).sum().backward()
    for ours, theirs in zip([p.grad for p in moe.parameters()], plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_every_kernel_compiles_for_a_gpu():
    """Without one: Triton makes code for compute capability 9.0 and counts what it needs."""
    program = os.path.join(os.path.dirname(__file__), "compile_kernels.py")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 6
