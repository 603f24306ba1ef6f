"""llama.cpp on a .gguf file, in this process, through the package xllamacpp: a referee for tests.

Import it after `pytest.importorskip("xllamacpp")`.
"""
from __future__ import annotations

import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xllamacpp

ALONE = {"samplers": ["temperature"], "temperature": 0, "cache_prompt": False}  # greedy, no more


class Llama:
    """One loaded file. `context` 0 is the file's own; `exact` keeps keys and values in float32."""

    def __init__(self, file: str | Path, context: int = 0, exact: bool = False) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx, params.n_parallel = context, 1
        params.hostnames, params.port = ["127.0.0.1"], 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.warmup = params.ui = False
        params.verbosity = 0
        params.reasoning_format = xllamacpp.common_reasoning_format.COMMON_REASONING_FORMAT_NONE
        if exact:
            params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            params.flash_attn_type = (
                xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED)
        self.server = xllamacpp.Server(params)

    def complete(self, prompt: str | Sequence[int], count: int,
                 logprobs: int = 0) -> list[dict[str, Any]]:
        """What greedy decoding gives: for each new token its `id`, `token` and `top_logprobs`."""
        given = prompt if isinstance(prompt, str) else list(prompt)
        answer = self.server.handle_completions(
            {"prompt": given, "max_tokens": count, "logprobs": max(1, logprobs), **ALONE})
        return answer["choices"][0]["logprobs"]["content"]

    def chat(self, messages: Sequence[dict[str, str]], count: int) -> str:
        """The greedy next chat turn, in the file's own template."""
        answer = self.server.handle_chat_completions(
            {"messages": list(messages), "max_tokens": count, **ALONE})
        return answer["choices"][0]["message"]["content"]

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """Ids of `text`; names of special tokens count as text unless `special`."""
        return self._post("/tokenize", {"content": text, "add_special": False,
                                        "parse_special": special})["tokens"]

    def apply_template(self, messages: Sequence[dict[str, Any]], tools: Sequence[Any] = (),
                       **options: Any) -> str:
        """What the file's own template makes of a conversation that goes on with an answer."""
        given = {"messages": list(messages), **({"tools": list(tools)} if tools else {}),
                 "chat_template_kwargs": options}
        return self._post("/apply-template", given)["prompt"]

    def _post(self, path: str, body: Any) -> Any:
        request = urllib.request.Request(self.server.listening_address + path,
                                         json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(request) as answer:
            return json.load(answer)
