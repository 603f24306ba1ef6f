"""FIRA2 as one GGUF file, which llama.cpp, Ollama and LM Studio run.

The tensors are Qwen3's under llama.cpp's names; queries and keys need no permutation. Norms and
routers stay float32. In a q4_0 or q5_0 file the embedding and the head are q8_0, because llama.cpp
also stores them with more bits when it quantizes. Its llama-quantize makes k-quants from an f16 or
f32 file.
"""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from fira.convert import qwen3
from fira.convert.files import load_run
from fira.convert.hf import chat_template, check_router
from fira.data.encoder import PATTERNS, pattern_of
from fira.data.tokenizer import PAD, TURN_END, Tokenizer
from fira.files import check_new, new_target, sha256, write_text
from fira.model.generate import window_length
from fira.model.router import routers

try:
    import gguf
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType, TokenType
except ModuleNotFoundError:
    raise ValueError("GGUF files are written by the package gguf, which is not installed; "
                     "pip install 'fira-moe[export]'") from None

ARCHITECTURE = {qwen3.MOE: "qwen3moe", qwen3.DENSE: "qwen3"}
EIGHT_BIT = ("token_embd.weight", "output.weight")  # q8_0 in a q4_0 or q5_0 file
CHAT_MODELFILE = """{{ range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""
BASE_MODELFILE = "{end}{{{{ .Prompt }}}}"  # a text after an end-of-text token, as in training


def export_run(run: Path, file: Path, type_name: str, screen: Console) -> None:
    """Write the newest step of `run` as the new GGUF `file`, with a Modelfile for Ollama and a
    checksum beside it, and say how to run them. Raises ValueError, one line, if that is not
    possible."""
    checksum = file.with_name(f"{file.name}.sha256")  # sha256sum -c reads it
    for path in (file, checksum):
        check_new(path)
    model, tokenizer, _ = load_run(run)
    modelfile = write_model(model, tokenizer, file, type_name)
    write_text(checksum, f"{sha256(file)}  {file.name}\n")
    for path in (file, modelfile, checksum):
        screen.print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)", soft_wrap=True)
    screen.print(f"run it: llama-server -m {file}, or ollama create {file.stem} -f {modelfile}",
                 soft_wrap=True)


def write_model(model: Any, tokenizer: Tokenizer, file: Path, type_name: str) -> Path:
    """Write `model` into the new `file`, and a Modelfile beside it, whose path is returned.

    Raises ValueError, one line, if a file exists, llama.cpp cannot compute the model, or a width
    does not fit the type.
    """
    _check_model(model)
    _check_widths(model.spec, type_name)
    planned = [(name, tensor, _type_of(name, type_name)) for name, tensor in _tensors(model)]
    modelfile = file.with_name(f"{file.stem}.Modelfile")
    check_new(modelfile)
    chat, end = bool(getattr(model, "chat", False)), tokenizer.decode([tokenizer.end_of_text])
    with new_target(file) as partial:
        writer = gguf.GGUFWriter(partial, ARCHITECTURE[qwen3.kind(model.spec)])
        _describe(writer, model, file.stem, type_name)
        _add_tokenizer(writer, tokenizer, model.spec.vocab_size)
        writer.add_chat_template(chat_template(tokenizer, chat, getattr(model, "think", False)))
        for name, tensor, type in planned:
            shape = gguf.quant_shape_to_byte_shape(tensor.shape, type)
            writer.add_tensor_info(name, shape, np.dtype(np.uint8), int(np.prod(shape)), type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, tensor, type in planned:  # one at a time, so that memory stays near the model's
            numbers = tensor.detach().to("cpu", torch.float32).numpy()
            writer.write_tensor_data(gguf.quantize(numbers, type).view(np.uint8))
        writer.close()
    write_text(modelfile, _modelfile(file.name, end, chat, window_length(model)))
    return modelfile


def _check_model(model: Any) -> None:
    spec = model.spec
    if spec.architecture == "fira":
        raise ValueError("a FIRA model cannot become a GGUF file, because llama.cpp has no model "
                         "with learned positions, LayerNorm and experts with biases; use fira "
                         "export hf, or train a FIRA2 model")
    if not all(router.renormalize for router in routers(model)):
        raise ValueError("this model cannot become a GGUF file: it multiplies an expert's output "
                         f"by its probability (top_k={spec.top_k}, renormalize="
                         f"{str(spec.renormalize).lower()}), but llama.cpp renormalizes the "
                         "weights of the chosen experts to the sum 1; use fira export hf, or train "
                         "with model.top_k=2")
    check_router(model)


def _tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its name in llama.cpp, which keeps the experts of a layer in one."""
    spec = model.spec
    architecture = gguf.MODEL_ARCH[ARCHITECTURE[qwen3.kind(spec)].upper()]
    table = gguf.get_tensor_name_map(architecture, spec.num_layers)
    for key, tensor in qwen3.weights(model):
        names, parts = qwen3.names(spec, key), qwen3.separate(spec, key, tensor)
        if ".experts.0." in names[0]:
            names, parts = [names[0].replace(".experts.0.", ".experts.")], [tensor]
        for name, part in zip(names, parts, strict=True):
            theirs = table.get_name(name, (".weight",))
            assert theirs, f"llama.cpp has no name for {name}"
            yield theirs, part


def _type_of(name: str, type_name: str) -> GGMLQuantizationType:
    if "norm" in name or "ffn_gate_inp" in name:
        return GGMLQuantizationType.F32
    if type_name in ("q5_0", "q4_0") and name in EIGHT_BIT:
        return GGMLQuantizationType.Q8_0
    return GGMLQuantizationType[type_name.upper()]


def _check_widths(spec: Any, type_name: str) -> None:
    block = GGML_QUANT_SIZES[GGMLQuantizationType[type_name.upper()]][0]
    for name, width in {"d_model": spec.d_model, "n_head * head_dim": spec.n_head * spec.head_dim,
                        "d_ff": spec.d_ff}.items():
        if width % block:
            raise ValueError(f"{name}={width} does not fit {type_name}, which packs {block} "
                             f"weights of a row together: it must be a multiple of {block}; "
                             "choose --type f32, f16 or bf16")


def _describe(writer: Any, model: Any, name: str, type_name: str) -> None:
    spec = model.spec
    share = "ALL" if type_name == "f32" else "MOSTLY"
    facts = {"name": name, "file_type": int(LlamaFileType[f"{share}_{type_name.upper()}"]),
             "quantization_version": gguf.GGML_QUANT_VERSION, "block_count": spec.num_layers,
             "context_length": window_length(model),  # to llama.cpp it is the length trained on
             "embedding_length": spec.d_model, "feed_forward_length": spec.d_ff * spec.top_k,
             "head_count": spec.n_head, "head_count_kv": spec.n_kv_head,
             "key_length": spec.head_dim, "value_length": spec.head_dim,
             "layer_norm_rms_eps": spec.norm_eps, "rope_freq_base": spec.rope_theta,
             "vocab_size": spec.vocab_size}
    if qwen3.kind(spec) == qwen3.MOE:
        facts |= {"expert_count": spec.num_experts, "expert_used_count": spec.top_k,
                  "expert_feed_forward_length": spec.d_ff}
    for fact, value in facts.items():
        getattr(writer, f"add_{fact}")(value)


def _add_tokenizer(writer: Any, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Write the vocabulary; embedding rows beyond it become unused tokens. Raises ValueError if
    llama.cpp would split text in another way."""
    pattern = pattern_of(tokenizer.description)
    if pattern not in PATTERNS:
        raise ValueError("llama.cpp does not split text as this tokenizer does; train with a "
                         f"tokenizer that splits as one of: {', '.join(PATTERNS.values())}")
    words = [f"[PAD{id}]" for id in range(vocab_size)]
    types = [TokenType.UNUSED] * vocab_size
    for word, id in tokenizer.description["model"]["vocab"].items():
        words[id], types[id] = word, TokenType.NORMAL
    for token in tokenizer.description["added_tokens"]:
        special = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        words[token["id"]], types[token["id"]] = token["content"], special
    merges = tokenizer.description["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PATTERNS[pattern])
    writer.add_token_list(words)
    writer.add_token_types(types)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.end_of_text)
    writer.add_eos_token_id(tokenizer.end_of_text)
    writer.add_add_bos_token(False)
    if TURN_END in tokenizer.added:
        writer.add_eot_token_id(tokenizer.special(TURN_END))
    if PAD in tokenizer.added:
        writer.add_pad_token_id(tokenizer.special(PAD))


def _modelfile(file: str, end: str, chat: bool, context: int) -> str:
    template = CHAT_MODELFILE if chat else BASE_MODELFILE.format(end=end)
    stops = [end, TURN_END] if chat else [end]
    return "\n".join([f"FROM ./{file}", f'TEMPLATE """{template}"""',
                      *(f'PARAMETER stop "{stop}"' for stop in stops),
                      f"PARAMETER num_ctx {context}", "PARAMETER temperature 0.8",
                      "PARAMETER top_k 50", ""])
