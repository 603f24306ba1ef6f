"""Copying: a passage read twice, by the definition."""
from __future__ import annotations

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
