"""FIRA2 is Qwen3-MoE: same weights, same logits as transformers."""
from __future__ import annotations

import pytest
import torch
import transformers

from fira.model.fira2 import FIRA2
from fira.model.spec import FIRA2Spec
from tests.models import build

SMALL = dict(vocab_size=97, d_model=48, n_head=4, n_kv_head=2, head_dim=16, num_layers=2, d_ff=40,
             num_experts=4, top_k=2, context=32, rope_theta=10000.0)


def qwen3_names(model: FIRA2) -> dict[str, torch.Tensor]:
    """FIRA2's weights under the names of transformers' Qwen3 classes."""
    state = model.state_dict()
    out = {"model.embed_tokens.weight": state["token_embedding.weight"],
           "lm_head.weight": state["token_embedding.weight" if model.spec.tied else "head.weight"],
           "model.norm.weight": state["norm.weight"]}
    spec = model.spec
    sizes = [spec.n_head * spec.head_dim, spec.n_kv_head * spec.head_dim] * 2
    for layer in range(spec.num_layers):
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        q, k, v = state[ours + "attention.qkv.weight"].split([sizes[0], sizes[1], sizes[1]])
        gate, up, down = (state[ours + f"moe.experts.{n}.weight"] for n in ("gate", "up", "down"))
        out |= {theirs + "self_attn.q_proj.weight": q, theirs + "self_attn.k_proj.weight": k,
                theirs + "self_attn.v_proj.weight": v,
                theirs + "self_attn.o_proj.weight": state[ours + "attention.output.weight"],
                theirs + "self_attn.q_norm.weight": state[ours + "attention.query_norm.weight"],
                theirs + "self_attn.k_norm.weight": state[ours + "attention.key_norm.weight"],
                theirs + "input_layernorm.weight": state[ours + "attention_norm.weight"],
                theirs + "post_attention_layernorm.weight": state[ours + "moe_norm.weight"]}
        if spec.num_experts == 1:
            out |= {theirs + "mlp.gate_proj.weight": gate[0],
                    theirs + "mlp.up_proj.weight": up[0], theirs + "mlp.down_proj.weight": down[0]}
        else:
            out |= {theirs + "mlp.gate.weight": state[ours + "moe.router.weight"],
                    theirs + "mlp.experts.gate_up_proj": torch.cat([gate, up], dim=1),
                    theirs + "mlp.experts.down_proj": down}
    return out


def qwen3(model: FIRA2) -> torch.nn.Module:
    spec = model.spec
    common = dict(vocab_size=spec.vocab_size, hidden_size=spec.d_model,
                  num_hidden_layers=spec.num_layers, num_attention_heads=spec.n_head,
                  num_key_value_heads=spec.n_kv_head, head_dim=spec.head_dim,
                  max_position_embeddings=spec.context, tie_word_embeddings=spec.tied,
                  rms_norm_eps=1e-6,
                  rope_parameters={"rope_type": "default", "rope_theta": spec.rope_theta})
    if spec.num_experts == 1:
        config = transformers.Qwen3Config(intermediate_size=spec.d_ff, **common)
        theirs = transformers.Qwen3ForCausalLM(config)
    else:
        config = transformers.Qwen3MoeConfig(
            moe_intermediate_size=spec.d_ff, num_experts=spec.num_experts, mlp_only_layers=[],
            num_experts_per_tok=spec.top_k, norm_topk_prob=spec.top_k > 1, decoder_sparse_step=1,
            **common)
        theirs = transformers.Qwen3MoeForCausalLM(config)
    theirs.load_state_dict(qwen3_names(model), strict=True)
    return theirs.eval()


@pytest.mark.parametrize("changes", [
    {}, {"top_k": 1}, {"top_k": 3}, {"top_k": 4}, {"n_kv_head": 1}, {"n_kv_head": 4},
    {"num_experts": 1, "top_k": 1}, {"rope_theta": 1e6, "head_dim": 8}, {"tied": False}])
def test_logits_equal_qwen3(changes):
    torch.manual_seed(0)
    model = build(FIRA2Spec(**SMALL | changes), seed=0, std=0.2).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    tokens_BT = torch.randint(97, (2, 32))
    with torch.no_grad():
        ours, theirs = model(tokens_BT), qwen3(model)(tokens_BT).logits
    assert ours.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
