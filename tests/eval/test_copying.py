"""Copying: a passage read twice, by the definition; too short a text is refused."""
import json

import pytest
import torch
from torch.nn import functional as F

from fira.infer.load import load


def test_a_passage_is_scored_when_first_read_and_when_read_again(fira, trained_run, corpus):
    text_file = min(corpus.iterdir())
    answer = fira("eval", trained_run, "--text", text_file, "--copying", "--json")
    found = json.loads(answer.out)["copying"]
    model, tokenizer, _ = load(str(trained_run), "cpu")
    length = model.trained_length // 2
    assert found["passage_tokens"] == length
    ids = torch.tensor(tokenizer.encode(text_file.read_text(encoding="utf-8")))
    passages = ids[:len(ids) // length * length].view(-1, length)[:64]
    assert found["passages"] == len(passages) > 1
    with torch.no_grad():
        logits = model(torch.cat([passages, passages], dim=1)).log_softmax(-1)
    first = F.nll_loss(logits[:, length // 4:length - 1].flatten(0, 1),
                       passages[:, length // 4 + 1:].flatten())
    again = F.nll_loss(logits[:, length + length // 4:-1].flatten(0, 1),
                       passages[:, length // 4 + 1:].flatten())
    assert found["nats_per_token_first"] == pytest.approx(float(first), rel=1e-4)
    assert found["nats_per_token_again"] == pytest.approx(float(again), rel=1e-4)
    assert "nats per token again" in fira("eval", trained_run, "--text", text_file,
                                          "--copying").out


def test_a_text_below_a_passage_is_refused(refused, trained_run, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("Too little.", encoding="utf-8")
    assert "no document has" in refused("eval", trained_run, "--text", short, "--copying")


def test_a_model_that_reads_too_little_is_refused(refused, trained_run, text_file, monkeypatch):
    monkeypatch.setattr("fira.eval.copying.window_length", lambda model: 3)
    line = refused("eval", trained_run, "--text", text_file, "--copying")
    assert "reads 3 tokens at a time" in line
