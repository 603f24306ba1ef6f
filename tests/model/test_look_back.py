"""Heads that begin by looking back do so, for any text, and others do not."""
import pytest
import torch

from fira.model import build, fira2
from fira.model.spec import FIRA2Spec


def first_layer(monkeypatch, **fields):
    """Weights of layer 0's attention for random ids, per head: HTT."""
    spec = FIRA2Spec(vocab_size=500, d_model=64, num_layers=2, d_ff=8, num_experts=2, context=96,
                     **fields)
    seen = []

    def spy(q_BHTC, k_BGTC, v_BGTC, cache):
        k_BHTC = k_BGTC.repeat_interleave(q_BHTC.shape[1] // k_BGTC.shape[1], dim=1)
        scores = q_BHTC @ k_BHTC.mT / q_BHTC.shape[-1] ** 0.5
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        seen.append(scores.masked_fill(hidden, -torch.inf).softmax(-1))
        return q_BHTC

    monkeypatch.setattr(fira2, "attention", spy)
    ids = torch.randint(0, 500, (4, 96), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        build(spec, seed=0)(ids)
    return seen[0].mean(0)


def mass(weights_TT, back):
    return float(weights_TT.diagonal(-back)[8:].mean())


@pytest.mark.parametrize("theta", [300.0, 1e4, 1e6])
@pytest.mark.parametrize(("heads", "groups", "width"), [(4, 2, 32), (4, 4, 16), (6, 2, 64)])
def test_heads_of_the_first_group_look_one_further_back_each(monkeypatch, heads, groups, width,
                                                             theta):
    fields = {"n_head": heads, "n_kv_head": groups, "head_dim": width, "rope_theta": theta}
    weights_HTT = first_layer(monkeypatch, look_back=True, **fields)
    for head in range(heads // groups):
        found = [mass(weights_HTT[head], back) for back in range(12)]
        assert max(range(12), key=found.__getitem__) == head + 1 and found[head + 1] > 0.1
    for head in range(heads // groups, heads):
        assert max(mass(weights_HTT[head], back) for back in range(12)) < 0.1
    plain_HTT = first_layer(monkeypatch, **fields)
    assert max(mass(plain, 1) for plain in plain_HTT) < 0.1
