"""Bits per byte equals its definition, however the text is batched."""
from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from fira.data.text import Item
from fira.eval.bits_per_byte import evaluate, score

TEXTS = ["The state of the Union is strong, and Größe is a word. " * 3, "你好 🙂", "", "a",
         "naïve café " * 30]


def whole(texts: list[str]) -> list[Item]:
    return [Item(text) for text in texts]


def token_by_token(model, tokenizer, texts: list[str], context: int) -> tuple[float, int]:
    """The rule written out: one forward pass per token, over exactly the tokens it may see."""
    nats, count = 0.0, 0
    half = max(1, context // 2)
    with torch.inference_mode():
        for text in texts:
            ids = [tokenizer.end_of_text, *tokenizer.encode(text)]
            for target in range(1, len(ids)):
                first = max(0, math.ceil((target - context) / half) * half)
                logits_V = model(torch.tensor([ids[first:target]]))[0, -1].double()
                nats -= logits_V.log_softmax(-1)[ids[target]].item()
                count += 1
    return nats, count


@pytest.mark.parametrize("context", [1, 2, 7, 16, 64])
def test_the_score_equals_one_pass_per_token(model, tokenizer, context: int) -> None:
    nats, count = token_by_token(model, tokenizer, TEXTS, context)
    size = sum(len(text.encode()) for text in TEXTS)
    found = score(model, tokenizer, whole(TEXTS), context)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert found["loss_per_token"] == pytest.approx(nats / count, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-4)
    assert (found["bytes"], found["tokens"], found["documents"]) == (size, count, len(TEXTS))


def test_the_batch_size_does_not_change_the_score(model, tokenizer) -> None:
    scores = [score(model, tokenizer, whole(TEXTS), 16, batch_tokens=size)["bits_per_byte"]
              for size in (1, 40, 333, 100_000)]
    assert scores == pytest.approx([scores[0]] * 4, rel=1e-6)


def test_a_document_in_parts_scores_as_the_whole(model, tokenizer) -> None:
    text = "The state of the Union is strong " * 20
    cut = text.index(" Union", 200)
    parts = [Item(text[:cut], ends=False), Item(text[cut:])]
    one, two = (score(model, tokenizer, given, 16) for given in ([Item(text)], parts))
    assert two["documents"] == 1
    assert two == {**one, "bits_per_byte": two["bits_per_byte"], "perplexity": two["perplexity"],
                   "loss_per_token": two["loss_per_token"]}
    assert two["bits_per_byte"] == pytest.approx(one["bits_per_byte"], rel=1e-6)


def test_the_window_is_the_trained_length_unless_given(model, tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(model, "trained_length", 16, raising=False)
    assert score(model, tokenizer, whole(TEXTS)) == score(model, tokenizer, whole(TEXTS), 16)
    assert score(model, tokenizer, whole(TEXTS), 64)["context"] == 64


def test_a_text_file_is_scored_with_a_step_folder(step_folder: Path, tmp_path: Path, model,
                                                  tokenizer) -> None:
    (tmp_path / "one.txt").write_text(TEXTS[0], encoding="utf-8")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[1:] if text)
    (tmp_path / "more.jsonl").write_text(lines, encoding="utf-8")
    sources = [str(tmp_path / "one.txt"), str(tmp_path / "more.jsonl")]
    found = evaluate(step_folder.parent, sources, device="cpu")
    expected = score(model, tokenizer, whole([text for text in TEXTS if text]))
    assert found["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], rel=1e-6)
    assert found["documents"] == 4 and found["model"] == str(step_folder)
    assert json.loads(json.dumps(found)) == found


def test_scoring_leaves_the_model_in_its_mode(model, tokenizer) -> None:
    model.train()
    score(model, tokenizer, whole(["a"]))
    assert model.training
    model.eval()


def test_what_cannot_be_scored_is_refused_in_one_line(model, tokenizer) -> None:
    with pytest.raises(ValueError, match="nothing to score; give"):
        score(model, tokenizer, whole(["", ""]))
    with pytest.raises(ValueError, match="context=65 must be from 1 to the model's 64"):
        score(model, tokenizer, whole(["a"]), context=65)


def test_a_tokenizer_that_loses_bytes_is_refused(model, tokenizer) -> None:
    class Lossy:
        end_of_text = tokenizer.end_of_text
        token_bytes = staticmethod(tokenizer.token_bytes)

        @staticmethod
        def encode(text: str) -> list[int]:
            return tokenizer.encode(text.lower().replace(" ", ""))

    with pytest.raises(ValueError, match="keeps 3 of 4 bytes of document 1"):
        score(model, Lossy, whole(["A bc"]))
