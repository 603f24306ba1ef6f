"""The arms of the proof: dense models of the widths that their names promise."""
from __future__ import annotations

from card import DENSE, LARGE, MOE, sooner, wider
from moe_vs_dense import make_arms


def test_dense_arms_are_as_wide_as_they_are_called():
    arms = make_arms("small", ["data.folder=data"], [1.5], [2])
    spec = arms[MOE].config().model
    widths = {name: arms[name].config().model.d_ff for name in (DENSE, LARGE, wider(2))}
    assert widths == {DENSE: spec.top_k * spec.d_ff, LARGE: spec.num_experts * spec.d_ff,
                      wider(2): 2 * spec.top_k * spec.d_ff}
    assert {arms[name].config().model.num_experts for name in widths} == {1}
    assert arms[sooner(1.5)].config() == arms[MOE].config()
