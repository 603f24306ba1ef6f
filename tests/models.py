"""Models for tests: untrained, but with weights so large that logits and routing are decided."""
from unittest import mock

import torch

from fira import model
from fira.model.initialize import initialize
from fira.model.moe import MoE, SwiGLUExperts
from fira.model.router import METHODS, Router
from fira.model.spec import FIRA2Spec, FIRASpec

TINY = dict(vocab_size=31, d_model=16, n_head=2, num_layers=2, d_ff=24, num_experts=4, top_k=2,
            context=12)
NAMES = ("fira", "fira2")


def tiny_spec(name, **fields):
    """The smallest spec of an architecture, with `fields` changed."""
    if name == "fira":
        return FIRASpec(**TINY | {"dropout": 0.0} | fields)
    return FIRA2Spec(**TINY | {"n_kv_head": 1, "head_dim": 8} | fields)


def build(spec, seed, std=0.3):
    """A new model of `spec` whose initial weights have the standard deviation `std`."""
    with mock.patch("fira.model.initialize.STD", std):
        return model.build(spec, seed)


def build_moe(method="loss", num_experts=4, top_k=2, balance_weight=1.0, z_weight=0.0):
    """A layer of width 8 whose router has a bias."""
    router = Router(8, num_experts, top_k, True, METHODS[method], balance_weight)
    router.z_weight = z_weight
    moe = MoE(router, SwiGLUExperts(num_experts, 8, 12))
    with mock.patch("fira.model.initialize.STD", 0.3):
        initialize(torch.nn.ModuleDict({"moe": moe}), seed=1)
    return moe


def assert_equal_with_gradients(ours, theirs, wanted, **tolerance):
    """Both results and their gradients in `wanted` are close, from one random upstream gradient."""
    torch.testing.assert_close(ours, theirs, **tolerance)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(theirs.shape, dtype=theirs.dtype, generator=generator)
    gradients = [torch.autograd.grad(out, wanted, upstream) for out in (ours, theirs)]
    torch.testing.assert_close(*gradients, **tolerance)
