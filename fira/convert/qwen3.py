"""FIRA2 as a Qwen3 of transformers: its config.json and tensor names, in both directions.

A FIRA2 with several experts is a Qwen3MoeForCausalLM, one with a single expert a Qwen3ForCausalLM.
Transformers 4 and 5 spell some settings differently; we write both spellings. We write one tensor
for each expert; transformers 5 may also save the experts of a layer stacked, which we read too.
"""
from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fira.config import ConfigError, parse
from fira.model import build_meta
from fira.model.files import Notes, assemble
from fira.model.spec import FIRA2Spec

MOE, DENSE = "qwen3_moe", "qwen3"
CLASS = {MOE: "Qwen3MoeForCausalLM", DENSE: "Qwen3ForCausalLM"}
NAMES = {"token_embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head",
         "attention_norm": "input_layernorm", "attention.query_norm": "self_attn.q_norm",
         "attention.key_norm": "self_attn.k_norm", "attention.output": "self_attn.o_proj",
         "moe_norm": "post_attention_layernorm", "moe.router": "mlp.gate"}
QKV, EXPERTS = "attention.qkv", "moe.experts."
STACKED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
FIELDS = {"vocab_size": "vocab_size", "hidden_size": "d_model", "num_hidden_layers": "num_layers",
          "num_attention_heads": "n_head", "num_key_value_heads": "n_kv_head",
          "head_dim": "head_dim", "max_position_embeddings": "context"}
FIXED = {"hidden_act": "silu", "attention_bias": False,
         "use_sliding_window": False}  # what FIRA2 computes
FIXED_MOE = {"decoder_sparse_step": 1, "mlp_only_layers": []}
TRAINING = ("balance", "balance_weight")  # settings that only our own training reads
ROUTER_STATE = ("load_share_E", "selection_bias_E")  # and state that only it reads


def kind(spec: FIRA2Spec) -> str:
    """The model_type."""
    return DENSE if spec.num_experts == 1 else MOE


def describe(spec: FIRA2Spec) -> dict[str, Any]:
    """The config.json of transformers, without token ids and dtype."""
    config = {
        "architectures": [CLASS[kind(spec)]], "model_type": kind(spec),
        **{their: getattr(spec, our) for their, our in FIELDS.items()}, **FIXED,
        "intermediate_size": spec.d_ff * spec.top_k, "tie_word_embeddings": spec.tied,
        "initializer_range": 0.02, "use_cache": True, "attention_dropout": 0.0,
        "sliding_window": None, "rope_theta": spec.rope_theta, "rms_norm_eps": spec.norm_eps,
        "rope_parameters": {"rope_theta": spec.rope_theta, "rope_type": "default"}}
    if kind(spec) == DENSE:
        return config
    return config | FIXED_MOE | {
        "num_experts": spec.num_experts, "num_local_experts": spec.num_experts,
        "num_experts_per_tok": spec.top_k, "moe_intermediate_size": spec.d_ff,
        "norm_topk_prob": spec.renormalize and spec.top_k > 1, "output_router_logits": False,
        "router_aux_loss_coef": spec.balance_weight}


def weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Every weight of a FIRA2 under our name."""
    for key, tensor in model.state_dict().items():
        if not key.endswith(ROUTER_STATE):
            yield key, tensor


def names(spec: FIRA2Spec, key: str) -> list[str]:
    """Names in transformers of the tensors that make up our weight `key`: queries, keys and values,
    the experts of a layer, or just one."""
    found = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+)\.weight", key)
    assert found, f"{key} is not a weight of FIRA2"
    name, start = found[2], f"model.layers.{found[1]}." if found[1] else ""
    if name == QKV:
        return [f"{start}self_attn.{letter}_proj.weight" for letter in "qkv"]
    if not name.startswith(EXPERTS):
        return [f"{start}{NAMES[name]}.weight"]
    end = f"{name.removeprefix(EXPERTS)}_proj.weight"
    if kind(spec) == DENSE:
        return [f"{start}mlp.{end}"]
    return [f"{start}mlp.experts.{expert}.{end}" for expert in range(spec.num_experts)]


def separate(spec: FIRA2Spec, key: str, tensor: Tensor) -> Sequence[Tensor]:
    """The tensors that our weight `key` is made of, in the order of `names`."""
    if QKV in key:
        return tensor.split([heads * spec.head_dim
                             for heads in (spec.n_head, spec.n_kv_head, spec.n_kv_head)])
    return tensor.unbind() if EXPERTS in key else [tensor]


def tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its name in transformers. Only a Qwen3-MoE has a copy of the embedding as
    its tied head: SGLang's ignores tie_word_embeddings and would compute with a random head."""
    for key, tensor in weights(model):
        yield from zip(names(model.spec, key), separate(model.spec, key, tensor), strict=True)
    if model.spec.tied and kind(model.spec) == MOE:
        yield f"{NAMES['head']}.weight", model.state_dict()["token_embedding.weight"].clone()


def read_spec(config: dict[str, Any]) -> FIRA2Spec:
    """The FIRA2 that a config.json describes. Raises ValueError for what FIRA2 does not compute."""
    model_type = config.get("model_type")
    if str(model_type) not in CLASS:
        raise ValueError(f"model_type={model_type!r:.40} is not one that FIRA2 can hold: "
                         f"{' or '.join(CLASS)}; give a checkpoint of such a model")
    moe = model_type == MOE
    top_k = _need(config, "num_experts_per_tok") if moe else 1
    rope = {**table(config, "rope_scaling"), **table(config, "rope_parameters")}
    found = {key: value for key, value in config.items() if value is not None} | {
        "rope_type": rope.get("type", rope.get("rope_type", "default"))}
    wanted = FIXED | {"rope_type": "default"}
    if moe:
        wanted |= FIXED_MOE | ({"norm_topk_prob": False} if top_k == 1 else {})
    for key, value in wanted.items():
        if found.get(key, value) != value:
            raise ValueError(f"{key}={found[key]} is not what FIRA2 computes, which has "
                             f"{key}={value}; give a checkpoint with that setting")
    ours = table(config, "fira")
    fields = {
        **{our: _need({"head_dim": 128} | config, their) for their, our in FIELDS.items()},
        "top_k": top_k, "tied": config.get("tie_word_embeddings", False),
        "d_ff": _need(config, "moe_intermediate_size" if moe else "intermediate_size"),
        "num_experts": _need(config, "num_experts", "num_local_experts") if moe else 1,
        "norm_eps": found.get("rms_norm_eps", 1e-6),  # the defaults are Qwen3's
        "renormalize": top_k == 1 or found.get("norm_topk_prob", False),
        "rope_theta": rope.get("rope_theta", config.get("rope_theta", 10000.0)),
        **{key: ours[key] for key in TRAINING if key in ours}}
    try:
        return parse(FIRA2Spec, fields)
    except ConfigError as error:
        raise ValueError(f"{error}; FIRA2 cannot hold such a model") from None


def table(config: dict[str, Any], key: str) -> dict[str, Any]:
    """The object under a key that may be missing or null. Raises ValueError if it is none."""
    found = config.get(key) or {}
    if not isinstance(found, dict):
        raise ValueError(f"{key}={found!r} is not a JSON object; use the file that came with the "
                         "weights")
    return found


def _need(config: dict[str, Any], *keys: str) -> int:
    for key in keys:
        if isinstance(found := config.get(key), int):
            return found
        if found is not None:
            raise ValueError(f"{key}={found!r} is not a whole number; use the config.json that "
                             "came with the weights")
    raise ValueError(f"{keys[0]} is missing; use the config.json that came with the weights")


def build_from(config: dict[str, Any], found: dict[str, Tensor], notes: dict[str, Any]) -> Any:
    """The FIRA2 of a config.json and the tensors that `tensors` would give, which are copied.

    Raises ValueError for a tensor that is missing, misshapen or unknown to FIRA2, and for a tied
    head that is not the embedding.
    """
    spec, unread = read_spec(config), _unstack(found)
    model, ours = build_meta(spec), {}
    for key, wanted in weights(model):
        parts = []
        for name, part in zip(names(spec, key), separate(spec, key, wanted), strict=True):
            if name not in unread:
                raise ValueError(f"tensor {name} is missing; copy every file of the checkpoint")
            parts.append(unread.pop(name))
            if parts[-1].shape != part.shape:
                raise ValueError(f"{name} has shape {list(parts[-1].shape)}, but config.json says "
                                 f"{list(part.shape)}; use the config.json that came with it")
        ours[key] = torch.stack(parts) if EXPERTS in key else torch.cat(parts)
    embedding, head = ours["token_embedding.weight"], f"{NAMES['head']}.weight"
    if spec.tied and not torch.equal(unread.pop(head, embedding), embedding):
        raise ValueError(f"{head} differs from the embedding, but tie_word_embeddings=true; "
                         "use the config.json that came with the weights")
    if unread:
        raise ValueError(f"tensor {min(unread)} is unknown to FIRA2 (one of {len(unread)}); "
                         "give a checkpoint without additions")
    return assemble(model, ours, parse(Notes, notes).model_dump())


def _unstack(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """`found` with a tensor for each expert where those of a layer are stacked."""
    apart: dict[str, Tensor] = {}
    for name, tensor in found.items():
        start, _, last = name.rpartition(".")
        if last not in STACKED:
            apart[name] = tensor
            continue
        if tensor.dim() != 3 or tensor.shape[1] % len(STACKED[last]):
            raise ValueError(f"{name} has shape {list(tensor.shape)}, not one matrix for each "
                             "expert; copy every file of the checkpoint again")
        parts = tensor.chunk(len(STACKED[last]), dim=1)
        for part, experts in zip(STACKED[last], parts, strict=True):
            apart |= {f"{start}.{e}.{part}.weight": one for e, one in enumerate(experts)}
    return apart
