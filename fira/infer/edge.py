"""A .gguf file through llama.cpp, in this process: `fira chat FILE.gguf`.

xllamacpp holds llama.cpp and its HTTP server, bound to a free port of this machine alone; `address`
is where it speaks OpenAI's language. Text streams through callbacks of the library, which run in a
thread of their own here so that they become an iterator.
"""
from __future__ import annotations

import json
import queue
import threading
import urllib.request
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from fira.data.tokenizer import END_OF_TEXT
from fira.infer.chat import BASE, talk
from fira.runlog import console
from fira.runtime import workers

INSTALL = "pip install 'fira-moe[edge]'"
GGUF_MAGIC = b"GGUF"
Message = dict[str, str]


class Edge:
    """One loaded .gguf file. `context` 0 is the file's own; `exact` keeps keys and values float32.

    `slots` sequences at once share the context; port 0 is a free one. Raises ValueError, one line,
    if llama.cpp is not installed or cannot load the file.
    """

    def __init__(self, file: str | Path, context: int = 0, exact: bool = False, slots: int = 1,
                 host: str = "127.0.0.1", port: int = 0, name: str = "") -> None:
        _check_file(Path(file))
        try:
            import xllamacpp
        except ImportError:
            raise ValueError(f".gguf files run through llama.cpp, which is not installed; {INSTALL}"
                             ) from None
        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx, params.n_parallel = context, slots
        params.hostnames, params.port = [host], port
        if name:
            params.model_alias = {name}
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = workers()
        params.warmup = params.ui = False
        params.verbosity = 0
        params.reasoning_format = xllamacpp.common_reasoning_format.COMMON_REASONING_FORMAT_NONE
        if exact:
            params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            params.flash_attn_type = (
                xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED)
        try:
            self.server = xllamacpp.Server(params)
        except RuntimeError:
            raise ValueError(f"llama.cpp cannot load {file}: it is cut short, or a kind of model "
                             "that this xllamacpp does not know; copy it again, or update "
                             "xllamacpp") from None
        self.address = self.server.listening_address
        facts = self._get("/props")
        self.template: str = facts["chat_template"]
        self.context: int = facts["default_generation_settings"]["n_ctx"]

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """llama.cpp's ids of `text`; names of special tokens count as text unless `special`."""
        return self._get("/tokenize", {"content": text, "add_special": False,
                                       "parse_special": special})["tokens"]

    def count(self, messages: Sequence[Message]) -> int:
        """Tokens that `messages` take in the model's own template."""
        prompt = self._get("/apply-template", {"messages": list(messages)})["prompt"]
        return len(self.tokenize(prompt, special=True))

    def chat(self, messages: Sequence[Message], max_new_tokens: int = 256,
             **sampling: Any) -> Generator[str, None, None]:
        """Stream the next turn. Sampling is that of `fira generate`."""
        request = {"messages": list(messages)} | _request(max_new_tokens, **sampling)
        for choice in self._stream(self.server.handle_chat_completions, request):
            yield choice["delta"].get("content") or ""

    def complete(self, prompt: str | Sequence[int], max_new_tokens: int = 128,
                 **sampling: Any) -> Generator[str, None, None]:
        """Stream what follows a text or ids."""
        given = prompt if isinstance(prompt, str) else list(prompt)
        request = {"prompt": given} | _request(max_new_tokens, **sampling)
        for choice in self._stream(self.server.handle_completions, request):
            yield choice["text"]

    def _stream(self, handle: Any, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Choices of a streamed answer. Raises ValueError with llama.cpp's own words."""
        events: queue.Queue[Any] = queue.Queue()
        stopped = threading.Event()

        def listen(chunk: Any) -> bool:
            events.put(chunk)
            return stopped.is_set()  # true ends the generation

        def work() -> None:
            try:
                handle(request | {"stream": True}, listen)
                events.put(None)
            except Exception as error:  # carried over to the reader, who raises it
                events.put(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            while (event := events.get()) is not None:
                if isinstance(event, Exception):
                    raise event
                if "error" in event:
                    raise ValueError(f"llama.cpp: {event['error']['message']}")
                yield from event["choices"]
        finally:
            stopped.set()
            thread.join()

    def _get(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data,
                                         {"Content-Type": "application/json"})
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(request) as answer:
            return json.load(answer)


class EdgeConversation:
    """`fira.infer.chat.Conversation` with llama.cpp's model, tokenizer and template."""

    def __init__(self, edge: Edge, system: str | None, max_new_tokens: int, seed: int | None,
                 **sampling: Any) -> None:
        self.edge, self.max_new_tokens, self.seed = edge, max_new_tokens, seed
        self.sampling = sampling
        self.system = [{"role": "system", "content": system}] if system else []
        self.turns: list[Message] = []
        self.budget = edge.context - max_new_tokens

    def reset(self) -> None:
        self.turns = []

    def ask(self, text: str) -> int:
        """Add a user turn; returns how many old turns had to be dropped to make it fit.

        Raises ValueError if it does not fit even alone; the conversation is then as before.
        """
        turns = [*self.turns, {"role": "user", "content": text}]
        kept = turns
        while (length := self.edge.count([*self.system, *kept])) > self.budget and len(kept) > 1:
            kept = kept[2:]
        if length > self.budget:
            raise ValueError(f"the message takes {length} tokens and {self.budget} fit beside an "
                             f"answer of {self.max_new_tokens}; shorten it or lower max_new_tokens")
        self.turns = kept
        return len(turns) - len(kept)

    def answer(self) -> Generator[str, None, None]:
        """Stream the model's turn; whatever was said when the stream ends or is closed is kept."""
        said: list[str] = []
        seed = None if self.seed is None else self.seed + len(self.turns)
        stream = self.edge.chat([*self.system, *self.turns], self.max_new_tokens, seed=seed,
                                **self.sampling)
        try:
            for piece in stream:
                said.append(piece)
                yield piece
        finally:
            stream.close()
            self.turns = [*self.turns, {"role": "assistant", "content": "".join(said)}]


def chat(file: str | Path, system: str | None = None, temperature: float = 0.8,
         top_k: int | None = 50, top_p: float | None = None, max_new_tokens: int = 256,
         seed: int | None = None, device: str = "auto") -> None:
    """Load a .gguf file and talk until end of input. Raises ValueError, one line, as loading does.
    """
    if device not in ("auto", "cpu"):
        raise ValueError(f"device {device!r}: llama.cpp chooses its own here; leave --device out")
    notes, out = console(), Console(highlight=False)
    edge = Edge(file)
    fits = max(1, edge.context // 2)
    if max_new_tokens > fits:
        notes.print(Text(f"Answers are at most {fits} tokens long: half of what the model reads.",
                         style="dim"))
    if edge.template.startswith(END_OF_TEXT):  # as fira export gguf marks such a model
        notes.print(Text(BASE, style="yellow"), soft_wrap=True)
    conversation: Any = EdgeConversation(edge, system, min(max_new_tokens, fits), seed,
                                         temperature=temperature, top_k=top_k, top_p=top_p)
    talk(conversation, out, notes)


def _request(max_new_tokens: int, temperature: float = 0.8, top_k: int | None = None,
             top_p: float | None = None, seed: int | None = None) -> dict[str, Any]:
    """Our sampling in llama.cpp's words; what we do not have is switched off."""
    return {"max_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k or 0,
            "top_p": 1.0 if top_p is None else top_p, "min_p": 0.0, "repeat_penalty": 1.0,
            "seed": -1 if seed is None else seed % 2**32}


def _check_file(file: Path) -> None:
    try:
        with open(file, "rb") as opened:
            magic = opened.read(4)
    except FileNotFoundError:
        raise ValueError(f"{file} does not exist; write it with fira export gguf RUN {file}"
                         ) from None
    if magic != GGUF_MAGIC:
        raise ValueError(f"{file} is not a GGUF file; write one with fira export gguf")
