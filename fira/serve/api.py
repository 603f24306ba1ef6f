"""Requests become work for the engine: prompt ids and sampling parameters. No input or output."""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from fira.data.chat import prompt_ids
from fira.data.tokenizer import TURN_END, Tokenizer
from fira.infer.request import SamplingParams
from fira.serve.schema import (
    MAX_CHOICES,
    SEED,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Message,
    Refused,
    Sampling,
    TokenizeRequest,
)

COMPLETION_TOKENS = 16  # OpenAI's default for a completion; a chat's default is what fits


@dataclass(frozen=True)
class Served:
    """What requests are read against: the model's name, words and limits."""

    name: str
    tokenizer: Tokenizer
    window: int  # tokens the model reads at once, prompt and answer together
    vocab_size: int  # rows of its head
    tuned: bool  # whether it has seen chat turns
    created: int = 0  # seconds since 1970
    facts: dict[str, Any] = field(default_factory=dict)  # shown in /v1/models
    texts: list[bytes] = field(init=False, repr=False)  # the bytes of each token
    names: dict[int, str] = field(init=False, repr=False)  # of special tokens
    longest: int = field(init=False)  # bytes a token can have

    def __post_init__(self) -> None:
        texts = self.tokenizer.token_bytes()
        added = self.tokenizer.description["added_tokens"]
        object.__setattr__(self, "texts", texts)
        object.__setattr__(self, "names", {token["id"]: token["content"] for token in added})
        object.__setattr__(self, "longest", max(map(len, texts)))

    def bytes_of(self, id: int) -> bytes:
        """What a token stands for; a special token's name."""
        return self.names[id].encode() if id in self.names else (
            self.texts[id] if id < len(self.texts) else b"")

    def name_of(self, id: int) -> str:
        """A token as a string; one that is no whole text is written as OpenAI does, in bytes."""
        data = self.bytes_of(id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


@dataclass(frozen=True)
class Job:
    """One request, read: its answers in order of their index."""

    kind: Literal["chat", "text"]
    choices: list[tuple[list[int], SamplingParams]]
    echoes: list[str]  # per choice, the prompt to repeat before the answer
    begun: int  # leading prompt ids that are not in the caller's text
    prompt_tokens: int
    stream: bool
    include_usage: bool
    logprobs: bool
    experts: bool


def chat_job(request: ChatRequest, served: Served) -> Job:
    """Raises Refused for what cannot be honoured."""
    check_model(request.model, served)
    if request.top_logprobs is not None and not request.logprobs:
        raise Refused(400, "top_logprobs needs logprobs to be true", "top_logprobs")
    limit, other = request.max_completion_tokens, request.max_tokens
    if None not in (limit, other) and limit != other:
        raise Refused(400, f"max_tokens={other} and max_completion_tokens={limit} differ; "
                      "give one of them", "max_tokens")
    ids = chat_ids(request.messages, served)
    room = _room(ids, served, "messages")
    if room == 0:
        raise _too_long(f"{len(ids)} tokens, with one for an answer,", served, "messages")
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    limit = limit if limit is not None else other
    params = _params(request, served, room, room if limit is None else limit, logprobs)
    if served.tuned:
        params = replace(params, stop_ids=(served.tokenizer.special(TURN_END),))
    return _job("chat", request, [(ids, params)], [""], 0)


def completion_job(request: CompletionRequest, served: Served) -> Job:
    """Raises Refused for what cannot be honoured."""
    check_model(request.model, served)
    if request.stream and request.echo and request.logprobs is not None:
        raise Refused(400, "echo with logprobs cannot stream: a prompt's log-probabilities come "
                      "at the end; leave out stream", "stream")
    prompts = _prompts(request, served)
    begun = 1 if isinstance(prompts[0], str) else 0
    work, echoes = [], []
    for prompt in prompts:
        ids = text_ids(prompt, served) if isinstance(prompt, str) else list(prompt)
        room = _room(ids, served, "prompt")
        wanted = request.max_tokens
        params = _params(request, served, room,
                         min(room, COMPLETION_TOKENS) if wanted is None else wanted,
                         request.logprobs)
        if request.echo and request.logprobs is not None:
            params = replace(params, prompt_logprobs=request.logprobs)
        work.append((ids, params))
        text = prompt if isinstance(prompt, str) else served.tokenizer.decode(prompt)
        echoes.append(text if request.echo else "")
    return _job("text", request, work, echoes, begun)


def text_ids(text: str, served: Served) -> list[int]:
    """A text prompt as the model reads it: after an end of text, as in training."""
    _check_size([text], served, "prompt")
    return [served.tokenizer.end_of_text, *_encode(text, served, "prompt")]


def chat_ids(messages: Sequence[Message], served: Served) -> list[int]:
    """Messages as the model reads them. An untuned model continues their text."""
    turns = [{"role": "system" if message.role == "developer" else message.role,
              "content": _text(message)} for message in messages]
    _check_size([turn["content"] for turn in turns], served, "messages")
    try:
        return prompt_ids(served.tokenizer, turns, served.tuned)
    except ValueError as error:
        raise Refused(400, str(error), "messages") from None


def tokenize(request: TokenizeRequest, served: Served) -> dict[str, Any]:
    check_model(request.model, served)
    if (request.prompt is None) == (request.messages is None):
        raise Refused(400, "give either prompt or messages", "prompt")
    if request.messages is not None:
        ids = chat_ids(request.messages, served)
    else:
        ids = _encode(request.prompt or "", served, "prompt")
        if request.add_special_tokens is not False:
            ids = [served.tokenizer.end_of_text, *ids]
    return {"tokens": ids, "count": len(ids), "max_model_len": served.window}


def detokenize(request: DetokenizeRequest, served: Served) -> dict[str, Any]:
    check_model(request.model, served)
    _check_ids(request.tokens, served.tokenizer.vocab_size, "tokens")
    return {"prompt": served.tokenizer.decode(request.tokens)}


def model_entry(served: Served) -> dict[str, Any]:
    return {"id": served.name, "object": "model", "created": served.created, "owned_by": "fira",
            "max_model_len": served.window, "chat_tuned": served.tuned, **served.facts}


def check_model(name: str | None, served: Served) -> None:
    if name is not None and name != served.name:
        raise Refused(404, f"there is no model {name[:60]!r} here; use {served.name!r}", "model",
                      "model_not_found")


def _prompts(request: CompletionRequest, served: Served) -> list[str] | list[list[int]]:
    prompt = request.prompt
    prompts: Any = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    if len(prompts) * (request.n or 1) > MAX_CHOICES:
        raise Refused(400, f"{len(prompts)} prompts with n={request.n} are more than {MAX_CHOICES} "
                      "answers; send several requests", "n")
    for ids in prompts:
        if not isinstance(ids, str):
            _check_ids(ids, served.vocab_size, "prompt")
    return prompts


def _params(request: Sampling, served: Served, room: int, limit: int,
            logprobs: int | None) -> SamplingParams:
    if limit > room:
        raise Refused(400, f"max_tokens={limit} beside a prompt of {served.window - room} tokens "
                      f"is more than the model's window of {served.window}; ask for at most {room} "
                      "or shorten the prompt", "max_tokens", "context_length_exceeded")
    if request.stream_options and not request.stream:
        raise Refused(400, "stream_options needs stream to be true", "stream_options")
    given = {name: value for name in ("temperature", "top_p", "top_k", "min_p",
                                      "repetition_penalty", "presence_penalty",
                                      "frequency_penalty", "seed")
             if (value := getattr(request, name)) is not None}
    stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    try:
        return SamplingParams(max_new_tokens=limit, stop=stop, logprobs=logprobs,
                              logit_bias=_bias(request, served),
                              ignore_end=bool(request.ignore_eos), experts=bool(request.experts),
                              **given)
    except ValueError as error:
        raise Refused(400, str(error), str(error).partition("=")[0]) from None


def _bias(request: Sampling, served: Served) -> dict[int, float]:
    bias = {}
    for key, value in (request.logit_bias or {}).items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise Refused(400, f"logit_bias has the key {key[:30]!r}; keys are token ids, as "
                          "/tokenize gives them", "logit_bias")
        bias[int(key)] = value
    _check_ids(list(bias), served.vocab_size, "logit_bias")
    return bias


def _job(kind: Literal["chat", "text"], request: Sampling,
         work: list[tuple[list[int], SamplingParams]], echoes: list[str], begun: int) -> Job:
    n, choices = request.n or 1, []
    for ids, params in work:
        for number in range(n):  # answers with a seed differ from each other, and repeat
            seed = params.seed
            if seed is not None:
                seed = (seed + number + SEED) % (2 * SEED) - SEED
            choices.append((ids, replace(params, seed=seed)))
    options = request.stream_options
    return Job(kind, choices, [echo for echo in echoes for _ in range(n)], begun,
               sum(len(ids) for ids, _ in work), bool(request.stream),
               bool(options and options.include_usage), work[0][1].logprobs is not None,
               bool(request.experts))


def _room(ids: Sequence[int], served: Served, param: str) -> int:
    """Tokens that fit behind a prompt."""
    room = served.window - len(ids)
    if room < 0 or not ids:
        raise _too_long(f"{len(ids)} tokens", served, param)
    return room


def _check_size(texts: Sequence[str], served: Served, param: str) -> None:
    """Refuse what cannot fit whatever its tokens are, before the work of finding them."""
    size = sum(len(text) for text in texts)
    if size > served.window * served.longest:
        raise _too_long(f"{size} characters, over {math.ceil(size / served.longest)} tokens,",
                        served, param)


def _too_long(what: str, served: Served, param: str) -> Refused:
    return Refused(400, f"the prompt of {what} is longer than the model's window of "
                   f"{served.window}; shorten it", param, "context_length_exceeded")


def _check_ids(ids: Sequence[int], size: int, param: str) -> None:
    worst = max(ids, default=0)
    if worst >= size:
        raise Refused(400, f"token id {worst} is outside the vocabulary of {size}; use /tokenize",
                      param, "invalid_value")


def _encode(text: str, served: Served, param: str) -> list[int]:
    try:
        return served.tokenizer.encode(text)
    except ValueError as error:  # half a surrogate pair
        raise Refused(400, str(error), param, "invalid_value") from None


def _text(message: Message) -> str:
    """Text parts stand on lines of their own."""
    content = message.content
    return content if isinstance(content, str) else "\n".join(part.text for part in content)
