"""Copying: a passage read twice, by the definition. Two kinds of model: intervals that cover."""
from __future__ import annotations

import numpy as np
import pytest
import run_scores
import torch
from torch.nn import functional as F

from fira.infer.load import load


def test_a_passage_is_scored_when_first_read_and_when_read_again(trained_run, corpus):
    text_file = min(corpus.iterdir())
    found = run_scores.copying(str(trained_run), [str(text_file)], "cpu")
    model, tokenizer, _ = load(trained_run, "cpu")
    length = model.trained_length // 2
    ids = torch.tensor(tokenizer.encode(text_file.read_text(encoding="utf-8")))
    passages = ids[:len(ids) // length * length].view(-1, length)[:64]
    assert (found["passages"], found["passage_tokens"]) == (len(passages), length)
    twice = torch.cat([passages, passages], dim=1)
    with torch.no_grad():
        losses = F.cross_entropy(model(twice)[:, :-1].mT, twice[:, 1:], reduction="none")
    first, again = losses[:, length // 4:length - 1], losses[:, length + length // 4:]
    assert found["nats_per_token_first"] == pytest.approx(float(first.mean()), rel=1e-4)
    assert found["nats_per_token_again"] == pytest.approx(float(again.mean()), rel=1e-4)


@pytest.mark.parametrize("seeds, spread", [(1, 0.0), (3, 0.0), (3, 0.3)])
def test_the_interval_over_items_and_seeds_covers_the_difference(seeds, spread):
    """Simulated: an item's lead varies around 0.1, and a seed's lead around that."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(300):
        lead_SI = 0.1 + rng.normal(0, 0.5, 60) + rng.normal(0, spread, (seeds, 1))
        kinds = [[{"item_bits": row.tolist(), "groups": [None] * 60} for row in rows]
                 for rows in (lead_SI + 2, np.full_like(lead_SI, 2))]
        found = run_scores.difference_over_seeds(*kinds, "item_bits")
        assert found["first"] - found["second"] == pytest.approx(found["difference"])
        covered += abs(found["difference"] - 0.1) <= found["half"]
    assert 276 <= covered <= 300, covered
