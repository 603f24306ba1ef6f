"""Generation with a cache equals generation without one, and refuses what it cannot do."""
from __future__ import annotations

import pytest
import torch

from fira.model.generate import sample, stream
from tests.models import NAMES, build, tiny_spec


def make(name, **fields):
    return build(tiny_spec(name, **fields), seed=0, std=0.5)


@torch.no_grad()
def uncached(model, ids_BT, max_new_tokens, choose=lambda logits: logits.argmax(-1)):
    """The window rule with every token read anew at each step."""
    model.eval()
    context = model.spec.context
    out_BT, window_BT = ids_BT, ids_BT[:, -context:]
    for _ in range(max_new_tokens):
        if window_BT.shape[1] > context:
            window_BT = window_BT[:, -max(1, context // 2):]
        token_B1 = choose(model(window_BT)[:, -1])[:, None]
        out_BT = torch.cat([out_BT, token_B1], dim=1)
        window_BT = torch.cat([window_BT, token_B1], dim=1)
    return out_BT


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("context, length, new", [
    (12, 3, 6), (12, 1, 30), (12, 12, 5), (12, 25, 20), (1, 2, 9), (2, 2, 9), (3, 2, 9)])
def test_cached_generation_equals_uncached(name, top_k, context, length, new):
    model = make(name, top_k=top_k, context=context)
    ids_BT = torch.randint(31, (3, length), generator=torch.Generator().manual_seed(0))
    expected = uncached(model, ids_BT, new)
    assert torch.equal(model.generate(ids_BT, new, temperature=0), expected)
    assert len(expected[:, length:].unique()) > 2 or context < 12  # short contexts repeat


def test_sampled_generation_equals_uncached_with_the_same_draws():
    model, ids_BT = make("fira2", top_k=2), torch.randint(31, (2, 4))
    generator = torch.Generator().manual_seed(5)
    expected = uncached(model, ids_BT, 20, lambda x: sample(x, 0.8, 10, 0.9, generator))
    ours = model.generate(ids_BT, 20, temperature=0.8, top_k=10, top_p=0.9, seed=5)
    assert torch.equal(ours, expected)


def test_the_length_trained_on_bounds_the_window_as_the_context_does():
    model, short = make("fira2"), make("fira2", context=6)
    model.trained_length = 6
    found = model.generate([1, 2, 3], 20, temperature=0)
    assert torch.equal(found, short.generate([1, 2, 3], 20, temperature=0))
    assert not torch.equal(found, make("fira2").generate([1, 2, 3], 20, temperature=0))


def test_every_form_of_prompt_gives_the_same_tokens():
    model = make("fira")
    expected = model.generate([3, 4, 5], 4, temperature=0)
    assert expected.dtype == torch.int64
    assert expected.shape == (1, 7)
    for ids in ([[3, 4, 5]], torch.tensor([3, 4, 5]), torch.tensor([[3, 4, 5]], dtype=torch.int32)):
        assert torch.equal(model.generate(ids, 4, temperature=0), expected)
    both = model.generate([[3, 4, 5], [6, 7, 8]], 4, temperature=0)
    assert torch.equal(both[:1], expected)
    assert model.generate([3, 4], 0).tolist() == [[3, 4]]


def test_seeds_fix_the_draw_and_none_follows_the_global_generator():
    model = make("fira")
    assert torch.equal(model.generate([1], 20, seed=1), model.generate([1], 20, seed=1))
    assert not torch.equal(model.generate([1], 20, seed=1), model.generate([1], 20, seed=2))
    torch.manual_seed(3)
    first = model.generate([1], 20)
    assert not torch.equal(first, model.generate([1], 20))
    torch.manual_seed(3)
    assert torch.equal(first, model.generate([1], 20))


def test_generation_stops_at_end_of_text_and_fills_rows_that_ended():
    model = make("fira")
    free = uncached(model, torch.tensor([[1], [2]]), 10)
    end = int(free[0, 4])
    ends = [row.tolist().index(end) if end in row else 10 for row in free[:, 1:]]
    model.end_of_text = end
    out = model.generate([[1], [2]], 10, temperature=0)
    assert out.shape[1] == 1 + min(10, max(ends) + 1)
    for row, full, stop in zip(out[:, 1:], free[:, 1:], ends, strict=True):
        assert torch.equal(row[:stop + 1], full[:stop + 1][:len(row)])
        assert row[stop:].eq(end).all()
    assert torch.equal(model.generate([[1], [2]], 10, temperature=0, end_of_text=-1), free)


def test_stream_yields_what_generate_returns_and_restores_training_mode():
    model = make("fira2", num_experts=1, top_k=1).train()
    tokens = torch.stack(list(stream(model, [5, 6], 7, seed=1)), dim=1)
    assert model.training
    assert torch.equal(tokens, model.generate([5, 6], 7, seed=1)[:, 2:])
    unfinished = stream(model, [5, 6], 7, seed=1)
    next(unfinished)
    unfinished.close()
    assert model.training


@pytest.mark.parametrize("ids, arguments, words", [
    ([], {}, "prompt is empty; give"), ([[]], {}, "prompt is empty; give"),
    (torch.zeros(2, 0, dtype=torch.long), {}, "prompt is empty; give"),
    ([31], {}, "token id 31 is outside the vocabulary of 31"),
    ([-1], {}, "token id -1 is outside"), ([[1], [1, 2]], {}, "rows differ in length"),
    ("text", {}, "not token ids"), ([1.5], {}, "encode the text first"),
    ([1], {"temperature": -1}, "temperature=-1 must"),
    ([1], {"temperature": float("nan")}, "temperature=nan must"),
    ([1], {"top_k": 0}, "top_k=0 must"), ([1], {"top_p": 0.0}, "top_p=0.0 must"),
    ([1], {"top_p": 1.1}, "top_p=1.1 must"), ([1], {"max_new_tokens": -1}, "max_new_tokens=-1")])
def test_wrong_requests_are_refused_in_one_line(ids, arguments, words):
    with pytest.raises(ValueError, match=words) as caught:
        make("fira").generate(ids, **arguments)
    assert "\n" not in str(caught.value)
