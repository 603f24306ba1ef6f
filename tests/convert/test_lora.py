"""An adapter in another form computes what the adapted model computes."""
from __future__ import annotations

import copy
import errno
import json

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from fira.checkpoint import describe_base
from fira.convert import hf
from fira.convert.lora import merge_run
from fira.convert.quantize import dequantized, quantize
from fira.convert.quantize import export_run as export_quantized
from fira.data.batches import Batch
from fira.files import find_damage, write_json, write_manifest
from fira.infer.load import load
from fira.loss.head import next_token_loss
from fira.model.adapter import adapters, merge
from fira.model.files import ADAPTER, CONFIG
from tests.model.test_adapters import adapt
from tests.models import NAMES, build, tiny_spec

QUIET = Console(quiet=True)
TEXT = torch.randint(500, (2, 24), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def tuned(request, tmp_path):
    """Makes an adapter on the run of a fixture, in int8 or int4 if asked: its run and its model."""
    def make(which, kind=None, experts=None, change=lambda tensors: None):
        base = request.getfixturevalue(which)
        if kind:
            export_quantized(base, tmp_path / kind, kind, QUIET)
            base = tmp_path / kind
        model, tokenizer, folder = load(base, "cpu")
        adapt(model, experts).base = describe_base(folder)
        step = tmp_path / "tuned" / "step-000005"
        tokenizer.save(step)
        write_json(step / CONFIG, model.config())
        tensors = {name: one for name, one in model.state_dict().items() if ".lora." in name}
        change(tensors)
        save_file(tensors, step / ADAPTER)
        write_manifest(step)
        return step.parent, model
    return make


RUNS = [("run", None, None), ("untied_run", None, ((0, 3), (1,))), ("founding_run", None, None),
        ("dense_run", None, None), ("untied_run", "int8", None), ("run", "int4", ((0, 3), ()))]


@pytest.mark.parametrize("which, kind, experts", RUNS)
def test_a_merged_run_needs_no_base_and_computes_what_the_adapted_model_does(
        which, kind, experts, tuned, tmp_path):
    adapted_run, model = tuned(which, kind, experts)
    merge_run(adapted_run, tmp_path / "whole", QUIET)
    whole = load(tmp_path / "whole", "cpu")
    torch.testing.assert_close(whole.model(TEXT), model(TEXT), rtol=1e-4, atol=1e-4)
    assert find_damage(whole.folder) is None and whole.folder.name == "step-000005"
    assert json.loads((tmp_path / "whole" / CONFIG).read_text())["merged_from"] == str(
        adapted_run / "step-000005")
    opened = load(adapted_run, "cpu").model  # merged on loading, if the base is no integers
    assert bool(adapters(opened)) == bool(kind)
    torch.testing.assert_close(opened(TEXT), model(TEXT), rtol=1e-4, atol=1e-4)


def test_a_merge_that_changes_the_model_or_finds_no_room_leaves_nothing(
        tuned, refused, monkeypatch, tmp_path):
    adapted_run, _ = tuned("untied_run")
    out = tmp_path / "whole"

    def no_room(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("fira.model.files.save_file", no_room)
        line = refused("merge", adapted_run, out)
        assert f"cannot write {out}: No space left on device; " in line

    def wrong(model):
        model.blocks[0].attention.qkv.lora.b.data *= 1.001
        return merge(model)

    monkeypatch.setattr("fira.convert.lora.merge", wrong)
    line = refused("merge", adapted_run, out)
    assert "more than 1e-05; use the adapter" in line and f"fira chat {adapted_run}" in line
    assert not out.exists() and not [*tmp_path.glob(".*")]
    base = json.loads((adapted_run / "step-000005" / CONFIG).read_text())["base"]["path"]
    assert "holds a whole model and no adapter" in refused("merge", base, out)


def test_the_engine_writes_with_an_adapter_beside_integers(tuned, fira, tmp_path):
    run, model = tuned("untied_run", "int8")
    tokenizer = load(run, "cpu").tokenizer
    prompt = [tokenizer.end_of_text, *tokenizer.encode("The ")]
    expected = model.generate([prompt], 6, 0.0, end_of_text=-1).tolist()[0][1:]
    for words in ([run], [tmp_path / "int8", "--adapter", run]):
        answer = fira("generate", *words, "The ", "--max-new-tokens", 6, "--temperature", 0)
        assert answer.out.rstrip("\n") == tokenizer.decode(expected), answer.err


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("name", NAMES)
def test_adapters_learn_on_integers_as_on_the_weights_that_these_stand_for(name, kind):
    spec = tiny_spec(name, d_model=64, d_ff=96, context=32, **(
        {"head_dim": 32} if name == "fira2" else {}))
    model = adapt(quantize(build(spec, seed=0, std=0.1), kind)).train()
    plain = copy.deepcopy(dequantized(model)).train().requires_grad_(False)
    for module in adapters(plain).values():
        module.lora.requires_grad_(True)
    batch, kept = Batch(*torch.randint(31, (2, 2, 21))), []
    with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        loss = next_token_loss(model, batch)[0]
    loss.backward()
    next_token_loss(plain, batch)[0].backward()
    ours, theirs = ({n: p.grad for n, p in one.named_parameters() if ".lora." in n}
                    for one in (model, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    shapes = {part.weight.shape[-2:] for part in model.modules() if hasattr(part, "numbers")}
    shapes |= {shape[::-1] for shape in shapes}
    weights = [one.shape for one in kept if one.is_floating_point() and one.shape[-2:] in shapes]
    assert weights == [torch.Size([31, 64])]  # the gradient of the head, for its rows


PEFT_RUNS = [("run", ((0, 3), (1,))), ("untied_run", None), ("run", ((2,), ())),
             ("dense_run", None)]


@pytest.mark.parametrize("which, experts", PEFT_RUNS)
def test_peft_loads_the_adapter_onto_the_exported_base(which, experts, tuned, fira, tmp_path,
                                                       request):
    peft, transformers = (pytest.importorskip(name) for name in ("peft", "transformers"))
    adapted_run, model = tuned(which, None, experts)
    hf.export_run(request.getfixturevalue(which), tmp_path / "hf", None, QUIET)
    answer = fira("export", "peft", adapted_run, tmp_path / "peft")
    assert answer.code == 0 and "PeftModel.from_pretrained" in answer.err, answer.err
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), tmp_path / "peft")
    found = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    loaded = {name.replace(".default", ""): one for name, one in theirs.state_dict().items()}
    assert found and all(torch.equal(loaded[name], one) for name, one in found.items())
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(TEXT).logits, model(TEXT), rtol=1e-4, atol=1e-4)
        with theirs.disable_adapter():
            assert (theirs(TEXT).logits - model(TEXT)).abs().max() > 0.1


def trains_router(tensors):
    tensors["blocks.0.moe.router.weight"] = torch.zeros(4, 32)


@pytest.mark.parametrize("which, kind, change, line", [
    ("founding_run", None, lambda tensors: None, "adapts a FIRA, whose code"),
    ("untied_run", "int8", lambda tensors: None, "adapts int8 weights"),
    ("untied_run", None, trains_router, "router.weight, which was trained as a whole")])
def test_what_peft_cannot_hold_is_refused_by_name(which, kind, change, line, tuned, refused,
                                                  tmp_path):
    run, _ = tuned(which, kind, change=change)
    said = refused("export", "peft", run, tmp_path / "peft")
    assert line in said and f"fira merge {run} OUT, then fira export hf OUT" in said
    assert not (tmp_path / "peft").exists()
