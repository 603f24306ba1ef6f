"""Specialization: nothing by chance, everything when the token decides, a number for real runs."""
import itertools
import json

import pytest
import torch

from fira.convert.quantize import quantize
from fira.eval.bits_per_byte import evaluate
from fira.eval.specialization import _exchanged, information, specialization
from fira.model import load_pretrained


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


def test_a_trained_run_shows_token_information_above_chance(fira, trained_run, corpus):
    text_file = min(corpus.iterdir())
    answer = fira("eval", trained_run, "--text", text_file, "--routing", "--json")
    routing = json.loads(answer.out)["routing"]
    assert len(routing["token_information"]) == 2
    assert max(layer["above_chance"] for layer in routing["token_information"]) > 0.02
    assert routing["bits_per_byte"] != routing["bits_per_byte_experts_exchanged"]
    assert "by chance" in fira("eval", trained_run, "--text", text_file, "--routing").out


def test_bits_per_byte_are_those_of_the_plain_evaluation(trained_run, corpus):
    text_file = str(min(corpus.iterdir()))
    found = specialization(str(trained_run), [text_file], "cpu")
    plain = evaluate(trained_run, [text_file], device="cpu")
    assert found["bits_per_byte"] == pytest.approx(plain["bits_per_byte"], rel=1e-6)
    assert found["tokens"] == plain["tokens"]


@pytest.mark.parametrize("kind", [None, "int8"])
def test_exchanging_experts_routes_every_token_to_the_next_expert(trained_run, kind):
    """The weights go round by one place for the time of the block, and the router's stay."""
    model = load_pretrained(trained_run)
    if kind:
        model = quantize(model, kind)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    moe, x_ND = model.blocks[0].moe, torch.randn(5, model.spec.d_model)
    weights_NK, experts_NK = moe.router(x_ND)
    E = model.spec.num_experts
    expected_ND = torch.zeros_like(x_ND)
    for n, k in itertools.product(range(5), range(experts_NK.shape[1])):
        counts_E = torch.zeros(E, dtype=torch.long)
        counts_E[(experts_NK[n, k] + 1) % E] = 1
        expected_ND[n] += weights_NK[n, k] * moe.experts(x_ND[n:n + 1], counts_E)[0]
    with torch.inference_mode(), _exchanged(model):
        found_ND = moe(x_ND[None])[0]
    torch.testing.assert_close(found_ND, expected_ND.detach(), rtol=1e-5, atol=1e-5)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), name
