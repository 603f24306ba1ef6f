"""The compiled step equals the model it replaces, for every architecture, slot and precision."""
from __future__ import annotations

import gc
import threading

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fira.convert.quantize import (
    Quantized,
    dequantize,
    load_model,
    quantize,
    quantize_int4,
    quantize_int8,
)
from fira.infer import fused
from fira.infer.engine import Engine
from fira.infer.fused import FusedStep, find_obstacle, open_step
from fira.infer.request import SamplingParams
from fira.infer.step import RouterProbe
from fira.model.files import build
from fira.model.generate import stream
from fira.model.router import routers
from fira.model.spec import FIRA2Spec, FIRASpec

pytest.importorskip("numba")

SMALL = dict(vocab_size=96, d_model=32, n_head=4, num_layers=2, d_ff=64, context=24)
GROUPED = dict(n_kv_head=2, head_dim=16)
SPECS = {
    "fira2": FIRA2Spec(**SMALL, **GROUPED, num_experts=8, top_k=3),
    "fira2, biased choice": FIRA2Spec(**SMALL, **GROUPED, num_experts=8, top_k=3, balance="bias"),
    "fira2, top-1, every head its own keys": FIRA2Spec(**SMALL, n_kv_head=4, head_dim=8, top_k=1),
    "fira2, dense": FIRA2Spec(**SMALL, **GROUPED, num_experts=1),
    "fira2, untied": FIRA2Spec(**SMALL, **GROUPED, num_experts=4, top_k=2, tied=False),
    "fira": FIRASpec(**SMALL, num_experts=4, top_k=1),
    "fira, top-2": FIRASpec(**SMALL, num_experts=4, top_k=2),
    "fira, dense": FIRASpec(**SMALL, num_experts=1),
}


@pytest.fixture(autouse=True)
def wide_weights(monkeypatch):
    """Initial weights large enough for clear preferences."""
    monkeypatch.setattr("fira.model.initialize.STD", 0.3)


def make(name):
    """A model whose norms and biases are not the neutral ones that training starts from."""
    model = build(SPECS[name], seed=1).eval()
    generator = torch.Generator().manual_seed(2)
    for router in routers(model):
        if router.selection_bias_E is not None:
            router.selection_bias_E += 0.3 * torch.randn(len(router.weight), generator=generator)
    for parameter in model.parameters():
        if parameter.dim() == 1 or parameter.shape[0] == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def compare(model, step, twin, tokens_BT):
    """Both read the same tokens one by one; `twin` is (tokens_B1, cache) -> logits_BV."""
    ours, theirs = model.new_cache(len(tokens_BT)), model.new_cache(len(tokens_BT))
    with torch.inference_mode():
        for token_B in tokens_BT.T:
            expected_BV = twin(token_B[:, None], theirs)
            logits_BV = step(token_B, ours)
            torch.testing.assert_close(logits_BV, expected_BV, rtol=0, atol=1e-4)
            assert torch.equal(logits_BV.argmax(-1), expected_BV.argmax(-1))
    assert ours.length == tokens_BT.shape[1]


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("rows", [1, 3])
def test_step_equals_the_model_over_a_whole_sequence(name, rows):
    model = make(name)
    tokens_BT = torch.randint(96, (rows, 24), generator=torch.Generator().manual_seed(0))
    compare(model, FusedStep(model), lambda *new: model(*new)[:, -1], tokens_BT)


@pytest.mark.parametrize("name", ["fira2", "fira"])
def test_generation_with_the_step_equals_generation_without(name):
    model, prompt = make(name), [[5, 6, 7]]
    step = FusedStep(model)
    expected = torch.stack(list(stream(model, prompt, 60, temperature=0)))
    assert torch.equal(torch.stack(list(stream(model, prompt, 60, temperature=0, step=step))),
                       expected)  # 60 tokens: the window is shortened more than once
    assert len(expected.unique()) > 2


def test_rows_stand_in_any_slot_at_any_position():
    model = make("fira2")
    step, cache = FusedStep(model), model.new_cache(5)
    keys = [layer.keys_BGSC for layer in cache.layers]
    values = [layer.values_BGSC for layer in cache.layers]
    texts = {4: [1, 2, 3], 0: [9, 8, 7, 6, 5, 4], 2: [30]}
    for slot, text in texts.items():
        for position, token in enumerate(text[:-1]):
            step.step([token], [position], [slot], keys, values)
    logits_SV, experts_LSK = step.step([text[-1] for text in texts.values()],
                          [len(text) - 1 for text in texts.values()], list(texts), keys, values)
    with torch.inference_mode():
        expected = torch.stack([model(torch.tensor([text]))[0, -1] for text in texts.values()])
    torch.testing.assert_close(logits_SV, expected, rtol=0, atol=1e-4)
    probe = RouterProbe(model)
    with torch.inference_mode():
        for row, text in enumerate(texts.values()):
            model(torch.tensor([text]))
            assert torch.equal(experts_LSK[:, row], probe.experts()[:, -1])


def test_the_engine_answers_the_same_with_it(tokenizer):
    model = make("fira2")
    answers = []
    for step in (None, FusedStep(model)):
        engine = Engine(model, tokenizer, slots=3)
        if step:
            engine.decode_step = step.decode
        events = [list(engine.stream(prompt, SamplingParams(max_new_tokens=12, temperature=0,
                                                            experts=True, ignore_end=True)))
                  for prompt in ([1, 2, 3], [4, 5])]
        answers.append([[(e.id, e.experts) for e in stream[:-1]] for stream in events])
        engine.close()
    assert answers[0] == answers[1]


def test_every_number_of_threads_gives_the_same_bits():
    model, tokens_B = make("fira2"), torch.tensor([3, 4])
    alone, together = (FusedStep(model, threads=threads)(
        tokens_B, model.new_cache(2)) for threads in (1, 3))
    assert torch.equal(alone, together)


def test_weights_changed_in_place_are_the_ones_that_are_read():
    model, tokens_B = make("fira"), torch.tensor([3])
    step = FusedStep(model)
    before = step(tokens_B, model.new_cache(1))
    with torch.inference_mode():
        model.blocks[0].moe.experts.up.weight.mul_(0.5)
        expected = model(tokens_B[:, None])[:, -1]
    after = step(tokens_B, model.new_cache(1))
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-4)
    assert (after - before).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["fira2", "fira2, untied", "fira, top-2"])
@pytest.mark.parametrize("precision, rounded",
                         [("int8", quantize_int8), ("int4", quantize_int4)])
def test_quantized_step_equals_the_model_with_its_rounded_weights(name, precision, rounded):
    model = make(name)
    step = FusedStep(model, precision)
    tied_VD = dequantize(*quantize_int8(model.token_embedding.weight.detach()))
    for path, parameter in model.named_parameters():
        if path == "head.weight":
            parameter.data.copy_(dequantize(*quantize_int8(parameter.detach())))
        elif path.endswith(("qkv.weight", "output.weight", "gate.weight", "up.weight",
                            "down.weight")):
            parameter.data.copy_(dequantize(*rounded(parameter.detach())))

    def twin(tokens_B1, cache):
        x_BD = model.features(tokens_B1, cache)[:, -1]
        return model.logits(x_BD) if hasattr(model, "head") else F.linear(x_BD, tied_VD)

    compare(model, step, twin, torch.randint(96, (2, 20)))


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_stored_small_integers_are_decoded_as_they_are(name, kind):
    model = quantize(make(name), kind)
    step = FusedStep(model)
    for module in model.modules():
        if isinstance(module, Quantized):
            assert module.numbers.data_ptr() in {held.data_ptr() for held in step.packed.held}
    compare(model, step, lambda *new: model(*new)[:, -1], torch.randint(96, (2, 20)))
    prompt = [[5, 6, 7]]
    assert torch.equal(torch.stack(list(stream(model, prompt, 40, temperature=0, step=step))),
                       torch.stack(list(stream(model, prompt, 40, temperature=0))))


def test_rows_that_int4_cannot_group_stay_float32_in_the_step():
    spec = FIRA2Spec(**SMALL | {"d_ff": 48}, **GROUPED, num_experts=4, top_k=2)
    model = quantize(build(spec, seed=1).eval(), "int4")
    assert not isinstance(model.blocks[0].moe.experts.down, Quantized)
    assert isinstance(model.blocks[0].moe.experts.up, Quantized)
    compare(model, FusedStep(model), lambda *new: model(*new)[:, -1], torch.randint(96, (1, 20)))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantized_run_decodes_by_the_compiled_step_or_says_why_not(kind, step_folder, fira,
                                                                      monkeypatch, tmp_path):
    assert fira("export", kind, step_folder.parent, tmp_path / kind).code == 0
    model = load_model(tmp_path / kind / step_folder.name)
    said: list[str] = []
    assert isinstance(open_step(model, "float32", said.append), FusedStep)
    assert not any("plain torch" in line for line in said)
    words = ("generate", tmp_path / kind, "the state", "--max-new-tokens", 20, "--temperature", 0,
             "--device", "cpu")
    fast = fira(*words)
    monkeypatch.setattr(fused.importlib.util, "find_spec", lambda name: None)
    plain = fira(*words)
    assert fast.code == 0 and fast.out == plain.out and "plain torch" not in fast.err
    assert plain.err.count("Decoding with plain torch: numba is not installed") == 1


def test_a_precision_on_top_of_another_is_refused(step_folder, fira, refused, tmp_path):
    assert fira("export", "int8", step_folder.parent, tmp_path / "small").code == 0
    line = refused("generate", tmp_path / "small", "the", "--precision", "int4", "--device", "cpu")
    assert "precision=int4 cannot be had: the weights are int8 already" in line


def test_rounding_errs_by_half_a_step_at_most():
    weight = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0))
    weight[0, 0] = 0
    numbers, scale = quantize_int8(weight)
    assert ((dequantize(numbers, scale) - weight).abs() <= scale[..., None] * 0.5001).all()
    numbers, scale = quantize_int4(weight)
    error, size = (dequantize(numbers, scale) - weight).abs(), scale.abs().repeat_interleave(32, -1)
    assert (error <= size * 1.0001).all()  # one whole step opposite the largest weight
    assert (error <= size * 0.5001).float().mean() > 0.95
    assert numbers.nbytes * 2 == weight.numel()


@pytest.mark.parametrize("change, words", [
    ({"tokens": [96]}, r"tokens \[96\] must be 1 numbers of 0 to 95"),
    ({"positions": [24]}, r"positions \[24\] must be 1 numbers of 0 to 23"),
    ({"slots": [-1]}, r"slots \[-1\] must"), ({"slots": [0, 1]}, "slots .* must be 1 numbers"),
    ({"tokens": [1, 1], "positions": [0, 0], "slots": [1, 1]}, "repeat; give each")])
def test_what_would_leave_memory_is_refused(change, words):
    model = make("fira")
    cache = model.new_cache(2)
    asked = {"tokens": [0], "positions": [0], "slots": [0]} | change
    with pytest.raises(ValueError, match=words):
        FusedStep(model).step(*asked.values(), [layer.keys_BGSC for layer in cache.layers],
                              [layer.values_BGSC for layer in cache.layers])


def test_models_that_it_cannot_run_are_named(monkeypatch):
    assert find_obstacle(make("fira"), "int4") is None
    assert "bfloat16 on cpu" in find_obstacle(make("fira").bfloat16())
    narrow = build(FIRASpec(**SMALL | {"d_model": 16}), seed=0)
    assert "widths that 32 divides, and the model has [16, 64]" in find_obstacle(narrow, "int4")
    adapted = make("fira2")
    adapted.blocks[0].attention.adapter = torch.nn.Linear(2, 2)
    assert "other weights than its architecture" in find_obstacle(adapted)
    monkeypatch.setattr(fused.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'fira-moe[fast]'" in find_obstacle(make("fira"))


def test_without_it_plain_torch_decodes_and_says_so_in_one_line():
    said, model = [], make("fira").bfloat16()
    assert open_step(model, "float32", said.append) is None
    assert len(said) == 1 and said[0].startswith("Decoding with plain torch: ")
    with pytest.raises(ValueError, match="precision=int8 cannot be had: .*; leave --precision"):
        open_step(model, "int8", said.append)


def test_it_compiles_where_nothing_can_be_written(monkeypatch):
    from fira.infer import dots

    njit = dots.njit

    def without_a_folder(**options):
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return njit(**options)

    monkeypatch.setattr(dots, "njit", without_a_folder)
    assert dots.compiled(lambda x: x + 1)(np.int64(1)) == 2


def test_threads_end_with_the_step():
    model, before = make("fira2"), threading.active_count()
    step = FusedStep(model, threads=3)
    crew = [thread for thread in threading.enumerate() if thread.name.startswith("decode-")][-2:]
    assert threading.active_count() >= before + 2
    del step
    gc.collect()
    for thread in crew:
        thread.join(timeout=10)
        assert not thread.is_alive()


def test_what_to_install_is_said_with_its_brackets(fira, step_folder, monkeypatch):
    monkeypatch.setattr(fused.importlib.util, "find_spec", lambda name: None)
    answer = fira("generate", step_folder, "the", "--max-new-tokens", 1, "--device", "cpu")
    assert "pip install 'fira-moe[fast]'" in answer.err
