"""FIRA with one expert is GPT-2, and refuses what it cannot do."""
from __future__ import annotations

import pytest
import torch
import transformers

from fira.model.fira import FIRA
from fira.model.spec import FIRASpec
from tests.models import build

SMALL = dict(vocab_size=97, d_model=48, n_head=4, num_layers=2, d_ff=80, context=32)


def gpt2(model: FIRA) -> torch.nn.Module:
    """transformers' GPT-2 with FIRA's weights, and zeros for the biases that FIRA lacks."""
    spec, state = model.spec, model.state_dict()
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=spec.vocab_size, n_positions=spec.context, n_embd=spec.d_model,
        n_layer=spec.num_layers, n_head=spec.n_head, n_inner=spec.d_ff,
        activation_function="gelu_new"))
    names = {"transformer.wte.weight": state["token_embedding.weight"],
             "lm_head.weight": state["token_embedding.weight"],
             "transformer.wpe.weight": state["position_embedding.weight"],
             "transformer.ln_f.weight": state["norm.weight"],
             "transformer.ln_f.bias": state["norm.bias"]}
    for layer in range(spec.num_layers):
        ours, block = f"blocks.{layer}.", f"transformer.h.{layer}."
        pairs = {"ln_1": "attention_norm", "ln_2": "moe_norm"}
        names |= {f"{block}{their}.{leaf}": state[f"{ours}{our}.{leaf}"]
                  for their, our in pairs.items() for leaf in ("weight", "bias")}
        for their, our in (("attn.c_attn", "attention.qkv"), ("attn.c_proj", "attention.output")):
            names[f"{block}{their}.weight"] = state[f"{ours}{our}.weight"].T
            names[f"{block}{their}.bias"] = torch.zeros(len(state[f"{ours}{our}.weight"]))
        for their, our in {"mlp.c_fc": "moe.experts.up", "mlp.c_proj": "moe.experts.down"}.items():
            names[f"{block}{their}.weight"] = state[f"{ours}{our}.weight"][0].T
            names[f"{block}{their}.bias"] = state[f"{ours}{our}.bias"][0]
    theirs.load_state_dict(names)
    return theirs.eval()


def test_one_expert_equals_gpt2():
    torch.manual_seed(0)
    model = build(FIRASpec(**SMALL, num_experts=1), seed=0, std=0.2).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.uniform_(-1, 1)
        model.head.weight.copy_(model.token_embedding.weight)
        model.head.bias.zero_()
        tokens_BT = torch.randint(97, (2, 32))
        ours, theirs = model(tokens_BT), gpt2(model)(tokens_BT).logits
    assert ours.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    model = FIRA(**SMALL)
    tokens_BT = torch.randint(97, (1, 8))
    with torch.no_grad():
        assert not torch.equal(model.train()(tokens_BT), model(tokens_BT))
        assert torch.equal(model.eval()(tokens_BT), model(tokens_BT))


def test_a_sequence_longer_than_the_context_is_refused_in_one_line():
    with pytest.raises(ValueError, match="33 tokens is longer than context=32; shorten it"):
        FIRA(**SMALL)(torch.zeros(1, 33, dtype=torch.long))


@pytest.mark.parametrize("fields, words", [
    ({"n_head": 5}, "n_head=5 must divide d_model=48; try n_head=4"),
    ({"d_modle": 5}, "did you mean d_model"),
    ({"num_layers": 0}, "num_layers=0")])
def test_wrong_fields_are_refused_in_one_line(fields, words):
    with pytest.raises(ValueError, match=words) as caught:
        FIRA(**SMALL | fields)
    assert "\n" not in str(caught.value)
