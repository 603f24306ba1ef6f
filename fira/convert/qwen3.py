"""FIRA2 as a Qwen3 of transformers: its config.json and tensor names, in both directions.

A FIRA2 with several experts is a Qwen3MoeForCausalLM, one with a single expert a Qwen3ForCausalLM.
Transformers 4 and 5 spell some settings differently; we write both spellings. We write one tensor
for each expert; transformers 5 may also save the experts of a layer stacked, which we read too.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fira.config import ConfigError, parse
from fira.model.files import assemble, build_meta
from fira.model.fira2 import RMSNorm
from fira.model.spec import FIRA2Spec

MOE, DENSE = "qwen3_moe", "qwen3"
CLASS = {MOE: "Qwen3MoeForCausalLM", DENSE: "Qwen3ForCausalLM"}
NAMES = {"token_embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head",
         "attention_norm": "input_layernorm", "attention.query_norm": "self_attn.q_norm",
         "attention.key_norm": "self_attn.k_norm", "attention.q": "self_attn.q_proj",
         "attention.k": "self_attn.k_proj", "attention.v": "self_attn.v_proj",
         "attention.output": "self_attn.o_proj", "moe_norm": "post_attention_layernorm",
         "moe.router": "mlp.gate"}
EMBEDDING, HEAD = f"{NAMES['token_embedding']}.weight", f"{NAMES['head']}.weight"
QKV, EXPERTS = "attention.qkv", "moe.experts."
FIELDS = {"vocab_size": "vocab_size", "hidden_size": "d_model", "num_hidden_layers": "num_layers",
          "num_attention_heads": "n_head", "num_key_value_heads": "n_kv_head",
          "head_dim": "head_dim", "max_position_embeddings": "context"}
FIXED = {"hidden_act": "silu", "attention_bias": False, "rms_norm_eps": RMSNorm.eps,
         "use_sliding_window": False}  # what FIRA2 computes
FIXED_MOE = {"decoder_sparse_step": 1, "mlp_only_layers": []}
TRAINING = ("balance", "balance_weight")  # settings that only our own training reads
ROUTER_STATE = ("load_share_E", "selection_bias_E")  # and state that only it reads

Read = Callable[[str], Tensor]


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
        "sliding_window": None, "rope_theta": spec.rope_theta,
        "rope_parameters": {"rope_theta": spec.rope_theta, "rope_type": "default"}}
    if kind(spec) == DENSE:
        return config
    return config | FIXED_MOE | {
        "num_experts": spec.num_experts, "num_local_experts": spec.num_experts,
        "num_experts_per_tok": spec.top_k, "moe_intermediate_size": spec.d_ff,
        "norm_topk_prob": spec.top_k > 1, "output_router_logits": False,
        "router_aux_loss_coef": spec.balance_weight}


def separate(model: Any) -> Iterator[tuple[str, str, Tensor]]:
    """(layer or "", name inside the block, weight) of a FIRA2, with queries, keys and values apart.
    """
    for key, tensor in model.state_dict().items():
        if key.endswith(ROUTER_STATE):
            continue
        layer, name = _parse(key)
        if name == QKV:
            for letter, part in zip("qkv", tensor.split(_qkv_sizes(model.spec)), strict=True):
                yield layer, f"attention.{letter}", part
        else:
            yield layer, name, tensor


def _parse(key: str) -> tuple[str, str]:
    """(layer or "", name inside the block) of the key of a weight."""
    found = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+)\.weight", key)
    assert found, f"{key} is not a weight of FIRA2"
    return found[1] or "", found[2]


def _qkv_sizes(spec: FIRA2Spec) -> list[int]:
    """Rows of queries, keys and values in the fused projection."""
    return [heads * spec.head_dim for heads in (spec.n_head, spec.n_kv_head, spec.n_kv_head)]


def tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its name in transformers; a tied head is a copy of the embedding."""
    for layer, name, tensor in separate(model):
        if name.startswith(EXPERTS):
            yield from zip(_expert_names(model.spec, layer, name), tensor, strict=True)
        else:
            yield _their_name(layer, name), tensor
    if model.spec.tied:
        yield HEAD, model.state_dict()["token_embedding.weight"].clone()


def _their_name(layer: str, name: str) -> str:
    return f"model.layers.{layer}.{NAMES[name]}.weight" if layer else f"{NAMES[name]}.weight"


def _expert_names(spec: FIRA2Spec, layer: str, name: str) -> list[str]:
    start, end = f"model.layers.{layer}.mlp.", f"{name.removeprefix(EXPERTS)}_proj.weight"
    if kind(spec) == DENSE:
        return [start + end]
    return [f"{start}experts.{expert}.{end}" for expert in range(spec.num_experts)]


def read_spec(config: dict[str, Any]) -> FIRA2Spec:
    """The FIRA2 that a config.json describes. Raises ValueError for what FIRA2 does not compute."""
    model_type = config.get("model_type")
    if model_type not in CLASS:
        raise ValueError(f"model_type={model_type!r} is not one that FIRA2 can hold: "
                         f"{' or '.join(CLASS)}; give a checkpoint of such a model")
    moe = model_type == MOE
    top_k = _need(config, "num_experts_per_tok") if moe else 1
    rope = {**table(config, "rope_scaling"), **table(config, "rope_parameters")}
    found = {key: value for key, value in config.items() if value is not None} | {
        "rope_type": rope.get("type", rope.get("rope_type", "default"))}
    wanted = FIXED | {"rope_type": "default"}
    if moe:
        found = {"norm_topk_prob": False} | found
        wanted |= FIXED_MOE | {"norm_topk_prob": top_k > 1}
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
        "rope_theta": rope.get("rope_theta", config.get("rope_theta", 10000.0)),
        **{key: ours[key] for key in TRAINING if key in ours}}
    try:
        return parse(FIRA2Spec, fields)
    except ConfigError as error:
        raise ValueError(f"{error}; FIRA2 cannot hold such a model") from None


def table(config: dict[str, Any], key: str) -> dict[str, Any]:
    """The table under a key that may be missing or null. Raises ValueError if it is no table."""
    found = config.get(key) or {}
    if not isinstance(found, dict):
        raise ValueError(f"{key}={found!r} is not a table of names and values; use the file that "
                         "came with the weights")
    return found


def _need(config: dict[str, Any], *keys: str) -> int:
    for key in keys:
        if isinstance(config.get(key), int):
            return config[key]
        if config.get(key) is not None:
            raise ValueError(f"{key}={config[key]!r} is not a whole number; use the config.json "
                             "that came with the weights")
    raise ValueError(f"{keys[0]} is missing; use the config.json that came with the weights")


def build_from(config: dict[str, Any], names: set[str], read: Read, notes: dict[str, Any]) -> Any:
    """The FIRA2 of a config.json and the tensors `names`, which `read` fetches one at a time.

    Raises ValueError for a tensor that is missing, misshapen or unknown to FIRA2, and for a tied
    head that is not the embedding.
    """
    spec, unread = read_spec(config), set(names)
    model = build_meta(spec)

    def take(name: str) -> Tensor:
        if name not in names:
            raise ValueError(f"tensor {name} is missing; copy every file of the checkpoint")
        unread.discard(name)
        return read(name)

    found: dict[str, Tensor] = {}
    for key in model.state_dict():
        if key.endswith(ROUTER_STATE) or key in found:
            continue
        layer, name = _parse(key)
        if name == QKV:
            found[key] = torch.cat([take(_their_name(layer, f"attention.{letter}"))
                                    for letter in "qkv"])
        elif name.startswith(EXPERTS):
            found |= _take_experts(spec, layer, names, take)
        else:
            found[key] = take(_their_name(layer, name))
    if spec.tied and HEAD in names and not torch.equal(take(HEAD), found["token_embedding.weight"]):
        raise ValueError(f"{HEAD} differs from {EMBEDDING}, but tie_word_embeddings=true; "
                         "use the config.json that came with the weights")
    _check(found, model, unread)
    return assemble(model, found, notes)


def _take_experts(spec: FIRA2Spec, layer: str, names: set[str], take: Read) -> dict[str, Tensor]:
    """The stacked weights [E, out, in] of a layer's experts under our names."""
    start, ours = f"model.layers.{layer}.mlp.experts.", f"blocks.{layer}.{EXPERTS}"
    if f"{start}gate_up_proj" in names:
        gate, up = take(f"{start}gate_up_proj").chunk(2, dim=1)
        return {f"{ours}gate.weight": gate.contiguous(), f"{ours}up.weight": up.contiguous(),
                f"{ours}down.weight": take(f"{start}down_proj")}
    return {f"{ours}{part}.weight": torch.stack([take(name) for name in
                                                 _expert_names(spec, layer, EXPERTS + part)])
            for part in ("gate", "up", "down")}


def _check(found: dict[str, Tensor], model: Any, unread: set[str]) -> None:
    if unread:
        raise ValueError(f"tensor {sorted(unread)[0]} is unknown to FIRA2 ({len(unread)} such); "
                         "give a checkpoint without additions")
    wanted = model.state_dict()
    for name, tensor in found.items():
        if tensor.shape != wanted[name].shape:
            raise ValueError(f"{name} would have shape {list(tensor.shape)}, but config.json says "
                             f"{list(wanted[name].shape)}; use the config.json that came with it")
