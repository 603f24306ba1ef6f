"""Copying: a passage read twice, by the definition; what is too short is refused."""
from __future__ import annotations

import copying
import pytest
import torch
from torch.nn import functional as F

from fira.infer.load import load


def test_a_passage_is_scored_when_first_read_and_when_read_again(trained_run, corpus):
    text_file = min(corpus.iterdir())
    found = copying.copying(str(trained_run), [str(text_file)], "cpu")
    model, tokenizer, _ = load(trained_run, "cpu")
    length = model.trained_length // 2
    ids = torch.tensor(tokenizer.encode(text_file.read_text(encoding="utf-8")))
    passages = ids[:len(ids) // length * length].view(-1, length)[:64]
    assert (found["passages"], found["passage_tokens"]) == (len(passages), length)
    with torch.no_grad():
        logits = model(torch.cat([passages, passages], dim=1)).log_softmax(-1)
    first = F.nll_loss(logits[:, length // 4:length - 1].flatten(0, 1),
                       passages[:, length // 4 + 1:].flatten())
    again = F.nll_loss(logits[:, length + length // 4:-1].flatten(0, 1),
                       passages[:, length // 4 + 1:].flatten())
    assert found["nats_per_token_first"] == pytest.approx(float(first), rel=1e-4)
    assert found["nats_per_token_again"] == pytest.approx(float(again), rel=1e-4)


def test_what_is_too_short_is_refused(trained_run, text_file, tmp_path, monkeypatch):
    short = tmp_path / "short.txt"
    short.write_text("Too little.", encoding="utf-8")
    with pytest.raises(ValueError, match="no document has"):
        copying.copying(str(trained_run), [str(short)], "cpu")
    monkeypatch.setattr(copying, "window_length", lambda model: 3)
    with pytest.raises(ValueError, match="reads 3 tokens at a time"):
        copying.copying(str(trained_run), [str(text_file)], "cpu")
