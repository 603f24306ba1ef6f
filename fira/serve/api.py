"""The operations of the API. Each turns a checked request into a response, or into prompt ids and
sampling parameters for the engine. No input or output.

OPERATIONS lists all of them; the routes and openapi.py's description are made from it. Operations
raise APIError for a request that cannot be fulfilled as it is; nothing is adjusted.
"""
from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from pydantic import BaseModel

from fira.data.chat import knows_tools, prompt_ids
from fira.data.tokenizer import CALL, CALL_END, PAD, TURN_END, Tokenizer
from fira.infer.constraint import Grammars
from fira.infer.request import SamplingParams
from fira.serve import items, schema
from fira.serve.schema import MAX_CHOICES, APIError, ChatRequest, CompletionRequest
from fira.serve.structure import choose_tools, constrain

COMPLETION_TOKENS = 16  # OpenAI's default for a completion; a chat's default is what fits
SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty",
                   "presence_penalty", "frequency_penalty", "seed")
SHARES = {"minimal": 1 / 8, "low": 1 / 4, "medium": 1 / 2, "high": 3 / 4}  # of the tokens: thought
NO_TOP_K = (("top_k", 0), ("top_k", -1))


@dataclass
class ServedModel:
    """The facts about the served model against which requests are checked."""

    name: str
    tokenizer: Tokenizer
    window: int  # tokens that the model can read: the prompt and the generated ones together
    vocab_size: int  # rows of the language-model head
    chat_tuned: bool  # whether the model was trained on chat turns
    created: int = 0  # seconds since 1970
    architecture: dict[str, str | int] | None = None  # shown in /v1/models
    width: int = 0  # of the last hidden states, which become embeddings
    thinks: bool = False  # whether its answers begin with thoughts, unless asked for none

    def __post_init__(self) -> None:
        self.grammars = Grammars(self.tokenizer, self.vocab_size)
        names = self.tokenizer.token_bytes()
        for token in self.tokenizer.description["added_tokens"]:
            names[token["id"]] = token["content"].encode()
        # by token id; a special token has its name, a row that only pads the vocabulary has nothing
        self.token_bytes = names + [b""] * (self.vocab_size - len(names))
        self.longest_token = max(map(len, self.token_bytes))

    def name_of(self, id: int) -> str:
        """A token as a string; one that is not valid UTF-8 is written as OpenAI does, in bytes."""
        data = self.token_bytes[id]
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


@dataclass(frozen=True)
class Generation:
    """What the engine is to generate for one request, and what the response needs to know."""

    request: Any  # a GenerationRequest, or an EmbeddingRequest, which generates nothing
    choices: list[tuple[list[int], SamplingParams]]  # prompt ids and parameters, by choice index
    echoes: list[str]  # for each choice, the prompt text to repeat before the generated text
    hidden_tokens: int = 0  # leading prompt ids that are not part of the caller's text
    calls: bool = False  # whether the generated text may call tools
    asked: items.ItemRequest | None = None  # the request, if it came in the form of items

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts; the choices of one prompt count it once."""
        return sum(len(ids) for ids, _ in self.choices[::self.request.n or 1])


def chat(request: ChatRequest, model: ServedModel) -> Generation:
    if request.top_logprobs and not request.logprobs:
        raise APIError(400, "top_logprobs needs logprobs to be true", "top_logprobs")
    limit, other = request.max_completion_tokens, request.max_tokens
    if limit is not None and other is not None and limit != other:
        raise APIError(400, f"max_tokens={other} and max_completion_tokens={limit} differ; "
                       "give one of them", "max_tokens")
    tools = choose_tools(request)
    if tools:
        _check_tools(model, "tools")
    ids = _chat_ids(request, model, tools)
    room = _room(ids, model, "messages", least=1)
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    limit = limit if limit is not None else other
    params = _params(request, model, room, room if limit is None else limit, logprobs, tools)
    if model.chat_tuned:
        params = replace(params, stop_ids=(model.tokenizer.special(TURN_END),))
    if _thinks(request, model) and not request.continue_final_message:
        share, longest = SHARES.get(request.reasoning_effort or "", 1.0), params.max_new_tokens
        thought = request.max_thinking_tokens or int(share * longest)
        if thought > longest:
            raise APIError(400, f"max_thinking_tokens={thought} is more than max_tokens={longest}, "
                           "which counts the answer too; lower it", "max_thinking_tokens")
        params = replace(params, max_thinking_tokens=thought)
    if tools:
        params = replace(params, named={model.tokenizer.special(name): name.encode()
                                        for name in (CALL, CALL_END)})
    choices = _choices(request, ids, params)
    return Generation(request, choices, [""] * len(choices), calls=bool(tools))


def respond(request: items.ItemRequest, model: ServedModel) -> Generation:
    try:
        return replace(chat(items.to_chat(request), model), asked=request)
    except APIError as error:  # the names of chat's fields become those of this request
        names = {"messages": "input", "max_tokens": "max_output_tokens",
                 "response_format": "text.format", "reasoning_effort": "reasoning.effort"}
        param = names.get(error.param or "", error.param)
        message = error.message.replace("max_tokens", "max_output_tokens")
        raise APIError(error.status, message, param, error.code) from None


def complete(request: CompletionRequest, model: ServedModel) -> Generation:
    if request.stream and request.echo and request.logprobs is not None:
        raise APIError(400, "echo with logprobs cannot stream: a prompt's log-probabilities come "
                       "at the end; leave out stream", "stream")
    if request.best_of not in (None, request.n or 1):
        raise APIError(400, f"best_of={request.best_of} is not n={request.n or 1}, and the server "
                       "does not rank choices; leave best_of out", "best_of")
    prompts = _prompts(request, model)
    choices, echoes = [], []
    for prompt in prompts:
        # a text prompt follows an end of text, as every document did in training
        ids = _text_ids(prompt, model) if isinstance(prompt, str) else list(prompt)
        room = _room(ids, model, "prompt")
        limit = min(room, COMPLETION_TOKENS) if request.max_tokens is None else request.max_tokens
        params = _params(request, model, room, limit, request.logprobs)
        if request.echo:
            params = replace(params, prompt_logprobs=request.logprobs)
        text = prompt if isinstance(prompt, str) else model.tokenizer.decode(prompt)
        added = _choices(request, ids, params)
        choices += added
        echoes += [text if request.echo else ""] * len(added)
    return Generation(request, choices, echoes, int(isinstance(prompts[0], str)))


def embed(request: schema.EmbeddingRequest, model: ServedModel) -> Generation:
    if request.dimensions not in (None, model.width):
        raise APIError(400, f"dimensions={request.dimensions} is not the model's width of "
                       f"{model.width}; leave it out", "dimensions")
    choices = []
    for text in _several(request.input):
        start = int(isinstance(text, str))  # the end of text before a text is not part of it
        ids = _text_ids(text, model, "input") if start else text
        _check_ids(ids, model.vocab_size, "input")
        _room(ids, model, "input")
        choices.append((ids, SamplingParams(max_new_tokens=0, embed_from=start)))
    return Generation(request, choices, [])


def tokenize(request: schema.TokenizeRequest, model: ServedModel) -> schema.Tokens:
    if (request.prompt is None) == (request.messages is None):
        raise APIError(400, "give either prompt or messages", "prompt")
    named = model.tokenizer.added.get(request.prompt or "")
    if named is not None:  # lm-eval asks for the ids of the special tokens by their names
        ids = [named]
    elif request.messages is not None:
        ids = _chat_ids(request, model)
    else:
        ids = _text_ids(request.prompt or "", model)
        ids = ids[1:] if request.add_special_tokens is False else ids
    return {"tokens": ids, "count": len(ids), "max_model_len": model.window}


def detokenize(request: schema.DetokenizeRequest, model: ServedModel) -> schema.Detokenized:
    _check_ids(request.tokens, model.tokenizer.vocab_size, "tokens")
    return {"prompt": model.tokenizer.decode(request.tokens)}


def describe_model(model: ServedModel) -> schema.Model:
    entry: schema.Model = {"id": model.name, "object": "model", "created": model.created,
                           "owned_by": "fira", "max_model_len": model.window,
                           "chat_tuned": model.chat_tuned, "thinks": model.thinks}
    return {**entry, "fira": model.architecture} if model.architecture else entry


def list_models(model: ServedModel) -> schema.Models:
    return {"object": "list", "data": [describe_model(model)]}


def describe_tokenizer(model: ServedModel) -> dict[str, str | int | None]:
    """What lm-eval's remote tokenizer reads; a chat template, rendered to text, would be plain."""
    return {"bos_token": None, "eos_token": model.name_of(model.tokenizer.end_of_text),
            "pad_token": PAD if PAD in model.tokenizer.added else None,
            "model_max_length": model.window}


def report_health(model: ServedModel) -> schema.Health:
    return {"status": "ok"}


def check_model(name: str | None, model: ServedModel) -> None:
    if name is not None and name != model.name:
        raise APIError(404, f"there is no model {name[:60]!r} here; use {model.name!r}", "model",
                       "model_not_found")


def _prompts(request: CompletionRequest, model: ServedModel) -> list[str] | list[list[int]]:
    prompts = _several(request.prompt)
    if len(prompts) * (request.n or 1) > MAX_CHOICES:
        raise APIError(400, f"{len(prompts)} prompts with n={request.n} are more than "
                       f"{MAX_CHOICES} choices; send several requests", "n")
    for ids in prompts:
        if not isinstance(ids, str):
            _check_ids(ids, model.vocab_size, "prompt")
    return prompts


def _several(given: Any) -> Any:
    """A list of texts, or of lists of token ids, where one may have been given alone."""
    return [given] if isinstance(given, str) or isinstance(given[0], int) else given


def _text_ids(text: str, model: ServedModel, param: str = "prompt") -> list[int]:
    _check_size(text, model, param)
    return [model.tokenizer.end_of_text, *model.tokenizer.encode(text)]


def _thinks(request: schema.Reply, model: ServedModel) -> bool:
    """Whether the answer begins with a thought. Raises APIError if that cannot be."""
    effort, most = request.reasoning_effort, request.max_thinking_tokens
    asked = {"chat_template_kwargs": (request.chat_template_kwargs or {}).get("enable_thinking"),
             "reasoning_effort": effort and effort != "none",
             "max_thinking_tokens": None if most is None else most > 0}
    said = {name: bool(thinks) for name, thinks in asked.items() if thinks is not None}
    if len({*said.values()}) > 1:
        raise APIError(400, f"{' and '.join(said)} differ on whether to think; leave one of them "
                       "out", [*said][0])
    if any(said.values()) and not model.thinks:
        raise APIError(400, f"{[*said][0]} asks for a thought, but this model was not tuned to "
                       "think; leave it out", [*said][0])
    return model.thinks and all(said.values())


def _chat_ids(request: Any, model: ServedModel, tools: Sequence[schema.Tool] = ()) -> list[int]:
    """Messages as chat turns, or as plain text for a model that was not tuned for chat."""
    messages, continue_final = request.messages, request.continue_final_message
    direct = model.thinks and not _thinks(request, model)
    if continue_final and messages[-1].role != "assistant":
        raise APIError(400, "continue_final_message needs a last message of role assistant, not "
                       f"{messages[-1].role}; add the text to continue", "continue_final_message")
    turns: list[dict[str, Any]] = []
    for number, message in enumerate(messages):
        content, calls = message.content or "", message.tool_calls or []
        if message.content is None and not calls:
            raise APIError(400, f"messages.{number}.content is missing; give it",
                           f"messages.{number}.content", "missing_field")
        if message.role == "tool" or calls:
            _check_tools(model, f"messages.{number}")
        text = content if isinstance(content, str) else "\n".join(part.text for part in content)
        role = "system" if message.role == "developer" else message.role
        thought = (message.reasoning_content or message.reasoning) if model.thinks else None
        turns.append({"role": role, "content": text, "reasoning_content": thought or None,
                      "tool_calls": [call.function.model_dump() for call in calls]})
    described = [tool.model_dump(exclude_none=True) for tool in tools]
    _check_size(json.dumps([turns, described], ensure_ascii=False), model, "messages")
    return prompt_ids(model.tokenizer, turns, model.chat_tuned, described,
                      bool(continue_final), direct)


def _check_tools(model: ServedModel, param: str) -> None:
    if not (model.chat_tuned and knows_tools(model.tokenizer)):
        raise APIError(400, "this model's chat template has no form for tools and their calls; "
                       f"leave out {param}", param)


def _check_size(text: str, model: ServedModel, param: str) -> None:
    """Refuse a text that exceeds the window whatever its tokens are, before tokenizing it."""
    if len(text) > model.window * model.longest_token:
        raise APIError(400, f"the prompt of {len(text)} characters is longer than the model's "
                       f"window of {model.window} tokens; shorten it", param,
                       "context_length_exceeded")


def _room(ids: Sequence[int], model: ServedModel, param: str, least: int = 0) -> int:
    """The number of tokens that fit into the window after the prompt; at least `least`."""
    room = model.window - len(ids)
    if room < least:
        raise APIError(400, f"the prompt of {len(ids)} tokens leaves no room in the model's window "
                       f"of {model.window}; shorten it", param, "context_length_exceeded")
    return room


def _params(request: schema.GenerationRequest, model: ServedModel, room: int, limit: int,
            logprobs: int | None, tools: Sequence[schema.Tool] = ()) -> SamplingParams:
    if limit > room:
        raise APIError(400, f"max_tokens={limit} and a prompt of {model.window - room} tokens "
                       f"are more than the model's window of {model.window}; ask for at most "
                       f"{room} or shorten the prompt", "max_tokens", "context_length_exceeded")
    given = {name: value for name in SAMPLING_FIELDS
             if (value := getattr(request, name)) is not None and (name, value) not in NO_TOP_K}
    stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    bias = {int(id): value for id, value in (request.logit_bias or {}).items()}
    _check_ids(list(bias), model.vocab_size, "logit_bias")
    constraint = constrain(request, model.grammars, tools)
    return SamplingParams(max_new_tokens=limit, stop=stop, logprobs=logprobs, logit_bias=bias,
                          ignore_end=bool(request.ignore_eos), experts=bool(request.experts),
                          constraint=constraint, **given)


def _choices(request: schema.GenerationRequest, ids: list[int],
             params: SamplingParams) -> list[tuple[list[int], SamplingParams]]:
    """The choices of one prompt. Each has its own seed, so that they differ and can be repeated."""
    return [(ids, params if params.seed is None else replace(params, seed=params.seed + number))
            for number in range(request.n or 1)]


def _check_ids(ids: Sequence[int], size: int, param: str) -> None:
    largest = max(ids, default=0)
    if largest >= size:
        raise APIError(400, f"token id {largest} is outside the vocabulary of {size}; "
                       "/tokenize gives valid ids", param, "invalid_value")


class Operation(NamedTuple):
    summary: str
    function: Callable[..., Any]  # of the request, if there is one, and the model
    response: Any
    request: type[BaseModel] | None = None  # a POST has one, a GET has none


OPERATIONS = {
    "/v1/chat/completions": Operation("Reply to a chat", chat, schema.ChatCompletion, ChatRequest),
    "/v1/responses": Operation("Reply to items", respond, items.ItemResponse, items.ItemRequest),
    "/v1/completions": Operation("Continue a text", complete, schema.TextCompletion,
                                 CompletionRequest),
    "/v1/embeddings": Operation("Turn texts into vectors", embed, schema.Embeddings,
                                schema.EmbeddingRequest),
    "/tokenize": Operation("Convert text to token ids", tokenize, schema.Tokens,
                           schema.TokenizeRequest),
    "/detokenize": Operation("Convert token ids to text", detokenize, schema.Detokenized,
                             schema.DetokenizeRequest),
    "/v1/models": Operation("List the served model", list_models, schema.Models),
    "/v1/models/{model:path}": Operation("Describe one model", describe_model, schema.Model),
    "/health": Operation("Whether the model is loaded", report_health, schema.Health),
}
