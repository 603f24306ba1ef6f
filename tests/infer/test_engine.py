"""The engine's tokens are those of one request computed alone, token by token."""
from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from fira.infer.cache import Part, SlotBatch, SlotCache
from fira.infer.engine import Engine
from fira.infer.request import End, SamplingParams
from fira.model.router import Watch
from fira.model.spec import FIRA2Spec, FIRASpec
from tests.models import build

SHAPE = dict(vocab_size=320, d_model=32, n_head=4, num_layers=2, d_ff=32, num_experts=4, top_k=2,
             context=96)
SPECS = {"fira": FIRASpec(**SHAPE), "fira2": FIRA2Spec(**SHAPE, n_kv_head=2, head_dim=16),
         "dense": FIRA2Spec(**SHAPE | {"num_experts": 1, "top_k": 1}, n_kv_head=2, head_dim=16)}
GREEDY = dict(max_new_tokens=20, temperature=0.0, ignore_end=True)
PROMPTS = [list(range(5, 5 + length)) for length in (1, 40, 3, 17, 60, 2, 2)]


@pytest.fixture(scope="module", params=list(SPECS))
def either(request):
    return build(SPECS[request.param], seed=1).eval()


def run(model, tokenizer, prompts, params, **options) -> list[list]:
    """The events of each prompt, all in one engine."""
    engine = Engine(model, tokenizer, **options)
    events: list[list] = [[] for _ in prompts]
    for prompt, one, seen in zip(prompts, params, events, strict=True):
        engine.add(prompt, SamplingParams(**one), seen.append)
    engine.close(drain=True)
    assert all(isinstance(seen[-1], End) for seen in events)
    return events


def ids(events) -> list[int]:
    return [token.id for token in events[:-1]]


@torch.no_grad()
def naive(model, prompt, new) -> list[int]:
    """Greedy tokens with everything read anew for each."""
    known = list(prompt)
    for _ in range(new):
        known.append(int(model(torch.tensor([known]))[0, -1].argmax()))
    return known[len(prompt):]


@pytest.mark.parametrize("options", [
    {"slots": 1}, {"slots": 3, "prefill_tokens": 7}, {"slots": 8, "prefill_tokens": 512}])
def test_greedy_tokens_equal_naive_recomputation(either, tokenizer, options):
    events = run(either, tokenizer, PROMPTS, [GREEDY] * len(PROMPTS), **options)
    for prompt, seen in zip(PROMPTS, events, strict=True):
        assert ids(seen) == naive(either, prompt, 20)
        assert (seen[-1].reason, seen[-1].new_tokens) == ("length", 20)


def test_a_request_does_not_depend_on_what_else_is_in_the_batch(either, tokenizer):
    params = [dict(max_new_tokens=15, seed=n, temperature=0.5 + n / 4, top_k=(None, 9)[n % 2],
                   top_p=(1.0, 0.8)[n % 3 == 0], frequency_penalty=n / 5) for n in range(7)]
    together = run(either, tokenizer, PROMPTS, params, slots=7)
    crowded = run(either, tokenizer, PROMPTS, params, slots=2, prefill_tokens=5)
    for prompt, one, *seen in zip(PROMPTS, params, together, crowded, strict=True):
        (alone,) = run(either, tokenizer, [prompt], [one], slots=1)
        assert ids(seen[0]) == ids(seen[1]) == ids(alone)
        assert len(ids(alone)) > 0


def test_a_seed_fixes_the_answer_and_none_gives_another(model, tokenizer):
    def answer(seed):
        params = dict(max_new_tokens=20, seed=seed, ignore_end=True)
        return ids(run(model, tokenizer, [[7, 8]], [params])[0])
    assert answer(1) == answer(1) != answer(2)
    assert answer(None) != answer(None)


def test_attention_in_one_masked_call_equals_part_by_part(either):
    logits = []
    for at_once in (True, False):
        cache = SlotCache(either, 4, 32)
        generator = torch.Generator().manual_seed(0)
        for rows in (cache.keys, cache.values):
            rows.normal_(generator=generator)
        batch = SlotBatch(cache, [Part(3, 5, 1), Part(0, 31, 1), Part(1, 0, 1)])
        batch.single_tokens = at_once
        with torch.no_grad():
            logits.append(either.logits(either.features(torch.tensor([[4, 5, 6]]), batch)))
        logits.append(cache.keys)
    torch.testing.assert_close(logits[0], logits[2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits[1], logits[3], rtol=1e-5, atol=1e-5)


def test_the_cache_takes_memory_as_it_fills(either):
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
    before, cache = resident(), SlotCache(either, 8, 2**16)
    assert cache.keys.nbytes + cache.values.nbytes > 2**27 > 16 * (resident() - before)
    cache.values[:, :2] = 1
    assert cache.values.nbytes / 4 <= resident() - before < cache.values.nbytes / 2
    assert not cache.keys.any() and not cache.values[:, 2:].any()


@pytest.mark.parametrize("slots", [2**40, 2**60])
def test_a_cache_that_no_machine_holds_is_one_line(model, slots):
    with pytest.raises(ValueError, match="a cache of .* GB is more .* --cache float16"):
        SlotCache(model, slots, 64)


def test_reusing_a_prefix_changes_nothing_but_work(either, tokenizer):
    shared = list(range(10, 50))
    prompts = [[*shared, 60 + n, 70 + n] for n in range(4)]
    fresh = [ids(run(either, tokenizer, [prompt], [GREEDY])[0]) for prompt in prompts]
    engine = Engine(either, tokenizer, slots=3)
    cached = []
    for prompt, expected in zip([*prompts, prompts[0]], [*fresh, fresh[0]], strict=True):
        *tokens, end = engine.stream(prompt, SamplingParams(**GREEDY))
        assert [token.id for token in tokens] == expected
        cached.append(end.cached_tokens)
    # the fourth takes the slot of the first, so of the first only what all share is left
    assert cached == [0, 40, 40, 40, 40]
    *_, end = engine.stream([*prompts[3], *fresh[3], 5], SamplingParams(**GREEDY))
    assert end.cached_tokens == len(prompts[3]) + 19  # a longer chat reads only what is new
    engine.close()


def test_prompts_that_come_together_read_what_they_share_once(either, tokenizer):
    shared = list(range(10, 50))
    prompts = [[*shared, 60 + n] for n in range(4)]
    events = run(either, tokenizer, prompts, [GREEDY] * 4, slots=4, prefill_tokens=16)
    assert [seen[-1].cached_tokens for seen in events] == [0, 32, 32, 32]  # 8 more: no wait
    for prompt, seen in zip(prompts, events, strict=True):
        assert ids(seen) == naive(either, prompt, 20)


def test_the_answer_ends_at_the_capacity(model, tokenizer):
    events = run(model, tokenizer, [[5] * 10, [6] * 16],
                 [dict(GREEDY, max_new_tokens=99)] * 2, capacity=16)
    assert [seen[-1].reason for seen in events] == ["length", "length"]
    assert [len(ids(seen)) for seen in events] == [7, 1]
    assert ids(events[0]) == naive(model, [5] * 10, 7)


def test_scores_are_the_models_own_log_probabilities(either, tokenizer):
    prompt = PROMPTS[4]
    params = dict(GREEDY, max_new_tokens=4, logprobs=3, prompt_logprobs=2, repetition_penalty=1.3)
    (seen,) = run(either, tokenizer, [prompt], [params], prefill_tokens=9)
    whole = torch.tensor([[*prompt, *ids(seen)]])
    with torch.no_grad():
        logprobs_TV = either(whole)[0].log_softmax(-1)
    assert seen[-1].prompt[0].logprob is None and len(seen[-1].prompt) == len(prompt)
    scored = [*seen[-1].prompt[1:], *(token.score for token in seen[:-1])]
    for place, one in enumerate(scored):
        assert one.id == whole[0, place + 1]
        assert one.logprob == pytest.approx(float(logprobs_TV[place, one.id]), abs=1e-4)
        best = logprobs_TV[place].topk(len(one.top))
        assert [token for token, _ in one.top] == best.indices.tolist()
        assert [value for _, value in one.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert {len(one.top) for one in scored[:len(prompt) - 1]} == {2}
    assert len(scored[-1].top) == 3


@pytest.mark.parametrize("budget", [1, 7, 512])
def test_an_embedding_is_the_mean_however_its_prompt_is_read(either, tokenizer, budget):
    events = run(either, tokenizer, PROMPTS[1:5], [dict(max_new_tokens=0, embed_from=2)] * 4,
                 prefill_tokens=budget, slots=3)
    for prompt, (end,) in zip(PROMPTS[1:5], events, strict=True):
        with torch.no_grad():
            mean_D = either.features(torch.tensor([prompt]))[0, 2:].mean(0)
        torch.testing.assert_close(torch.tensor(end.embedding), mean_D / mean_D.norm())


def test_a_prompt_may_be_scored_without_an_answer(model, tokenizer):
    (seen,) = run(model, tokenizer, [PROMPTS[1]], [dict(max_new_tokens=0, prompt_logprobs=0)])
    assert len(seen) == 1 and len(seen[0].prompt) == 40 and seen[0].reason == "length"


@pytest.mark.parametrize("name", ["fira", "fira2"])
def test_experts_and_loads_are_the_routers_choices(name, tokenizer):
    model = build(SPECS[name], seed=1).eval()
    engine = Engine(model, tokenizer)
    params = SamplingParams(**GREEDY | {"max_new_tokens": 5}, experts=True)
    *tokens, _ = engine.stream(PROMPTS[3], params)
    with torch.no_grad(), Watch(model) as watch:
        model(torch.tensor([[*PROMPTS[3], *(token.id for token in tokens)]]))
    start = len(PROMPTS[3]) - 1
    for layer, experts_NK in enumerate(watch.experts):
        for place, token in enumerate(tokens, start):
            assert list(token.experts[layer]) == experts_NK[place].tolist()
        counts = experts_NK[:-1].flatten().bincount(minlength=4)  # the last token is never read
        assert engine.loads[layer] == counts.tolist()
    engine.close()
    assert not any(block.moe.router._forward_hooks for block in model.blocks)


class OtherStep:
    """A decode step that keeps a copy of the weights, as a quantized one does."""

    def __init__(self, model):
        self.model, self.copy, self.calls = model, build(model.spec, seed=1), []
        self.refresh()

    def refresh(self):
        self.copy.load_state_dict(self.model.state_dict())

    def __call__(self, model, cache, tokens_N, parts):
        self.calls.append((tokens_N.tolist(), parts))
        batch = SlotBatch(cache, parts)
        return self.copy.logits(self.copy.features(tokens_N[None], batch)[0, batch.lasts_P]), None


def test_another_decode_step_plugs_in(model, tokenizer):
    step = OtherStep(model)
    engine = Engine(model, tokenizer, slots=2, decode_step=step)
    params = SamplingParams(**GREEDY | {"max_new_tokens": 4})
    made = ids(list(engine.stream([9, 8, 7], params)))
    assert made == naive(model, [9, 8, 7], 4)
    assert step.calls == [([token], [(0, 3 + n, 1)]) for n, token in enumerate(made[:3])]
    step.prompt_tokens = 3
    step.calls.clear()
    assert ids(list(engine.stream([1, 8, 7], params))) == naive(model, [1, 8, 7], 4)
    assert len(step.calls) == 4 and step.calls[0][0] == [1, 8, 7]


@pytest.mark.parametrize("compiled", [False, True])
def test_after_refresh_new_weights_answer_and_nothing_of_the_old_ones(tokenizer, compiled):
    model = build(SPECS["fira2"], seed=1).eval()
    engine = Engine(model, tokenizer)
    if compiled:
        engine.decode_step = OtherStep(model)
    prompt, params = PROMPTS[1], SamplingParams(**GREEDY)
    before = ids(list(engine.stream(prompt, params)))
    model.load_state_dict(build(SPECS["fira2"], seed=2).state_dict())
    engine.refresh()
    events = list(engine.stream(prompt, params))
    assert events[-1].cached_tokens == 0
    assert ids(events) == naive(model, prompt, 20) != before
    engine.close()


def test_refresh_is_refused_while_requests_are_running_or_waiting(model, tokenizer):
    engine = Engine(model, tokenizer, slots=1)
    numbers = [engine.add(PROMPTS[0], SamplingParams(**GREEDY), print) for _ in range(2)]
    engine.step()
    for number in numbers:
        with pytest.raises(ValueError, match="running or waiting requests.*cancel them"):
            engine.refresh()
        engine.cancel(number)
        engine.step()
    engine.refresh()
    engine.close()
