"""Each API request becomes prompt ids and sampling parameters for the engine. No input or output.

Functions raise APIError for a request that cannot be fulfilled as it is; nothing is adjusted.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fira.data.chat import prompt_ids
from fira.data.tokenizer import TURN_END, Tokenizer
from fira.infer.request import SamplingParams
from fira.serve.schema import (
    MAX_CHOICES,
    SEED_LIMIT,
    APIError,
    Architecture,
    ChatRequest,
    CompletionRequest,
    Detokenized,
    DetokenizeRequest,
    GenerationRequest,
    Message,
    Model,
    Models,
    TokenizeRequest,
    Tokens,
)

COMPLETION_TOKENS = 16  # OpenAI's default for a completion; a chat's default is what fits
SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty",
                   "presence_penalty", "frequency_penalty", "seed")


@dataclass
class ServedModel:
    """The facts about the served model against which requests are checked."""

    name: str
    tokenizer: Tokenizer
    window: int  # tokens that the model can read: the prompt and the generated ones together
    vocab_size: int  # rows of the language-model head
    chat_tuned: bool  # whether the model was trained on chat turns
    created: int = 0  # seconds since 1970
    architecture: Architecture | None = None  # shown in /v1/models

    def __post_init__(self) -> None:
        added = self.tokenizer.description["added_tokens"]
        self.token_bytes = self.tokenizer.token_bytes()
        self.special_tokens: dict[int, str] = {token["id"]: token["content"] for token in added}
        self.longest_token = max(map(len, self.token_bytes))  # bytes

    def bytes_of(self, id: int) -> bytes:
        """The bytes of a token; for a special token, its name."""
        if id in self.special_tokens:
            return self.special_tokens[id].encode()
        return self.token_bytes[id] if id < len(self.token_bytes) else b""

    def name_of(self, id: int) -> str:
        """A token as a string; one that is not valid UTF-8 is written as OpenAI does, in bytes."""
        data = self.bytes_of(id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def describe(self) -> Model:
        entry: Model = {"id": self.name, "object": "model", "created": self.created,
                        "owned_by": "fira", "max_model_len": self.window,
                        "chat_tuned": self.chat_tuned}
        return {**entry, "fira": self.architecture} if self.architecture else entry


@dataclass(frozen=True)
class Generation:
    """What the engine is to generate for one request, and what the response needs to know."""

    request: GenerationRequest
    choices: list[tuple[list[int], SamplingParams]]  # prompt ids and parameters, by choice index
    echoes: list[str]  # for each choice, the prompt text to repeat before the generated text
    hidden_tokens: int  # leading prompt ids that are not part of the caller's text
    prompt_tokens: int

    @property
    def is_chat(self) -> bool:
        return isinstance(self.request, ChatRequest)

    @property
    def logprobs(self) -> bool:
        """Whether the response has them. 0 asks for those of the generated tokens alone."""
        return self.choices[0][1].logprobs is not None


def chat(request: ChatRequest, model: ServedModel) -> Generation:
    if request.top_logprobs is not None and not request.logprobs:
        raise APIError(400, "top_logprobs needs logprobs to be true", "top_logprobs")
    limit, other = request.max_completion_tokens, request.max_tokens
    if limit is not None and other is not None and limit != other:
        raise APIError(400, f"max_tokens={other} and max_completion_tokens={limit} differ; "
                       "give one of them", "max_tokens")
    ids = _chat_ids(request.messages, model)
    room = _room(ids, model, "messages")
    if room == 0:
        raise _too_long(f"{len(ids)} tokens, with one generated token,", model, "messages")
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    limit = limit if limit is not None else other
    params = _params(request, model, room, room if limit is None else limit, logprobs)
    if model.chat_tuned:
        params = replace(params, stop_ids=(model.tokenizer.special(TURN_END),))
    return _generation(request, [(ids, params)], [""], 0)


def complete(request: CompletionRequest, model: ServedModel) -> Generation:
    if request.stream and request.echo and request.logprobs is not None:
        raise APIError(400, "echo with logprobs cannot stream: a prompt's log-probabilities come "
                       "at the end; leave out stream", "stream")
    prompts = _prompts(request, model)
    work, echoes = [], []
    for prompt in prompts:
        ids = _text_ids(prompt, model) if isinstance(prompt, str) else list(prompt)
        room = _room(ids, model, "prompt")
        limit = request.max_tokens
        params = _params(request, model, room,
                         min(room, COMPLETION_TOKENS) if limit is None else limit,
                         request.logprobs)
        if request.echo and request.logprobs is not None:
            params = replace(params, prompt_logprobs=request.logprobs)
        work.append((ids, params))
        text = prompt if isinstance(prompt, str) else model.tokenizer.decode(prompt)
        echoes.append(text if request.echo else "")
    hidden = 1 if isinstance(prompts[0], str) else 0  # the end of text before a text prompt
    return _generation(request, work, echoes, hidden)


def tokenize(request: TokenizeRequest, model: ServedModel) -> Tokens:
    if (request.prompt is None) == (request.messages is None):
        raise APIError(400, "give either prompt or messages", "prompt")
    if request.messages is not None:
        ids = _chat_ids(request.messages, model)
    else:
        ids = _encode(request.prompt or "", model)
        if request.add_special_tokens is not False:
            ids = [model.tokenizer.end_of_text, *ids]
    return {"tokens": ids, "count": len(ids), "max_model_len": model.window}


def detokenize(request: DetokenizeRequest, model: ServedModel) -> Detokenized:
    _check_ids(request.tokens, model.tokenizer.vocab_size, "tokens")
    return {"prompt": model.tokenizer.decode(request.tokens)}


def list_models(model: ServedModel) -> Models:
    return {"object": "list", "data": [model.describe()]}


def check_model(name: str | None, model: ServedModel) -> None:
    if name is not None and name != model.name:
        raise APIError(404, f"there is no model {name[:60]!r} here; use {model.name!r}", "model",
                       "model_not_found")


def _prompts(request: CompletionRequest, model: ServedModel) -> list[str] | list[list[int]]:
    prompt = request.prompt
    prompts: Any = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    if len(prompts) * (request.n or 1) > MAX_CHOICES:
        raise APIError(400, f"{len(prompts)} prompts with n={request.n} are more than "
                       f"{MAX_CHOICES} answers; send several requests", "n")
    for ids in prompts:
        if not isinstance(ids, str):
            _check_ids(ids, model.vocab_size, "prompt")
    return prompts


def _text_ids(text: str, model: ServedModel) -> list[int]:
    """A text prompt follows an end of text, as every document did in training."""
    _check_size([text], model, "prompt")
    return [model.tokenizer.end_of_text, *_encode(text, model)]


def _chat_ids(messages: Sequence[Message], model: ServedModel) -> list[int]:
    """Messages as chat turns, or as plain text for a model that was not tuned for chat."""
    turns = [{"role": "system" if message.role == "developer" else message.role,
              "content": _text(message)} for message in messages]
    _check_size([turn["content"] for turn in turns], model, "messages")
    try:
        return prompt_ids(model.tokenizer, turns, model.chat_tuned)
    except ValueError as error:
        raise APIError(400, str(error), "messages") from None


def _params(request: GenerationRequest, model: ServedModel, room: int, limit: int,
            logprobs: int | None) -> SamplingParams:
    if limit > room:
        raise APIError(400, f"max_tokens={limit} and a prompt of {model.window - room} tokens "
                       f"are more than the model's window of {model.window}; ask for at most "
                       f"{room} or shorten the prompt", "max_tokens", "context_length_exceeded")
    if request.stream_options and not request.stream:
        raise APIError(400, "stream_options needs stream to be true", "stream_options")
    given = {name: value for name in SAMPLING_FIELDS
             if (value := getattr(request, name)) is not None}
    stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    try:
        return SamplingParams(max_new_tokens=limit, stop=stop, logprobs=logprobs,
                              logit_bias=_logit_bias(request, model),
                              ignore_end=bool(request.ignore_eos), experts=bool(request.experts),
                              **given)
    except ValueError as error:
        raise APIError(400, str(error), str(error).partition("=")[0]) from None


def _logit_bias(request: GenerationRequest, model: ServedModel) -> dict[int, float]:
    bias = {}
    for key, value in (request.logit_bias or {}).items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise APIError(400, f"logit_bias has the key {key[:30]!r}; keys are token ids, as "
                           "/tokenize gives them", "logit_bias")
        bias[int(key)] = value
    _check_ids(list(bias), model.vocab_size, "logit_bias")
    return bias


def _generation(request: GenerationRequest, prompts: list[tuple[list[int], SamplingParams]],
                echoes: list[str], hidden_tokens: int) -> Generation:
    n, choices = request.n or 1, []
    for ids, params in prompts:
        for number in range(n):  # each choice has its own seed, so that they differ and repeat
            seed = params.seed
            if seed is not None:
                seed = (seed + number + SEED_LIMIT) % (2 * SEED_LIMIT) - SEED_LIMIT
            choices.append((ids, replace(params, seed=seed)))
    return Generation(request, choices, [echo for echo in echoes for _ in range(n)],
                      hidden_tokens, sum(len(ids) for ids, _ in prompts))


def _room(ids: Sequence[int], model: ServedModel, param: str) -> int:
    """The number of tokens that fit into the window after the prompt."""
    room = model.window - len(ids)
    if room < 0 or not ids:
        raise _too_long(f"{len(ids)} tokens", model, param)
    return room


def _check_size(texts: Sequence[str], model: ServedModel, param: str) -> None:
    """Refuse texts that exceed the window whatever their tokens are, before tokenizing them."""
    size = sum(len(text) for text in texts)
    if size > model.window * model.longest_token:
        at_least = math.ceil(size / model.longest_token)
        raise _too_long(f"{size} characters, over {at_least} tokens,", model, param)


def _too_long(prompt: str, model: ServedModel, param: str) -> APIError:
    return APIError(400, f"the prompt of {prompt} is longer than the model's window of "
                    f"{model.window}; shorten it", param, "context_length_exceeded")


def _check_ids(ids: Sequence[int], size: int, param: str) -> None:
    largest = max(ids, default=0)
    if largest >= size:
        raise APIError(400, f"token id {largest} is outside the vocabulary of {size}; use "
                       "/tokenize", param, "invalid_value")


def _encode(text: str, model: ServedModel) -> list[int]:
    try:
        return model.tokenizer.encode(text)
    except ValueError as error:  # half of a surrogate pair
        raise APIError(400, str(error), "prompt", "invalid_value") from None


def _text(message: Message) -> str:
    """The text of a message; several parts are joined by newlines."""
    content = message.content
    return content if isinstance(content, str) else "\n".join(part.text for part in content)
