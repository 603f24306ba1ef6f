"""One request to the engine: its parameters, how its tokens are chosen, and its events.

The engine calls a request's listener with one `Token` per generated token, including the one that
ends the text, and then exactly once with an `End`. Text is released as soon as its characters are
complete and no stop string can begin in it. So a token's text may be empty; the texts of all
tokens and of the end, joined, are the whole text.

The draw itself is `fira.model.generate.sample`. Penalties and biases, which depend on the request's
own tokens, the constraint and log-probabilities are added here. Nothing depends on other requests.
"""
from __future__ import annotations

import codecs
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fira.infer.constraint import Constraint
from fira.infer.thought import Thought
from fira.model.generate import check_sampling, sample

Reason = Literal["stop", "length", "cancelled", "error", "grammar"]
SCORED_ROWS = 64  # prompt tokens whose logits over the whole vocabulary are in memory together


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens. Raises ValueError, one line, on a value out of range."""

    max_new_tokens: int = 128
    temperature: float = 1.0  # 0 is greedy
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0  # drops tokens below this fraction of the likeliest token's probability
    repetition_penalty: float = 1.0  # over prompt and new tokens (Keskar et al. 2019)
    presence_penalty: float = 0.0  # over new tokens, as OpenAI defines both
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added to a token's logit
    stop: tuple[str, ...] = ()  # strings that end the text, which does not contain them
    stop_ids: tuple[int, ...] = ()  # ids that end the text, as the end-of-text id does
    ignore_end: bool = False  # go on after the end-of-text id
    seed: int | None = None  # None: different tokens each time
    logprobs: int | None = None  # report each token's log-probability and this many likeliest ones
    prompt_logprobs: int | None = None  # the same for the prompt's tokens, in `End.prompt`
    experts: bool = False  # report the experts that processed each token, per layer
    embed_from: int | None = None  # report `End.embedding`, of the prompt from this token on
    constraint: Constraint | None = None  # the grammar that the text follows
    # Of the thought with which the text may begin, which is then closed. None: thoughts are text as
    # any other. Else stop strings and the constraint are of the answer alone.
    max_thinking_tokens: int | None = None
    named: Mapping[int, bytes] = field(default_factory=dict)  # special tokens that give this text

    def __post_init__(self) -> None:
        check_sampling(self.max_new_tokens, self.temperature, self.top_k, self.top_p)
        rules = {
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "above 0; 1 is none"),
            "presence_penalty": (math.isfinite(self.presence_penalty), "a finite number"),
            "frequency_penalty": (math.isfinite(self.frequency_penalty), "a finite number"),
            "logit_bias": (all(bias < math.inf for bias in self.logit_bias.values()),
                           "numbers, or -inf to forbid a token"),
            "stop": ("" not in self.stop, "strings that are not empty"),
            "logprobs": ((self.logprobs or 0) >= 0, "0 or more, or left out"),
            "max_thinking_tokens": (0 <= (self.max_thinking_tokens or 0) <= self.max_new_tokens,
                                    f"from 0 to max_new_tokens={self.max_new_tokens}, which count "
                                    "the answer too; lower it, or raise max_new_tokens"),
            "prompt_logprobs": ((self.prompt_logprobs or 0) >= 0, "0 or more, or left out"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)} must be {rule}")


@dataclass(frozen=True)
class TokenScore:
    """One token's log-probability, and the likeliest tokens in its place, best first.

    Log-probabilities are the model's own, before temperature, penalties and cuts.
    """

    id: int
    logprob: float | None  # None for a prompt's first token, which nothing predicts
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Token:
    """One generated token and the text it released."""

    id: int
    text: str
    score: TokenScore | None = None  # if asked for
    experts: tuple[tuple[int, ...], ...] | None = None  # [layer][rank] if asked for
    thought: bool = False  # of the thought, or of what stands around it; the text is the thought's
    forced: bool = False  # the model did not choose it


@dataclass(frozen=True)
class End:
    """The last event of a request. `text` is what was still held back."""

    reason: Reason
    text: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens whose keys and values another request had computed
    new_tokens: int = 0
    stop: str | None = None  # the stop string that ended the text
    prompt: Sequence[TokenScore] = ()  # if prompt_logprobs was given
    embedding: Sequence[float] = ()  # mean of the last hidden states, of length 1, if asked for
    experts_LSK: Tensor | None = None  # of the S tokens that were read, if experts were asked for
    error: str = ""  # one line, if reason is "error" or "grammar" (beyond its limits)
    thinking_tokens: int = 0  # of the new tokens, those that the model chose inside of its thought


Listener = Callable[[Token | End], None]


class QueueFull(Exception):
    """The engine takes no more waiting requests; try again later."""


class Request:
    """A prompt and the `new` tokens after it.

    `window` are the tokens that the model reads to predict the next one: all of them, or the newest
    ones. A running request owns a `slot` of the engine's cache, which holds the keys and values of
    the first `read` tokens of its window. `cancelled` is set by whoever no longer wants it.
    """

    def __init__(self, id: int, prompt: list[int], params: SamplingParams, listener: Listener,
                 tokenizer: Any, token_bytes: list[bytes], device: torch.device) -> None:
        self.id, self.params, self.listener = id, params, listener
        self.prompt, self.new, self.window = prompt, list[int](), [*prompt]
        self.cancelled = False
        self.slot = -1  # none until its prompt is read
        self.read = self.cached = 0
        scored, embedded = params.prompt_logprobs is not None, params.embed_from is not None
        self.scores_prompt = scored or embedded  # such a prompt is read in full
        self.prompt_scores = [TokenScore(prompt[0], None)] if scored else []
        self.routed: list[Tensor] = []  # the experts of the tokens read, [L, size, K] of each part
        self.repeats = params.seed is not None and params.temperature > 0
        self.hidden_D: Any = None  # sum of the last hidden states to embed
        self.ends = {*params.stop_ids} | (set() if params.ignore_end else {tokenizer.end_of_text})
        self.text = Release(token_bytes, params.stop, params.named)
        self.thought = (None if params.max_thinking_tokens is None else Thought(
            tokenizer, prompt, params.max_thinking_tokens, Release(token_bytes)))
        self.constraint = params.constraint.start() if params.constraint else None
        self.generator = torch.Generator(device)
        if params.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(params.seed)

    @property
    def unread(self) -> int:
        return len(self.window) - self.read

    @property
    def reading(self) -> bool:
        """Whether the model has more to read than the token that it has just generated."""
        return not self.new or self.unread > 1

    def score_prompt(self, model: Any, x_ND: Tensor) -> None:
        """Score the prompt tokens that these rows predict and embed the rows, if asked for."""
        if self.params.embed_from is not None and not self.new:
            sum_D = x_ND[max(0, self.params.embed_from - self.read):].float().sum(dim=0)
            self.hidden_D = sum_D if self.hidden_D is None else self.hidden_D + sum_D
        if self.params.prompt_logprobs is None or self.new:
            return
        targets = self.window[self.read + 1:self.read + 1 + len(x_ND)]
        for start in range(0, len(targets), SCORED_ROWS):
            tokens = targets[start:start + SCORED_ROWS]
            logits_NV = model.logits(x_ND[start:start + len(tokens)])
            self.prompt_scores += score_tokens(logits_NV, tokens, self.params.prompt_logprobs)

    def add_token(self, logits_V: Tensor) -> Token:
        """Choose the next token. Raises ValueError if no logit is finite, or GrammarError."""
        params, thought = self.params, self.thought
        forced = thought.forced() if thought else None
        token = self._choose(logits_V) if forced is None else forced
        ends = token in self.ends
        thinks = bool(thought and not ends and thought.push(token, forced is not None))
        if self.constraint and not ends and not thinks:
            self.constraint.accept(token)
        self.new.append(token)
        self.window.append(token)
        text = ("" if ends else thought.text(token) if thought and thinks else
                self.text.push(token))
        experts = tuple(map(tuple, self.routed[-1][:, -1].tolist())) if self.routed else None
        score = (None if params.logprobs is None else
                 score_tokens(logits_V[None], [token], params.logprobs)[0])
        return Token(token, text, score, experts, thinks, forced is not None)

    def _choose(self, logits_V: Tensor) -> int:
        """A token that the constraint allows. A thought may come first, and does not end the text.
        """
        thought, allowed_V = self.thought, None
        if self.constraint and thought and thought.begun:
            allowed_V = torch.ones(len(logits_V), dtype=torch.bool)
            allowed_V[[*self.ends]] = False
        elif self.constraint:
            allowed_V = self.constraint.allowed(self.ends)
            if thought and not thought.over:
                allowed_V[thought.begin] = True
        return choose_token(logits_V, self.prompt, self.new, self.params, self.generator, allowed_V)

    def end_reason(self) -> Reason | None:
        """Why the text ends with its latest token; None if it may go on."""
        answers = self.thought is None or self.thought.over
        finished = self.constraint is not None and answers and self.constraint.finished
        if self.new[-1] in self.ends or self.text.stopped or finished:
            return "stop"
        return "length" if len(self.new) >= self.params.max_new_tokens else None

    def end(self, reason: Reason, error: str = "") -> End:
        embedding = () if self.hidden_D is None else F.normalize(self.hidden_D, dim=0).tolist()
        return End(reason, self.text.finish(), len(self.prompt), self.cached, len(self.new),
                   self.text.stopped, tuple(self.prompt_scores), embedding,
                   torch.cat(self.routed, dim=1) if self.routed else None, error,
                   self.thought.tokens if self.thought else 0)


def check_request(prompt: Sequence[int], params: SamplingParams, vocab_size: int,
                  capacity: int) -> None:
    """Raises ValueError for a request that can never be run."""
    if not prompt:
        raise ValueError("the prompt is empty; give at least one token, for example the "
                         "end-of-text id")
    for what, ids in (("prompt", prompt), ("logit_bias", params.logit_bias),
                      ("stop_ids", params.stop_ids)):
        odd = next((token for token in ids if not 0 <= token < vocab_size), None)
        if odd is not None:
            raise ValueError(f"token id {odd} in {what} is outside the vocabulary of {vocab_size}; "
                             "encode with this model's own tokenizer")
    if len(prompt) > capacity:
        raise ValueError(f"prompt of {len(prompt)} tokens leaves no room: {capacity} fit; "
                         "shorten it")


def choose_token(logits_V: Tensor, prompt: Sequence[int], new: Sequence[int],
                 params: SamplingParams, generator: torch.Generator,
                 allowed_V: Tensor | None = None) -> int:
    """The token after `prompt` and the `new` tokens; with `allowed_V`, one of those.

    Raises ValueError if no logit is finite."""
    logits_V = penalize(logits_V, prompt, new, params)
    if allowed_V is not None:
        logits_V = logits_V.masked_fill(~allowed_V.to(logits_V.device), -math.inf)
    largest = float(logits_V.max())
    if not math.isfinite(largest):  # NaN too
        raise ValueError(f"the largest logit is {largest}; the model's weights are damaged, or "
                         "logit_bias forbids every token")
    top_p = params.top_p if params.top_p < 1 else None
    return int(sample(logits_V[None], params.temperature, params.top_k, top_p, generator,
                      params.min_p))


def penalize(logits_V: Tensor, prompt: Sequence[int], new: Sequence[int],
             params: SamplingParams) -> Tensor:
    """Logits after penalties and biases; the same tensor if there are none.

    Repetition (Keskar et al. 2019, equation 2): the logit of every token of prompt and `new` is
    divided by the penalty if positive and multiplied by it if not. Then, for the tokens in `new`,
    count * frequency_penalty + presence_penalty is subtracted. Then biases are added.
    """
    repetition = params.repetition_penalty != 1
    counted = bool((params.presence_penalty or params.frequency_penalty) and new)
    if not (repetition or counted or params.logit_bias):
        return logits_V
    logits_V = logits_V.float().clone()
    if repetition:
        ids = logits_V.new_tensor(sorted({*prompt, *new}), dtype=torch.long)
        old = logits_V[ids]
        factor = params.repetition_penalty
        logits_V[ids] = torch.where(old > 0, old / factor, old * factor)
    if counted:
        counter = Counter(new)
        ids = logits_V.new_tensor(list(counter), dtype=torch.long)
        counts = logits_V.new_tensor(list(counter.values()))
        logits_V[ids] -= counts * params.frequency_penalty + params.presence_penalty
    if params.logit_bias:
        ids = logits_V.new_tensor(list(params.logit_bias), dtype=torch.long)
        logits_V[ids] += logits_V.new_tensor(list(params.logit_bias.values()))
    return logits_V


def score_tokens(logits_NV: Tensor, tokens: Sequence[int], top: int) -> list[TokenScore]:
    """One token's score for each row, with its `top` likeliest tokens."""
    logprobs_NV = logits_NV.float().log_softmax(dim=-1)
    ids_N1 = torch.tensor(tokens, device=logits_NV.device)[:, None]
    own = logprobs_NV.gather(-1, ids_N1)[:, 0].tolist()
    best = logprobs_NV.topk(min(top, logprobs_NV.shape[-1]), dim=-1)
    return [TokenScore(token, logprob, tuple(zip(ids, values, strict=True)))
            for token, logprob, ids, values in zip(tokens, own, best.indices.tolist(),
                                                   best.values.tolist(), strict=True)]


class Release:
    """Turns a stream of token ids into text, released once no stop string can begin in it.

    Bytes that are not UTF-8 become U+FFFD. Special tokens, ids without a token and a character that
    the end of the stream cuts off give no text. Of several stop strings the one that is complete
    first ends the text, and the longest of those complete at once.
    """

    def __init__(self, token_bytes: Sequence[bytes], stop: Sequence[str] = (),
                 named: Mapping[int, bytes] | None = None) -> None:
        self.token_bytes, self.stop, self.named = token_bytes, stop, named or {}
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.pending = ""
        self.stopped: str | None = None  # the stop string that ended the text

    def push(self, token: int) -> str:
        """The text that this token releases."""
        data = self.named.get(token) or (
            self.token_bytes[token] if token < len(self.token_bytes) else b"")
        self.pending += self.decoder.decode(data)
        found = [(self.pending.find(stop) + len(stop), -len(stop), stop)
                 for stop in self.stop if stop in self.pending]
        if found:
            end, _, self.stopped = min(found)
            text, self.pending = self.pending[:end - len(self.stopped)], ""
            return text
        keep = max((overlap(self.pending, stop) for stop in self.stop), default=0)
        cut = len(self.pending) - keep
        text, self.pending = self.pending[:cut], self.pending[cut:]
        return text

    def finish(self) -> str:
        """What was held back, at an end that no stop string made."""
        text, self.pending = self.pending, ""
        return text


def overlap(text: str, stop: str) -> int:
    """Length of the longest beginning of `stop` that `text` ends with."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1)
                 if text.endswith(stop[:size])), 0)
