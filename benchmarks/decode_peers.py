"""Peers for decode_kernel.py: models of the same shapes, random weights, in other engines."""
from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
import xllamacpp

from fira.model.spec import FIRA2Spec, FIRASpec

TOP_K = 40  # of sampling, on every side


def transformers_model(spec: Any) -> Any:
    """Qwen3-MoE for FIRA2; GPT-2, whose token reads as many weights at top-1, for FIRA."""
    if isinstance(spec, FIRA2Spec):
        config = transformers.Qwen3MoeConfig(
            vocab_size=spec.vocab_size, hidden_size=spec.d_model, num_hidden_layers=spec.num_layers,
            num_attention_heads=spec.n_head, num_key_value_heads=spec.n_kv_head,
            head_dim=spec.head_dim, moe_intermediate_size=spec.d_ff, num_experts=spec.num_experts,
            num_experts_per_tok=spec.top_k, norm_topk_prob=True, tie_word_embeddings=True,
            max_position_embeddings=spec.context)
        return transformers.Qwen3MoeForCausalLM(config).eval()
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=spec.vocab_size, n_embd=spec.d_model, n_layer=spec.num_layers,
        n_head=spec.n_head, n_inner=spec.d_ff, n_positions=spec.context)).eval()


def transformers_decoder(spec: Any) -> Callable[[int], None]:
    model = transformers_model(spec)
    prompt = torch.ones(1, 1, dtype=torch.int64)

    def decode(tokens: int) -> None:
        with torch.inference_mode():
            model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens,
                           min_new_tokens=tokens, do_sample=True, top_k=TOP_K, pad_token_id=0)
    return decode


def llamacpp_decoder(spec: Any, kind: str, threads: int, folder: Path) -> Callable[[int], float]:
    """Tokens per second by llama.cpp's own clock, sampling included."""
    path = folder / f"{spec.architecture}-{kind}.gguf"
    write_gguf(spec, gguf.GGMLQuantizationType[kind], path)
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(path), 512, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)

    def decode(tokens: int) -> float:
        answer = server.handle_completions({
            "prompt": [1], "max_tokens": tokens, "n_predict": tokens, "ignore_eos": True,
            "temperature": 1.0, "top_k": TOP_K, "cache_prompt": False})
        answer = json.loads(answer) if isinstance(answer, str) else answer
        timings = answer["timings"]
        assert timings["predicted_n"] == tokens, timings
        return float(timings["predicted_per_second"])
    return decode


def write_gguf(spec: Any, kind: gguf.GGMLQuantizationType, path: Path) -> None:
    moe = isinstance(spec, FIRA2Spec)
    writer = gguf.GGUFWriter(path, "qwen3moe" if moe else "gpt2")
    writer.add_block_count(spec.num_layers)
    writer.add_context_length(spec.context)
    writer.add_embedding_length(spec.d_model)
    writer.add_feed_forward_length(spec.d_ff)
    writer.add_head_count(spec.n_head)
    if moe:
        writer.add_head_count_kv(spec.n_kv_head)
        writer.add_key_length(spec.head_dim)
        writer.add_value_length(spec.head_dim)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_rope_freq_base(spec.rope_theta)
        writer.add_expert_count(spec.num_experts)
        writer.add_expert_used_count(spec.top_k)
        writer.add_expert_feed_forward_length(spec.d_ff)
    else:
        writer.add_layer_norm_eps(1e-5)
    add_vocabulary(writer, spec.vocab_size)
    random = np.random.default_rng(0)
    for name, shape in (moe_tensors if moe else gpt2_tensors)(spec):
        tensor = 0.02 * random.standard_normal(shape, np.float32)
        tensor += float(name.endswith("norm.weight"))
        fixed = len(shape) == 1 or name.startswith("position") or "gate_inp" in name
        stored = gguf.GGMLQuantizationType.F32 if fixed else kind
        writer.add_tensor(name, gguf.quantize(tensor, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """Names for all ids; nothing here is ever tokenized."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{number}" for number in range(size)])
    writer.add_token_types([gguf.TokenType.NORMAL] * size)
    writer.add_token_merges(["t 1"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


def moe_tensors(spec: FIRA2Spec) -> Iterator[tuple[str, tuple[int, ...]]]:
    D, C, E, F = spec.d_model, spec.head_dim, spec.num_experts, spec.d_ff
    yield "token_embd.weight", (spec.vocab_size, D)
    yield "output_norm.weight", (D,)
    for layer in range(spec.num_layers):
        shapes = {"attn_norm": (D,), "ffn_norm": (D,), "attn_q": (spec.n_head * C, D),
                  "attn_k": (spec.n_kv_head * C, D), "attn_v": (spec.n_kv_head * C, D),
                  "attn_output": (D, spec.n_head * C), "attn_q_norm": (C,), "attn_k_norm": (C,),
                  "ffn_gate_inp": (E, D), "ffn_gate_exps": (E, F, D), "ffn_up_exps": (E, F, D),
                  "ffn_down_exps": (E, D, F)}
        for name, shape in shapes.items():
            yield f"blk.{layer}.{name}.weight", shape


def gpt2_tensors(spec: FIRASpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    D, F = spec.d_model, spec.d_ff
    yield "token_embd.weight", (spec.vocab_size, D)
    yield "position_embd.weight", (spec.context, D)
    yield "output_norm.weight", (D,)
    yield "output_norm.bias", (D,)
    for layer in range(spec.num_layers):
        for name, out, width in (("attn_norm", D, 0), ("ffn_norm", D, 0), ("attn_qkv", 3 * D, D),
                                 ("attn_output", D, D), ("ffn_up", F, D), ("ffn_down", D, F)):
            yield f"blk.{layer}.{name}.weight", (out, width) if width else (out,)
            yield f"blk.{layer}.{name}.bias", (out,)
