"""FIRA2 as one GGUF file, which llama.cpp, Ollama and LM Studio run.

The tensors are Qwen3's under llama.cpp's names; queries and keys need no permutation. Norms and
routers stay float32. In a quantized file the embedding and the head get a finer type, and in the
_m mixes so do the values and the `down` matrices of the first and last eighth of the layers and of
every third between, as llama.cpp's own mixes have it.
"""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType, TokenType
from torch import Tensor

from fira.convert.limits import check_target
from fira.convert.llamacpp import quantize
from fira.convert.qwen3 import DENSE, EXPERT, kind, qkv_sizes
from fira.convert.target import check_new, new_target
from fira.data import fast
from fira.data.tokenizer import PAD, TURN_END, Tokenizer
from fira.model.fira2 import RMSNorm
from fira.model.generate import window_length

_Type = GGMLQuantizationType


class Mix(NamedTuple):
    """The types of matrices: most of them, embedding and head, and those that suffer most."""

    matrix: _Type
    embedding: _Type
    sensitive: _Type
    file_type: LlamaFileType


MIXES = {
    "f32": Mix(_Type.F32, _Type.F32, _Type.F32, LlamaFileType.ALL_F32),
    "f16": Mix(_Type.F16, _Type.F16, _Type.F16, LlamaFileType.MOSTLY_F16),
    "bf16": Mix(_Type.BF16, _Type.BF16, _Type.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": Mix(_Type.Q8_0, _Type.Q8_0, _Type.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q6_k": Mix(_Type.Q6_K, _Type.Q6_K, _Type.Q6_K, LlamaFileType.MOSTLY_Q6_K),
    "q5_k_m": Mix(_Type.Q5_K, _Type.Q6_K, _Type.Q6_K, LlamaFileType.MOSTLY_Q5_K_M),
    "q5_0": Mix(_Type.Q5_0, _Type.Q8_0, _Type.Q5_0, LlamaFileType.MOSTLY_Q5_0),
    "q4_k_m": Mix(_Type.Q4_K, _Type.Q6_K, _Type.Q6_K, LlamaFileType.MOSTLY_Q4_K_M),
    "q4_k_s": Mix(_Type.Q4_K, _Type.Q6_K, _Type.Q4_K, LlamaFileType.MOSTLY_Q4_K_S),
    "q4_0": Mix(_Type.Q4_0, _Type.Q8_0, _Type.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}
PLAIN = (_Type.F32, _Type.F16, _Type.BF16, _Type.Q8_0, _Type.Q5_0, _Type.Q4_0)  # made by `gguf`
NAMES = {"attention_norm": "attn_norm", "attention.query_norm": "attn_q_norm",
         "attention.key_norm": "attn_k_norm", "attention.output": "attn_output",
         "moe_norm": "ffn_norm", "moe.router": "ffn_gate_inp"}
PRECISE = ("norm", "ffn_gate_inp")  # float32 in every file

CHAT_MODELFILE = """{{ range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""
BASE_MODELFILE = "{end}{{{{ .Prompt }}}}"  # as in training, a text begins after an end of text
BASE_TEMPLATE = (  # a model that knows no chat turns continues the text so far, as in fira chat
    "{end}{{% for message in messages %}}{{{{ message['content'] }}}}"
    "{{% if message['role'] != 'user' %}}{{{{ '\n' }}}}{{% endif %}}{{% endfor %}}")


def export_gguf(model: Any, tokenizer: Tokenizer, file: Path, type_name: str,
                chat: bool = False) -> list[Path]:
    """Write `model` into the new `file`, and a Modelfile for Ollama beside it; returns both.

    Raises ValueError, one line, if a target exists, the model has no such form, or a width does not
    fit the type.
    """
    check_target(model, "gguf")
    mix = MIXES[type_name]
    planned = [(name, tensor, _type_of(name, mix, model.spec.num_layers))
               for name, tensor in tensors(model)]
    _check_widths(model.spec, planned, type_name)
    modelfile = file.with_name(f"{file.stem}.Modelfile")
    check_new(modelfile)
    with new_target(file) as partial:
        writer = gguf.GGUFWriter(partial, "qwen3" if kind(model.spec) == DENSE else "qwen3moe")
        _describe(writer, model, file.stem, mix)
        _add_tokenizer(writer, tokenizer, model.spec.vocab_size)
        template = tokenizer.settings.get("chat_template") if chat else None
        writer.add_chat_template(template or BASE_TEMPLATE.format(end=_end(tokenizer)))
        for name, tensor, type in planned:
            shape = gguf.quant_shape_to_byte_shape(tensor.shape, type)
            writer.add_tensor_info(name, shape, np.dtype(np.uint8), int(np.prod(shape)), type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, tensor, type in planned:  # one at a time, so that memory stays near the model's
            writer.write_tensor_data(_store(tensor, type))
        writer.close()
    modelfile.write_text(_modelfile(model, tokenizer, file.name, chat), encoding="utf-8")
    return [file, modelfile]


def tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its name in llama.cpp."""
    spec, state = model.spec, model.state_dict()
    yield "token_embd.weight", state["token_embedding.weight"]
    yield "output_norm.weight", state["norm.weight"]
    if not spec.tied:
        yield "output.weight", state["head.weight"]
    for layer in range(spec.num_layers):
        ours, theirs = f"blocks.{layer}.", f"blk.{layer}."
        for old, new in NAMES.items():
            if f"{ours}{old}.weight" in state:
                yield f"{theirs}{new}.weight", state[f"{ours}{old}.weight"]
        parts = state[f"{ours}attention.qkv.weight"].split(qkv_sizes(spec))
        for name, part in zip("qkv", parts, strict=True):
            yield f"{theirs}attn_{name}.weight", part
        for name in EXPERT:
            stacked = state[f"{ours}moe.experts.{name}.weight"]
            if kind(spec) == DENSE:
                yield f"{theirs}ffn_{name}.weight", stacked[0]
            else:
                yield f"{theirs}ffn_{name}_exps.weight", stacked


def _type_of(name: str, mix: Mix, num_layers: int) -> _Type:
    if any(word in name for word in PRECISE):
        return _Type.F32
    if name in ("token_embd.weight", "output.weight"):
        return mix.embedding
    layer, eighth = int(name.split(".")[1]), num_layers // 8
    outer = layer < eighth or layer >= num_layers - eighth or (layer - eighth) % 3 == 2
    return mix.sensitive if outer and ("attn_v" in name or "ffn_down" in name) else mix.matrix


def _check_widths(spec: Any, planned: list[tuple[str, Tensor, _Type]], type_name: str) -> None:
    origin = {"attn_output": f"n_head * head_dim = {spec.n_head * spec.head_dim}",
              "ffn_down": f"d_ff={spec.d_ff}"}
    for name, tensor, type in planned:
        block, width = GGML_QUANT_SIZES[type][0], tensor.shape[-1]
        if width % block:
            part = name.split(".")[-2].removesuffix("_exps")
            fit = ("f16, q8_0, q5_0 or q4_0" if width % 32 == 0 else "f32, f16 or bf16")
            raise ValueError(f"{origin.get(part, f'd_model={spec.d_model}')} does not fit "
                             f"{type_name}, which packs {block} weights of a row together: it must "
                             f"be a multiple of {block}; choose --type {fit}")


def _store(tensor: Tensor, type: _Type) -> np.ndarray:
    numbers = tensor.detach().to("cpu", torch.float32).numpy()
    stored = gguf.quantize(numbers, type) if type in PLAIN else quantize(numbers, type)
    return stored.view(np.uint8) if stored.dtype != np.uint8 else stored


def _describe(writer: Any, model: Any, name: str, mix: Mix) -> None:
    spec = model.spec
    writer.add_name(name)
    writer.add_file_type(int(mix.file_type))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(spec.num_layers)
    writer.add_context_length(window_length(model))  # to llama.cpp it is the length trained on
    writer.add_embedding_length(spec.d_model)
    writer.add_feed_forward_length(spec.d_ff * spec.top_k)
    writer.add_head_count(spec.n_head)
    writer.add_head_count_kv(spec.n_kv_head)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_layer_norm_rms_eps(RMSNorm.eps)
    writer.add_rope_freq_base(spec.rope_theta)
    writer.add_vocab_size(spec.vocab_size)
    if kind(spec) != DENSE:
        writer.add_expert_count(spec.num_experts)
        writer.add_expert_used_count(spec.top_k)
        writer.add_expert_feed_forward_length(spec.d_ff)


def _add_tokenizer(writer: Any, tokenizer: Tokenizer, vocab_size: int) -> None:
    """The vocabulary, rows of the embedding beyond it as unused tokens. Raises ValueError if
    llama.cpp would cut text otherwise."""
    pattern = fast.pattern_of(tokenizer.description)
    if pattern not in fast.PATTERNS:
        raise ValueError("llama.cpp does not cut text as this tokenizer does; it knows "
                         f"{', '.join(fast.PATTERNS.values())}, so train with such a tokenizer")
    words = [f"[PAD{id}]" for id in range(vocab_size)]
    types = [TokenType.UNUSED] * vocab_size
    for word, id in tokenizer.description["model"]["vocab"].items():
        words[id], types[id] = word, TokenType.NORMAL
    for token in tokenizer.description["added_tokens"]:
        special = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        words[token["id"]], types[token["id"]] = token["content"], special
    merges = tokenizer.description["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(fast.PATTERNS[pattern])
    writer.add_token_list(words)
    writer.add_token_types(types)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    names = tokenizer.added_names()
    writer.add_bos_token_id(tokenizer.end_of_text)
    writer.add_eos_token_id(tokenizer.end_of_text)
    writer.add_add_bos_token(False)
    if TURN_END in names:
        writer.add_eot_token_id(tokenizer.special(TURN_END))
    if PAD in names:
        writer.add_pad_token_id(tokenizer.special(PAD))


def _end(tokenizer: Tokenizer) -> str:
    """The name of the end-of-text token."""
    return next(token["content"] for token in tokenizer.description["added_tokens"]
                if token["id"] == tokenizer.end_of_text)


def _modelfile(model: Any, tokenizer: Tokenizer, name: str, chat: bool) -> str:
    end = _end(tokenizer)
    template = CHAT_MODELFILE if chat else BASE_MODELFILE.format(end=end)
    stops = [end, TURN_END] if chat else [end]
    return "\n".join([f"FROM ./{name}", f'TEMPLATE """{template}"""',
                      *(f'PARAMETER stop "{stop}"' for stop in stops),
                      f"PARAMETER num_ctx {window_length(model)}", "PARAMETER temperature 0.8",
                      "PARAMETER top_k 50", ""])
