"""Counting agrees with the founding table and with the models themselves."""
from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fira.model import build, build_meta
from fira.model.spec import FIRA2Spec, FIRASpec
from fira.model.transformer import count_parameters


def test_the_founding_model_counts_part_by_part():
    count = count_parameters(build_meta(FIRASpec()))
    assert {row.part: row.total for row in count.rows} == {
        "token embedding": 38_633_472, "positions": 2_359_296, "attention": 28_311_552,
        "router": 36_912, "experts": 226_676_736, "norms": 38_400, "head": 38_683_776}
    assert count.total == 334_740_144
    assert count.active == count.total - 3 * 226_676_736 // 4


@pytest.mark.parametrize("spec", [
    FIRASpec(vocab_size=64, d_model=32, n_head=2, num_layers=2, d_ff=48, num_experts=1, context=16,
             dropout=0.0),
    FIRA2Spec(vocab_size=64, d_model=32, n_head=4, n_kv_head=2, head_dim=8, num_layers=2, d_ff=48,
              num_experts=1, context=16),
    FIRA2Spec(vocab_size=64, d_model=32, n_head=4, n_kv_head=2, head_dim=8, num_layers=2, d_ff=48,
              num_experts=1, context=16, tied=False)])
def test_flops_equal_those_of_the_operations(spec):
    model = build(spec, seed=0)
    tokens_BT = torch.zeros(2, 16, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(tokens_BT).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    matrices = sum(v for op, v in counts.items() if "attention" not in str(op))
    attention = 6 * spec.num_layers * spec.n_head * spec.head_dim * 16
    assert count_parameters(model, 16).flops_per_token == matrices / 32 + attention
