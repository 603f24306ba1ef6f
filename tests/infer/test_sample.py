"""Penalties, biases and cuts against their formulas, one token at a time in plain Python."""
from __future__ import annotations

import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fira.infer.request import SamplingParams, choose_token, penalize
from fira.model.generate import nucleus, sample


def choose(logits, prompt, new, seed=0, **params):
    generator = torch.Generator().manual_seed(seed)
    return choose_token(logits, prompt, new, SamplingParams(**params), generator)


@given(st.lists(st.floats(-5, 5, width=32), min_size=8, max_size=8),
       st.lists(st.integers(0, 7)), st.lists(st.integers(0, 7)),
       st.floats(0.5, 2), st.floats(-2, 2), st.floats(-2, 2),
       st.dictionaries(st.integers(0, 7), st.floats(-9, 9)))
@settings(max_examples=200, deadline=None)
def test_penalties_equal_their_formulas(logits, prompt, new, repetition, presence, frequency,
                                        bias) -> None:
    params = SamplingParams(repetition_penalty=repetition, presence_penalty=presence,
                            frequency_penalty=frequency, logit_bias=bias)
    expected = []
    for token, logit in enumerate(logits):
        if token in [*prompt, *new]:
            logit = logit / repetition if logit > 0 else logit * repetition
        if token in new:
            logit -= new.count(token) * frequency + presence
        expected.append(logit + bias.get(token, 0))
    given = torch.tensor(logits)
    found = penalize(given, prompt, new, params)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), rtol=1e-5,
                               atol=1e-5)
    assert given.tolist() == torch.tensor(logits).tolist()


@pytest.mark.parametrize("cuts", [{}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.3},
                                  {"top_k": 6, "top_p": 0.8, "min_p": 0.2}, {"top_p": 1e-6},
                                  {"temperature": 0.5}, {"temperature": 2.0, "top_p": 0.7}])
def test_draws_follow_the_distribution_that_the_cuts_leave(cuts) -> None:
    logits = torch.tensor([0.02, 0.3, 0.1, 0.25, 0.05, 0.13, 0.07, 0.08]).log()
    probs = (logits / cuts.get("temperature", 1)).softmax(-1).tolist()
    order = sorted(range(8), key=lambda token: -probs[token])[:cuts.get("top_k")]
    mass, kept = sum(probs[token] for token in order), []
    for token in order:
        if sum(probs[one] for one in kept) < cuts.get("top_p", 1) * mass:
            kept.append(token)
    kept = [token for token in kept if probs[token] >= cuts.get("min_p", 0) * max(probs)]
    expected = torch.zeros(8)
    for token in kept:
        expected[token] = probs[token] / sum(probs[one] for one in kept)
    drawn = sample(logits.expand(20000, 8), **cuts,
                   generator=torch.Generator().manual_seed(0)).bincount(minlength=8) / 20000
    assert (drawn > 0).equal(expected > 0)
    torch.testing.assert_close(drawn, expected, rtol=0, atol=0.015)


def nucleus_by_sorting(probs_V, top_p):
    reached, wanted = 0.0, top_p * sum(sorted(probs_V, reverse=True))
    for least in sorted(probs_V, reverse=True):
        reached += least
        if reached >= wanted:
            return [prob if prob >= least else 0 for prob in probs_V]
    raise AssertionError(top_p)


@pytest.mark.parametrize("top_p", [1e-9, 0.5, 0.9, 0.999, 1])
@pytest.mark.parametrize("spread", [0, 1e-3, 0.1, 3, 100, "ties"])
def test_top_p_keeps_what_the_definition_keeps(spread, top_p) -> None:
    logits = torch.randn(2, 900, generator=torch.Generator().manual_seed(1))
    logits = logits.round() if spread == "ties" else logits * spread
    rows = logits.softmax(-1)
    expected = torch.tensor([nucleus_by_sorting(row, top_p) for row in rows.tolist()])
    assert torch.equal(nucleus(rows, top_p), expected)
    drawn = sample(logits.repeat(500, 1), top_p=top_p, generator=torch.Generator().manual_seed(2))
    assert (expected.repeat(500, 1).gather(1, drawn[:, None]) > 0).all()


def test_top_p_of_a_flat_distribution_takes_less_time_than_sorting_it() -> None:
    logits = torch.randn(1, 50_304, generator=torch.Generator().manual_seed(1))

    def seconds(operation) -> float:
        began = time.thread_time()
        operation()
        return time.thread_time() - began

    pairs = [(seconds(lambda: sample(logits, top_p=0.95)), seconds(logits.argsort))
             for _ in range(9)]
    cut, sort = (min(times) for times in zip(*pairs, strict=True))
    assert cut < sort / 2  # 0.1


def test_a_forbidden_token_is_never_chosen() -> None:
    bias = {1: -math.inf, 2: -math.inf}
    drawn = {choose(torch.zeros(4), [0], [], seed, temperature=5.0, logit_bias=bias)
             for seed in range(100)}
    assert drawn == {0, 3}
    with pytest.raises(ValueError, match="forbids every token"):
        choose(torch.zeros(3), [0], [], logit_bias=dict.fromkeys(range(3), -math.inf))


@pytest.mark.parametrize("field, value", [
    ("temperature", -1.0), ("top_k", 0), ("top_p", 0.0), ("min_p", 2.0), ("stop", ("",)),
    ("logit_bias", {1: math.inf}), ("logit_bias", {1: math.nan}), ("logprobs", -1),
    ("repetition_penalty", 0.0), ("max_new_tokens", -1)])
def test_values_out_of_range_are_refused_by_name(field, value) -> None:
    with pytest.raises(ValueError, match=f"^{field}="):
        SamplingParams(**{field: value})


def test_the_coldest_temperatures_are_greedy() -> None:
    logits = torch.tensor([1.0, 60.0, 59.9])
    assert {choose(logits, [], [], temperature=t) for t in (1e-300, 1e-45, 1e-38, 9e-7)} == {1}
