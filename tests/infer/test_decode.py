"""The compiled step equals the model it replaces, for every architecture, slot and precision."""
from __future__ import annotations

import copy
import gc
import inspect
import re
import threading

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fira.convert.quantize import Quantized, load_model, quantize
from fira.infer import decode
from fira.infer.cache import Part, SlotBatch, SlotCache
from fira.infer.decode import find_obstacle, open_step
from fira.infer.engine import Engine
from fira.infer.request import SamplingParams, Token
from fira.model.spec import FIRA2Spec, FIRASpec
from tests.models import build

pytest.importorskip("numba")

from fira.infer.decode import kernel, product  # noqa: E402
from fira.infer.decode import step as steps  # noqa: E402
from fira.infer.decode.step import FusedStep  # noqa: E402

SMALL = dict(vocab_size=96, d_model=32, n_head=4, num_layers=2, d_ff=64, context=24)
GROUPED = dict(n_kv_head=2, head_dim=16)
SPECS = {
    "fira2": FIRA2Spec(**SMALL, **GROUPED, num_experts=8, top_k=3),
    "fira2, biased choice": FIRA2Spec(**SMALL, **GROUPED, num_experts=8, top_k=3, balance="bias"),
    "fira2, top-1, every head its own keys": FIRA2Spec(**SMALL, n_kv_head=4, head_dim=8, top_k=1),
    "fira2, dense": FIRA2Spec(**SMALL, **GROUPED, num_experts=1),
    "fira2, raw weights": FIRA2Spec(**SMALL, **GROUPED, num_experts=4, top_k=2, renormalize=False,
                                    norm_eps=1e-3),
    "fira2, untied": FIRA2Spec(**SMALL, **GROUPED, num_experts=4, top_k=2, tied=False),
    "fira": FIRASpec(**SMALL, num_experts=4, top_k=1),
    "fira, top-2": FIRASpec(**SMALL, num_experts=4, top_k=2),
    "fira, dense": FIRASpec(**SMALL, num_experts=1),
}


@pytest.fixture(autouse=True)
def together(monkeypatch):
    """All threads compute every step, however small."""
    monkeypatch.setattr(steps, "ALONE", 0)


def make(name):
    """A model whose norms and biases are not the neutral ones that training starts from."""
    model = build(SPECS[name], seed=1).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for path, tensor in model.state_dict().items():
            if tensor.dim() == 1 or tensor.shape[0] == 1 or path.endswith("bias"):
                tensor += 0.3 * torch.randn(tensor.shape, generator=generator)
    return model


def compare(model, step, reference, rows=2, length=20, dtype=None, atol=1e-4):
    """Both read the same tokens one by one; `reference` is (tokens_B1, cache) -> logits_BV. The
    step's cache has the type `dtype`."""
    tokens_BT = torch.randint(96, (rows, length), generator=torch.Generator().manual_seed(0))
    cache, slots = model.new_cache(rows), SlotCache(model, rows + 2, 24, dtype)
    with torch.inference_mode():
        for place, token_B in enumerate(tokens_BT.T):
            expected_BV = reference(token_B[:, None], cache)
            logits_BV, _ = step(model, slots, token_B,
                                [Part(slot, place, 1) for slot in range(2, rows + 2)])
            torch.testing.assert_close(logits_BV, expected_BV, rtol=0, atol=atol)
            assert dtype or torch.equal(logits_BV.argmax(-1), expected_BV.argmax(-1))


def last_logits(model):
    return lambda tokens_BT, cache: model(tokens_BT, cache)[:, -1]


def first_logits(model, step, tokens=(3,)):
    """Logits after one token in each slot."""
    parts = [Part(slot, 0, 1) for slot in range(len(tokens))]
    return step(model, SlotCache(model, len(tokens), 1), torch.tensor(tokens), parts)[0]


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("rows", [1, 3])
def test_step_equals_the_model_over_a_whole_sequence(name, rows):
    model = make(name)
    compare(model, FusedStep(model), last_logits(model), rows, length=24)


@pytest.mark.parametrize("step", [FusedStep, lambda model: plain_step])
@pytest.mark.parametrize("name", ["fira2", "fira"])
def test_a_cache_in_16_bits_rounds_what_it_holds_and_nothing_else(name, step):
    model = make(name)
    compare(model, step(model), last_logits(model), length=24, dtype=torch.float16, atol=2e-2)
    caches = [SlotCache(model, 1, 24, dtype) for dtype in (None, torch.float16)]
    for cache in caches:
        step(model)(model, cache, torch.tensor([5, 6, 7]), [Part(0, 0, 3)])
    wide, half = caches  # the first layer's rows depend on no others
    assert torch.equal(half.keys[0], wide.keys[0].half())
    assert torch.equal(half.values[0], wide.values[0].half())


@torch.inference_mode()
def plain_step(model, cache, tokens_N, parts):
    batch = SlotBatch(cache, parts)
    return model.logits(model.features(tokens_N[None], batch)[0, batch.lasts_P]), None


@pytest.mark.parametrize("kind", [None, "int8", "int4"])
@pytest.mark.parametrize("name", ["fira2", "fira"])
def test_generation_with_the_step_equals_generation_without(name, kind, tokenizer):
    model = make(name)
    if kind:
        quantize(model, kind)
    params = SamplingParams(max_new_tokens=60, temperature=0, ignore_end=True)
    engine = Engine(model, tokenizer, slide=True, decode_step=FusedStep(model))
    found = [event.id for event in engine.stream([5, 6, 7], params) if isinstance(event, Token)]
    expected = model.generate([5, 6, 7], 60, temperature=0, end_of_text=-1)[0, 3:].tolist()
    assert found == expected  # 60 tokens: the window is shortened more than once
    assert len(set(found)) > 2
    engine.close()


@pytest.mark.parametrize("name", ["fira2", "fira", "fira2, dense"])
@pytest.mark.parametrize("first", [1, 2, 6])
def test_parts_of_any_size_stand_in_any_slot_at_any_position(name, first):
    model = make(name)
    step, cache = FusedStep(model), SlotCache(model, 5, 24)
    texts = {4: [1, 2, 3], 0: [9, 8, 7, 6, 5, 4], 2: [30]}
    for starts in (0, first):
        given = {slot: text[starts:] if starts else text[:first] for slot, text in texts.items()}
        parts = [Part(slot, starts, len(ids)) for slot, ids in given.items() if ids]
        logits_PV, experts_LNK = step(model, cache, torch.tensor(sum(given.values(), [])), parts)
        with torch.inference_mode():
            expected = [model(torch.tensor([texts[part.slot][:part.start + part.size]]))[0, -1]
                        for part in parts]
        torch.testing.assert_close(logits_PV, torch.stack(expected), rtol=0, atol=1e-4)
        assert experts_LNK is None or experts_LNK.shape[1] == sum(map(len, given.values()))
        if first == 6:
            break


def test_the_engine_gives_the_same_tokens_and_experts_with_it(tokenizer):
    model = make("fira2")
    params = SamplingParams(max_new_tokens=12, temperature=0, experts=True, ignore_end=True)
    found = []
    step = FusedStep(model)
    step.prompt_tokens = 16
    for fused in (None, step):
        engine = Engine(model, tokenizer, slots=3, decode_step=fused)
        prompts = ([1, 2, 3], [4, 5] * 9, [6])  # the second is too long for the step
        events = [list(engine.stream(prompt, params)) for prompt in prompts]
        found.append([[(e.id, e.experts) for e in stream[:-1]] for stream in events])
        engine.close()
    assert found[0] == found[1]


def test_every_number_of_threads_gives_the_same_bits():
    model = make("fira2")
    alone, together = (first_logits(model, FusedStep(model, threads=threads), (3, 4))
                       for threads in (1, 3))
    assert torch.equal(alone, together)


def test_a_small_step_is_computed_by_one_thread_and_a_large_one_by_all(monkeypatch):
    model = make("fira2")
    step, counts = FusedStep(model, threads=2), []
    monkeypatch.setattr(steps, "ALONE", 2 * step.active)
    monkeypatch.setattr(steps, "decode_step", lambda rank, count, *rest: (
        counts.append(count), kernel.decode_step(rank, count, *rest)))
    for tokens in ((3,), (3, 4, 5), (3, 4), (3, 4, 5), (3,)):
        assert torch.equal(first_logits(model, step, tokens)[0], first_logits(model, step)[0])
    assert counts == [1, 1, 1, 1, 1, 1, 1, 1]  # the calls of three tokens are the threads'


@pytest.mark.parametrize("precision", ["float32", "int8", "int4"])
def test_changed_weights_are_read_at_once_in_float32_and_else_after_refresh(precision):
    model = make("fira")
    step = FusedStep(model, precision)
    before = first_logits(model, step)
    with torch.inference_mode():
        model.blocks[0].moe.experts.up.weight.mul_(0.5)
    assert torch.equal(first_logits(model, step), before) == (precision != "float32")
    step.refresh()
    after = first_logits(model, step)
    assert torch.equal(after, first_logits(model, FusedStep(model, precision)))
    assert (after - before).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["fira2", "fira2, untied", "fira, top-2"])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_precision_is_what_export_writes_but_for_the_rows_of_the_embedding(name, kind):
    model = make(name)
    step = FusedStep(model, kind)
    exported = quantize(copy.deepcopy(model), kind)
    head = getattr(exported, "head", exported.token_embedding)
    exported.token_embedding = model.token_embedding

    def reference(tokens_B1, cache):
        return F.linear(exported.features(tokens_B1, cache)[:, -1], head.weight, head.bias)

    compare(model, step, reference)
    assert not any(isinstance(module, Quantized) for module in model.modules())


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_stored_integers_are_decoded_without_a_copy(name, kind):
    model = quantize(make(name), kind)
    step = FusedStep(model)
    addresses = {tensor.data_ptr() for tensor in step.table.tensors}
    stored = [module for path, module in model.named_modules() if isinstance(module, Quantized)
              and not (path == "token_embedding" and hasattr(model, "head"))]
    assert stored and all(module.numbers.data_ptr() in addresses for module in stored)
    compare(model, step, last_logits(model))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantized_run_decodes_by_the_compiled_step_or_says_why_not(
        kind, step_folder, fira, refused, monkeypatch, tmp_path):
    assert fira("export", kind, step_folder.parent, tmp_path / kind).code == 0
    said: list[str] = []
    model = load_model(tmp_path / kind / step_folder.name)
    assert isinstance(open_step(model, "float32", said.append), FusedStep)
    assert not any("plain torch" in line for line in said)
    words = ("generate", tmp_path / kind, "the state", "--max-new-tokens", 20, "--temperature", 0,
             "--device", "cpu")
    line = refused(*words, "--precision", "int4")
    assert f"precision=int4 cannot be had: the weights are {kind} already" in line
    fast = fira(*words)
    monkeypatch.setattr(decode.importlib.util, "find_spec", lambda name: None)
    plain = fira(*words)
    assert fast.code == 0 and fast.out == plain.out and "plain torch" not in fast.err
    reason = "Decoding with plain torch: numba is not installed; pip install 'fira-moe[fast]'"
    assert plain.err.count(reason) == 1


@pytest.mark.parametrize("tokens, parts", [
    ([96], [(0, 0, 1)]), ([1], [(0, 24, 1)]), ([1, 1], [(0, 23, 2)]), ([1], [(-1, 0, 1)]),
    ([1], [(2, 0, 1)]), ([1], [(0, 0, 1), (1, 0, 1)]), ([1, 1], [(1, 0, 1), (1, 1, 1)])])
def test_what_would_leave_memory_is_refused(tokens, parts):
    model = make("fira")
    with pytest.raises(AssertionError):
        FusedStep(model)(model, SlotCache(model, 2, 24), torch.tensor(tokens), parts)


def test_a_model_that_it_cannot_run_is_decoded_by_plain_torch_and_the_reason_is_said():
    said, half = [], make("fira").bfloat16()
    assert open_step(half, "float32", said.append) is None
    reason = "it runs float32 on cpu, and the model is bfloat16 on cpu"
    assert said == [f"Decoding with plain torch: {reason}."]
    with pytest.raises(ValueError, match="precision=int8 cannot be had: .*; leave --precision"):
        open_step(half, "int8", said.append)
    adapted = make("fira2")
    adapted.blocks[0].attention.adapter = torch.nn.Linear(2, 2)
    assert "other weights than its architecture" in find_obstacle(adapted)
    assert find_obstacle(make("fira"), "int4") is None


def test_it_compiles_where_nothing_can_be_written(monkeypatch):
    njit = kernel.njit

    def without_a_folder(**options):
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return njit(**options)

    monkeypatch.setattr(kernel, "njit", without_a_folder)
    assert kernel.compile_and_store(lambda x: x + 1)(np.int64(1)) == 2


def test_numba_compiles_again_when_any_file_with_compiled_code_changes(monkeypatch, tmp_path):
    imports = [line for module in (kernel, product) for line in re.findall(
        r"^from fira.*|^import fira.*", inspect.getsource(module), re.MULTILINE)]
    assert imports and all(line.startswith("from fira.infer.decode.") for line in imports)
    names = []
    for text in ("a = 1", "a = 2", "a = 1"):
        (tmp_path / "product.py").write_text(text)
        monkeypatch.setattr(kernel, "__file__", str(tmp_path / "kernel.py"))
        names.append(kernel.compile_and_store(lambda x: x + 1).__qualname__)
    assert names[0] == names[2] != names[1]


@pytest.mark.parametrize("width", [32, 40])
@pytest.mark.parametrize("kind", [None, "int8", "int4"])
def test_a_token_has_the_same_bits_in_every_block(kind, width, monkeypatch):
    spec = FIRA2Spec(**SMALL | {"d_model": width}, **GROUPED, num_experts=4, top_k=2)
    model = build(spec, seed=1)
    model = quantize(model, kind) if kind else model
    tokens = list(range(1, 12))
    together = first_logits(model, FusedStep(model), tokens)
    for rows in (2**25, 0):  # four rows at once, and one after the other
        monkeypatch.setattr("fira.infer.decode.step.IN_CACHE", rows)
        for size in (1, 2, 3, 5):
            step = FusedStep(model, threads=2)
            for start in range(0, len(tokens), size):
                found = first_logits(model, step, tokens[start:start + size])
                assert torch.equal(found, together[start:start + size]), (rows, size)


def test_threads_end_with_the_step():
    before = set(threading.enumerate())
    step = FusedStep(make("fira2"), threads=3)
    started = set(threading.enumerate()) - before
    assert len(started) == 2
    del step
    gc.collect()
    for thread in started:
        thread.join(timeout=10)
        assert not thread.is_alive()


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_seed_repeats_to_the_last_bit_whatever_else_is_read(tokenizer, precision):
    model = build(FIRA2Spec(**SMALL | {"vocab_size": 320, "context": 200}, **GROUPED,
                            num_experts=8, top_k=3), seed=1).eval()
    step = FusedStep(model, precision, threads=2)
    prompts = [list(range(start, start + length)) for start, length in (
        (5, 1), (5, 10), (9, 17), (5, 40), (5, 65), (5, 129), (7, 100), (5, 110))]
    asked = [SamplingParams(max_new_tokens=12, seed=seed, logprobs=0, ignore_end=True)
             for seed in range(len(prompts))]

    def answer(engine, chosen):
        """The requests `chosen`, amid others that have no seed."""
        events = {number: [] for number in chosen}
        for number in chosen:
            engine.add(prompts[number], asked[number], events[number].append)
            if len(chosen) > 1:
                engine.add([*prompts[number], 3], SamplingParams(20), lambda _: None)
                engine.step()
        while engine.step():
            pass
        return [[(event.id, event.score) for event in seen[:-1]] for seen in events.values()]

    alone = [answer(Engine(model, tokenizer, slots=1, decode_step=step), [number])[0]
             for number in range(len(prompts))]
    for budget in (512, 20):
        engine = Engine(model, tokenizer, slots=5, prefill_tokens=budget, decode_step=step)
        for order in (range(8), (7, 5, 3, 1, 0, 2, 4, 6)):  # then with what the slots hold
            assert answer(engine, order) == [alone[number] for number in order], budget
