"""Rollouts are what the model samples: with its log-probabilities, and always the same ones."""
import pytest
import torch

from fira.data.chat import prompt_ids
from fira.data.tokenizer import THINK
from fira.infer.load import load
from fira.infer.request import SamplingParams
from fira.model.router import Watch
from fira.stages import rollouts
from fira.stages.rollouts import draw_seed, write_answers

WORDS = ["war", "peace and law", "the state of the Union is", "a"]
SEEDS = [draw_seed(1, number, place) for number in range(4) for place in range(3)]


@pytest.fixture(scope="module")
def made(trained_run):
    model, tokenizer, _ = load(trained_run)
    prompts = [prompt_ids(tokenizer, [{"role": "user", "content": words}], tuned=True)
               for words in WORDS]
    return model, tokenizer, [ids for ids in prompts for _ in range(3)]


@pytest.mark.parametrize("slots", [128, 5])
def test_log_probabilities_and_experts_are_those_of_one_row(made, slots, monkeypatch):
    monkeypatch.setattr(rollouts, "SLOTS", slots)
    model, tokenizer, prompts = made
    model.train()
    found = write_answers(model, tokenizer, prompts, SEEDS, SamplingParams(12, experts=True))
    assert model.training and len({one.text for one in found}) > 6
    model.eval()
    for ids, one in zip(prompts, found, strict=True):
        row = torch.from_numpy(one.row.ids).long()
        with torch.no_grad(), Watch(model) as watch:
            logs_TV = model(row[None, :-1])[0].log_softmax(-1)
        logs_A = logs_TV.gather(1, row[1:, None])[len(ids) - 1:, 0]
        torch.testing.assert_close(torch.from_numpy(one.logs_A), logs_A, rtol=0, atol=1e-4)
        assert one.truncated == (len(logs_A) == 12 and row[-1] not in (
            tokenizer.end_of_text, tokenizer.special("<|im_end|>")))
        for layer, experts_SK in zip(watch.experts, one.experts_LSK, strict=True):
            assert torch.equal(layer.sort().values, torch.from_numpy(experts_SK).long().sort()[0])


def test_the_same_seeds_give_the_same_bits_again(made):
    model, tokenizer, prompts = made
    first, again = (write_answers(model, tokenizer, prompts, SEEDS, SamplingParams(12))
                    for _ in range(2))
    for one, two in zip(first, again, strict=True):
        assert one.text == two.text and (one.logs_A == two.logs_A).all()


def test_tokens_that_close_a_thought_at_its_limit_are_not_trained_on(made):
    model, tokenizer, prompts = made
    prompts = [[*ids, tokenizer.special(THINK)] for ids in prompts]
    for ids, one in zip(prompts, write_answers(model, tokenizer, prompts, SEEDS, SamplingParams(
            12, max_thinking_tokens=3)), strict=True):
        untrained = tokenizer.decode(one.row.ids[len(ids):][~one.row.trained[len(ids):]].tolist())
        if one.text.startswith("<think>"):
            assert "</think>" in one.text and untrained in ("\n</think>\n\n", "</think>\n\n"), one
    assert "</think>" in untrained
