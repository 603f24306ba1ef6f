"""Choosing by partition equals choosing by sorting."""
import pytest
import torch
from fira.model.choose import choose, choose_in_rounds, rank_smallest

from fira.model import choose as module


@pytest.mark.parametrize("tokens, experts, top_k", [(300, 32, 4), (300, 64, 1), (300, 16, 15),
                                                    (300, 16, 16), (5, 32, 4), (300, 4, 2)])
def test_the_chosen_are_those_of_topk_and_the_threshold_divides_them(tokens, experts, top_k,
                                                                     monkeypatch):
    scores = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(0))
    chosen, threshold = choose(scores, top_k)
    assert torch.equal(chosen.sort(dim=1).values, scores.topk(top_k).indices.sort(dim=1).values)
    if top_k == experts:
        assert threshold is None
        return
    assert ((scores > threshold.unsqueeze(1)).sum(dim=1) == top_k).all()
    monkeypatch.setattr(module, "MANY_TOKENS", 1000)
    assert torch.equal(choose(scores, top_k)[1], threshold)
    assert torch.equal(choose_in_rounds(scores, top_k)[0], scores.topk(top_k).indices)
    assert torch.equal(choose_in_rounds(scores, top_k)[1], threshold)


@pytest.mark.parametrize("rank", [1, 7, 20])
def test_a_rank_is_that_of_kthvalue(rank):
    values = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rank_smallest(values, rank), values.kthvalue(rank).values)
