"""Specialization: nothing by chance, everything when the token decides, a number for real runs."""
import json

import pytest
import torch

from fira.eval.specialization import information, specialization
from fira.model.files import load_pretrained, save_weights


def test_information_is_all_when_the_token_decides_and_none_when_nothing_does():
    tokens = torch.randint(40, (4000,), generator=torch.Generator().manual_seed(0))
    assert information(tokens, (tokens % 4)[:, None], 4) == pytest.approx(1.0)
    random = torch.randint(4, (4000, 2), generator=torch.Generator().manual_seed(1))
    assert information(tokens, random, 4) < 0.02
    assert information(tokens, torch.zeros(4000, 1, dtype=torch.long), 4) == 0.0


def test_information_equals_its_definition():
    tokens, experts = torch.tensor([0, 0, 7, 7]), torch.tensor([[0], [1], [1], [1]])
    joint = {(0, 0): 0.25, (0, 1): 0.25, (7, 1): 0.5}
    token, expert = {0: 0.5, 7: 0.5}, torch.tensor([0.25, 0.75])
    known = sum(p * torch.log(p / (token[t] * expert[e]))
                for (t, e), p in joint.items())
    entropy = -(expert * expert.log()).sum()
    assert information(tokens, experts, 2) == pytest.approx(float(known / entropy), rel=1e-5)


def test_a_trained_run_has_a_diet_above_chance(fira, trained_run, corpus):
    text_file = min(corpus.iterdir())
    answer = fira("eval", trained_run, "--text", text_file, "--routing", "--json")
    routing = json.loads(answer.out)["routing"]
    assert len(routing["diet"]) == 2
    assert max(layer["own"] for layer in routing["diet"]) > 0.02
    assert routing["bits_per_byte"] != routing["bits_per_byte_experts_exchanged"]
    assert "by chance" in fira("eval", trained_run, "--text", text_file, "--routing").out


def test_equal_experts_are_interchangeable(trained_run, text_file, tmp_path):
    model = load_pretrained(trained_run)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".experts." in name:
                weight.copy_(weight[:1].expand_as(weight).clone())
    save_weights(model, tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(
        next(trained_run.glob("step-*/tokenizer.json")).read_bytes())
    found = specialization(str(tmp_path), [str(text_file)], "cpu")
    assert found["bits_per_byte_experts_exchanged"] == pytest.approx(found["bits_per_byte"], 1e-5)
