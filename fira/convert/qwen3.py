"""FIRA2 in the words of Qwen3: its config and tensor names in transformers, and back again.

With several experts it is Qwen3MoeForCausalLM, with one it is Qwen3ForCausalLM. Some facts have
two spellings, for transformers 5 and for readers of version 4. Experts are separate tensors in the
file; version 5 may also store them stacked, which is read too.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fira.config import ConfigError, parse
from fira.model.files import assemble, build_meta
from fira.model.fira2 import RMSNorm
from fira.model.initialize import STD
from fira.model.spec import FIRA2Spec

MOE, DENSE = "qwen3_moe", "qwen3"
CLASS = {MOE: "Qwen3MoeForCausalLM", DENSE: "Qwen3ForCausalLM"}
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
BLOCK = {"attention_norm": "input_layernorm", "attention.query_norm": "self_attn.q_norm",
         "attention.key_norm": "self_attn.k_norm", "attention.output": "self_attn.o_proj",
         "moe_norm": "post_attention_layernorm", "moe.router": "mlp.gate"}
EXPERT = ("gate", "up", "down")
# of no use to other engines, kept for ours
TRAINING = ("balance", "balance_weight")

Read = Callable[[str], Tensor]


def kind(spec: FIRA2Spec) -> str:
    """The model_type."""
    return DENSE if spec.num_experts == 1 else MOE


def describe(spec: FIRA2Spec, dtype: torch.dtype) -> dict[str, Any]:
    """The config.json of transformers, without token ids."""
    name = str(dtype).removeprefix("torch.")
    config = {
        "architectures": [CLASS[kind(spec)]], "model_type": kind(spec),
        "vocab_size": spec.vocab_size, "hidden_size": spec.d_model,
        "intermediate_size": spec.d_ff * spec.top_k, "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.n_head, "num_key_value_heads": spec.n_kv_head,
        "head_dim": spec.head_dim, "hidden_act": "silu", "max_position_embeddings": spec.context,
        "initializer_range": STD, "rms_norm_eps": RMSNorm.eps, "use_cache": True,
        "tie_word_embeddings": spec.tied, "attention_bias": False, "attention_dropout": 0.0,
        "use_sliding_window": False, "sliding_window": None, "rope_theta": spec.rope_theta,
        "rope_parameters": {"rope_theta": spec.rope_theta, "rope_type": "default"},
        "dtype": name, "torch_dtype": name}
    if kind(spec) == DENSE:
        return config
    return config | {
        "num_experts": spec.num_experts, "num_local_experts": spec.num_experts,
        "num_experts_per_tok": spec.top_k, "moe_intermediate_size": spec.d_ff,
        "norm_topk_prob": spec.top_k > 1, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "output_router_logits": False, "router_aux_loss_coef": spec.balance_weight}


def tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its name in transformers; a tied head is a copy of the embedding."""
    spec, state = model.spec, model.state_dict()
    yield EMBEDDING, state["token_embedding.weight"]
    yield NORM, state["norm.weight"]
    yield HEAD, state["token_embedding.weight"].clone() if spec.tied else state["head.weight"]
    for layer in range(spec.num_layers):
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        for old, new in BLOCK.items():
            if f"{ours}{old}.weight" in state:
                yield f"{theirs}{new}.weight", state[f"{ours}{old}.weight"]
        parts = state[f"{ours}attention.qkv.weight"].split(qkv_sizes(spec))
        for name, part in zip("qkv", parts, strict=True):
            yield f"{theirs}self_attn.{name}_proj.weight", part
        for part in EXPERT:
            stacked = state[f"{ours}moe.experts.{part}.weight"]
            for expert, name in enumerate(_expert_names(spec, theirs, part)):
                yield name, stacked[expert]


def qkv_sizes(spec: FIRA2Spec) -> list[int]:
    """Rows of queries, keys and values in the fused projection."""
    return [heads * spec.head_dim for heads in (spec.n_head, spec.n_kv_head, spec.n_kv_head)]


def _expert_names(spec: FIRA2Spec, theirs: str, part: str) -> list[str]:
    if kind(spec) == DENSE:
        return [f"{theirs}mlp.{part}_proj.weight"]
    return [f"{theirs}mlp.experts.{expert}.{part}_proj.weight"
            for expert in range(spec.num_experts)]


def spec_of(config: dict[str, Any]) -> FIRA2Spec:
    """The FIRA2 that a config.json describes. Raises ValueError for what FIRA2 cannot hold."""
    model_type = config.get("model_type")
    if model_type not in CLASS:
        raise ValueError(f"model_type={model_type!r} is not one that FIRA2 can hold: "
                         f"{' or '.join(CLASS)}; give a checkpoint of such a model")
    moe = model_type == MOE
    rope = {"rope_type": "default", **table(config, "rope_scaling"),
            **table(config, "rope_parameters")}
    top_k = _need(config, "num_experts_per_tok") if moe else 1
    for key, found, wanted in [
            ("hidden_act", config.get("hidden_act", "silu"), "silu"),
            ("attention_bias", config.get("attention_bias", False), False),
            ("rms_norm_eps", config.get("rms_norm_eps", RMSNorm.eps), RMSNorm.eps),
            ("use_sliding_window", config.get("use_sliding_window", False), False),
            ("rope_type", rope.get("type", rope["rope_type"]), "default"),
            ("decoder_sparse_step", config.get("decoder_sparse_step", 1), 1),
            ("mlp_only_layers", config.get("mlp_only_layers") or [], []),
            ("norm_topk_prob", config.get("norm_topk_prob", False) if moe else False, top_k > 1)]:
        if found != wanted:
            raise ValueError(f"{key}={found} is not what FIRA2 computes, which has {key}={wanted}; "
                             "give a checkpoint with that setting")
    ours = table(config, "fira")
    fields = {
        "vocab_size": _need(config, "vocab_size"), "d_model": _need(config, "hidden_size"),
        "n_head": _need(config, "num_attention_heads"),
        "n_kv_head": _need(config, "num_key_value_heads"), "head_dim": config.get("head_dim", 128),
        "num_layers": _need(config, "num_hidden_layers"),
        "context": _need(config, "max_position_embeddings"), "top_k": top_k,
        "d_ff": _need(config, "moe_intermediate_size" if moe else "intermediate_size"),
        "num_experts": _need(config, "num_experts", "num_local_experts") if moe else 1,
        "tied": config.get("tie_word_embeddings", False),
        "rope_theta": rope.get("rope_theta", config.get("rope_theta", 10000.0)),
        **{key: ours[key] for key in TRAINING if key in ours}}
    try:
        return parse(FIRA2Spec, fields)
    except ConfigError as error:
        raise ValueError(f"{error}; FIRA2 cannot hold such a model") from None


def table(config: dict[str, Any], key: str) -> dict[str, Any]:
    """What stands under a key that may be missing or null. Raises ValueError if it is no table."""
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
    spec, unread = spec_of(config), set(names)
    model = build_meta(spec)
    wanted = model.state_dict()

    def take(name: str) -> Tensor:
        if name not in names:
            raise ValueError(f"tensor {name} is missing; copy every file of the checkpoint")
        unread.discard(name)
        return read(name)

    found = {"token_embedding.weight": take(EMBEDDING), "norm.weight": take(NORM)}
    if not spec.tied:
        found["head.weight"] = take(HEAD)
    elif HEAD in names and not torch.equal(take(HEAD), found["token_embedding.weight"]):
        raise ValueError(f"{HEAD} differs from {EMBEDDING}, but tie_word_embeddings=true; "
                         "use the config.json that came with the weights")
    for layer in range(spec.num_layers):
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        for new, old in BLOCK.items():
            if f"{ours}{new}.weight" in wanted:
                found[f"{ours}{new}.weight"] = take(f"{theirs}{old}.weight")
        found[f"{ours}attention.qkv.weight"] = torch.cat(
            [take(f"{theirs}self_attn.{name}_proj.weight") for name in "qkv"])
        for part, stacked in _experts(spec, theirs, names, take):
            found[f"{ours}moe.experts.{part}.weight"] = stacked
    if unread:
        raise ValueError(f"tensor {sorted(unread)[0]} is unknown to FIRA2 ({len(unread)} such); "
                         "give a checkpoint without additions")
    for name, tensor in found.items():
        if tensor.shape != wanted[name].shape:
            raise ValueError(f"{name} would have shape {list(tensor.shape)}, but config.json says "
                             f"{list(wanted[name].shape)}; use the config.json that came with it")
    return assemble(model, found, notes)


def _experts(spec: FIRA2Spec, theirs: str, names: set[str],
             take: Read) -> Iterator[tuple[str, Tensor]]:
    """(gate, up or down, stacked weights [E, out, in]) from separate tensors or stacked ones."""
    fused = f"{theirs}mlp.experts.gate_up_proj"
    if fused in names:
        gate, up = take(fused).chunk(2, dim=1)
        yield from [("gate", gate.contiguous()), ("up", up.contiguous()),
                    ("down", take(f"{theirs}mlp.experts.down_proj"))]
    else:
        for part in EXPERT:
            yield part, torch.stack([take(name) for name in _expert_names(spec, theirs, part)])
