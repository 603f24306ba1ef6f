"""One admitted request: the tokens it has, how far they are read, and what its listener is told."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fira.infer.queue import Request
from fira.infer.request import End, Piece, Reason, TokenScore
from fira.infer.sample import Sampler, score, scores
from fira.infer.text import Release

SCORED_AT_ONCE = 64  # prompt tokens whose logits over the whole vocabulary are held together


class Progress:
    """`ids` are prompt and answer; of these the first `read` stand in the cache's `slot`."""

    def __init__(self, request: Request, slot: int, cached: int, token_bytes: list[bytes],
                 end_of_text: int, device: torch.device) -> None:
        params = request.params
        self.request, self.slot = request, slot
        self.ids = list(request.prompt)
        self.read = self.cached = cached
        self.begun = params.prompt_logprobs is not None  # such a prompt is read in full
        self.ends = {*params.stop_ids} | (set() if params.ignore_end else {end_of_text})
        self.sampler = Sampler(params, request.prompt, device)
        self.text = Release(token_bytes, params.stop)
        self.prompt_scores = [TokenScore(self.ids[0], None)] if self.begun else []

    @property
    def new(self) -> int:
        """Tokens generated."""
        return len(self.ids) - len(self.request.prompt)

    @property
    def unread(self) -> int:
        return len(self.ids) - self.read

    def score_prompt(self, model: Any, x_ND: Tensor) -> None:
        """Score, if asked for, the prompt's tokens that these rows predict; `read` before them."""
        rivals = self.request.params.prompt_logprobs
        if rivals is None:
            return
        targets = self.request.prompt[self.read + 1:self.read + 1 + len(x_ND)]
        for start in range(0, len(targets), SCORED_AT_ONCE):
            tokens = targets[start:start + SCORED_AT_ONCE]
            logits_NV = model.logits(x_ND[start:start + len(tokens)])
            self.prompt_scores += scores(logits_NV, tokens, rivals)

    def choose(self, logits_V: Tensor, experts_LK: Tensor | None) -> Piece:
        """The next token. Raises ValueError if the logits are no numbers."""
        params = self.request.params
        token = self.sampler.choose(logits_V)
        self.ids.append(token)
        text = "" if token in self.ends else self.text.push(token)
        experts = None
        if params.experts and experts_LK is not None:
            experts = tuple(map(tuple, experts_LK.tolist()))
        scored = None if params.logprobs is None else score(logits_V, token, params.logprobs)
        return Piece(token, text, scored, experts)

    def reason(self, capacity: int) -> Reason | None:
        """Why the answer ends with its latest token; None if it goes on."""
        if self.ids[-1] in self.ends or self.text.stopped:
            return "stop"
        full = self.new >= self.request.params.max_new_tokens or len(self.ids) > capacity
        return "length" if full else None

    def end(self, reason: Reason, error: str = "") -> End:
        return End(reason, self.text.finish(), len(self.request.prompt), self.cached, self.new,
                   self.text.stopped, tuple(self.prompt_scores), error)
