"""Counting agrees with the founding table and with the models themselves."""
from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fira.model import build, build_meta
from fira.model.spec import FIRASpec
from fira.model.transformer import count_parameters
from tests.models import tiny_spec


def test_the_founding_model_counts_part_by_part():
    count = count_parameters(build_meta(FIRASpec()))
    assert {row.part: row.total for row in count.rows} == {
        "token embedding": 38_633_472, "positions": 2_359_296, "attention": 28_311_552,
        "router": 36_912, "experts": 226_676_736, "norms": 38_400, "head": 38_683_776}
    assert count.total == 334_740_144
    assert count.active == count.total - 3 * 226_676_736 // 4


@pytest.mark.parametrize("name, fields", [("fira", {}), ("fira2", {}), ("fira2", {"tied": False})])
def test_flops_equal_those_of_the_operations(name, fields):
    spec = tiny_spec(name, num_experts=1, top_k=1, **fields)
    model = build(spec, seed=0)
    tokens_BT = torch.zeros(2, 12, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(tokens_BT).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    matrices = sum(v for op, v in counts.items() if "attention" not in str(op))
    attention = 6 * spec.num_layers * spec.n_head * spec.head_dim * 12
    assert count_parameters(model, 12).flops_per_token == matrices / 24 + attention
