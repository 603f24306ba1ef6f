"""Many requests, one model: continuous batching over a key-value cache with slots.

One step reads the newest token of every request that is generating, and at most `prefill_tokens`
tokens of prompts that are not read yet, fewer if the others would wait for more than `pause` ms; if
that is infinite, the clock decides nothing and all repeats to the bit. Requests join and leave
between steps. A prompt that begins like what a slot holds reuses its rows.

A row's last bits depend on which rows are multiplied together. So the prompt of a request with a
seed is read in blocks, each by itself; the compiled step computes every row by itself.

A request has the `capacity` of its slot. Its prompt must fit, and generation ends with "length"
when its last token would find no place, so prompt and new tokens together are at most capacity + 1.
With `slide`, the window slides instead, by the rule of `fira.model.generate`.

Listeners are called in the thread that steps. They must be quick, and may call `add` and `cancel`.
"""
from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Generator, Sequence
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fira.infer.cache import DecodeStep, Part, SlotBatch, SlotCache, group_prompts, split_budget
from fira.infer.constraint import GrammarError
from fira.infer.request import (
    End,
    Listener,
    QueueFull,
    Reason,
    Request,
    SamplingParams,
    Token,
    check_request,
)
from fira.model.generate import window_length
from fira.model.router import Watch, routers

log = logging.getLogger(__name__)
LEAST = 64  # prompt tokens of a step, however long they take: fewer take hardly less time
COUNTED = "finished cancelled failed prompt_tokens cached_tokens generated_tokens steps".split()


class Engine:
    """Continues prompts for many callers at once. `step` does the work; `start` keeps stepping.
    `decode_step` None is the model's own forward; a compiled step may be set in its place.
    """

    def __init__(self, model: Any, tokenizer: Any, *, slots: int = 8, capacity: int | None = None,
                 max_waiting: int = 64, prefill_tokens: int = 512, pause: float = 100,
                 slide: bool = False, decode_step: DecodeStep | None = None,
                 cache_dtype: torch.dtype | None = None) -> None:
        """`cache_dtype`: see `SlotCache`. Raises ValueError on a number out of range."""
        context = model.spec.context
        self.capacity = window_length(model) if capacity is None else capacity
        for name, value, most in (("slots", slots, 0), ("prefill_tokens", prefill_tokens, 0),
                                  ("pause", pause, 0), ("capacity", self.capacity, context)):
            if value < 1 or (most and value > most):
                raise ValueError(f"{name}={value} must be at least 1"
                                 + (f" and at most the model's context={most}" if most else ""))
        self.model = model.eval()
        self.max_waiting, self.slide = max_waiting, slide
        self.prefill_tokens, self.pause = prefill_tokens, pause
        self.tokenizer, self.token_bytes = tokenizer, tokenizer.token_bytes()
        self.cache = SlotCache(model, slots, self.capacity, cache_dtype)
        self.device = self.cache.keys.device
        self.decode_step: Any = decode_step
        self.after_tokens: Callable[[], object] = bool  # called when listeners were told
        self._watch = Watch(model)
        self._requests: dict[int, Request] = {}  # running or waiting, oldest first
        self._ids, self._closed = itertools.count(1), False
        self._changed = threading.Condition()  # guards what is above
        self._stepping = threading.Lock()  # held by whoever steps; guards what is below
        self._running: list[Request] = []  # oldest first
        self._thread: threading.Thread | None = None
        self._loads = np.zeros((len(routers(model)), model.spec.num_experts), np.int64)
        self._token_ms = min(pause, 1e9) / LEAST  # of reading a prompt; the latest counts half
        self._counts = dict.fromkeys(COUNTED, 0)

    def add(self, prompt_ids: Sequence[int], params: SamplingParams, listener: Listener) -> int:
        """Queue a request; its id. Raises QueueFull, or ValueError for what can never be run."""
        prompt = [int(token) for token in prompt_ids]
        if self.slide:
            prompt = prompt[-self.capacity:]
        check_request(prompt, params, self.model.spec.vocab_size, self.capacity)
        with self._changed:
            if self._closed:
                raise QueueFull("the engine is closed and takes no requests; start another")
            if self.stats["waiting"] >= self.max_waiting:
                raise QueueFull(f"{self.max_waiting} requests are waiting, the most allowed; try "
                                "again later")
            request = Request(next(self._ids), prompt, params, listener, self.tokenizer,
                              self.token_bytes, self.device)
            self._requests[request.id] = request
            self._changed.notify_all()
        return request.id

    def cancel(self, request_id: int) -> None:
        """End a request soon, with End("cancelled"); nothing happens if it has ended."""
        with self._changed:
            if request_id in self._requests:
                self._requests[request_id].cancelled = True
                self._changed.notify_all()

    @torch.inference_mode()
    def step(self) -> bool:
        """One token of every generating request, and a part of the prompts; False if idle.

        What goes wrong inside ends every running request with an error and is raised.
        """
        with self._stepping:
            try:
                self._admit()
                if not self._running:
                    return False
                self._counts["steps"] += 1
                compiled = self.decode_step is not None
                chosen = [(request, 1) for request in self._running if not request.reading]
                groups = self._choose_prompts(answering=bool(chosen))
                short = [group for group in groups if compiled and self._are_short(group)]
                self._read(sum(short, chosen), compiled)
                for group in (one for one in groups if one not in short):
                    self._read(group, False)
                return True
            except BaseException as error:
                self._fail(error)
                raise
            finally:
                self.after_tokens()

    def start(self) -> None:
        """Step in a thread of its own, whenever there is work, until `close`."""
        assert self._thread is None, "the engine has been started"
        self._thread = threading.Thread(target=self._work, name="fira-engine", daemon=True)
        self._thread.start()

    def close(self, drain: bool = False) -> None:
        """Take no more requests; cancel the present ones, or with `drain` finish them first."""
        with self._changed:
            self._closed = True
            if not drain:
                for request in self._requests.values():
                    request.cancelled = True
            self._changed.notify_all()
        if self._thread:
            self._thread.join()
        while self.step():  # without a thread the rest is done here
            pass
        self._watch.close()

    def refresh(self) -> None:
        """Forget what was computed with old weights; call it after the model's weights changed.

        Raises ValueError while requests are running or waiting.
        """
        with self._stepping, self._changed:
            if self._requests:
                raise ValueError(f"{len(self._requests)} running or waiting requests would mix old "
                                 "and new weights; let them end, or cancel them, before refresh()")
            self.cache.forget()
            if hasattr(self.decode_step, "refresh"):  # it may hold weights of its own
                self.decode_step.refresh()

    def stream(self, prompt_ids: Sequence[int],
               params: SamplingParams) -> Generator[Token | End, None, None]:
        """The events of one request. Steps itself if no thread does; leaving early cancels."""
        events: SimpleQueue[Token | End] = SimpleQueue()
        request_id = self.add(prompt_ids, params, events.put)

        def read() -> Generator[Token | End, None, None]:
            event: Token | End | None = None
            try:
                while not isinstance(event, End):
                    while self._thread is None and events.empty():
                        self.step()
                    event = events.get()
                    yield event
            finally:
                self.cancel(request_id)

        return read()

    @property
    def stats(self) -> dict[str, int]:
        """Now: requests waiting and running, slots. Since the start: requests that finished, were
        cancelled or failed; prompt tokens, those found in the cache, generated tokens, steps."""
        running = len(self._running)
        return {"waiting": len(self._requests) - running, "running": running,
                "slots": len(self.cache.tokens), **self._counts}

    @property
    def loads(self) -> list[list[int]]:
        """Tokens routed to each expert since the start, per layer; empty for a dense model."""
        return self._loads.tolist()

    def _admit(self) -> None:
        """Between forwards: end what was cancelled, give free slots to the oldest that wait."""
        with self._changed:
            requests = list(self._requests.values())
        for request in requests:
            if request.cancelled:
                self._finish(request, "cancelled")
            elif len(self._running) < len(self.cache.tokens) and request not in self._running:
                self._running.append(request)
                if request.params.max_new_tokens == 0 and not request.scores_prompt:
                    self._finish(request, "length")

    def _choose_prompts(self, answering: bool) -> list[list[tuple[Request, int]]]:
        """The requests whose prompts are read now, and how many tokens of each, in groups."""
        reading = [request for request in self._running if request.reading]
        ready = [request for request in reading if self._take_slot(request, reading)]
        fitting = max(LEAST, int(min(2**30, self.pause / self._token_ms))) if answering else 2**30
        sizes = split_budget(min(self.prefill_tokens, fitting), [one.unread for one in ready])
        return group_prompts(list(zip(ready, sizes, strict=True)))

    def _are_short(self, prompts: list[tuple[Request, int]]) -> bool:
        """Whether the compiled step reads these prompts faster than the model does."""
        return (sum(size for _, size in prompts) <= getattr(self.decode_step, "prompt_tokens", 0)
                and not any(request.scores_prompt for request, _ in prompts))

    def _read(self, chosen: list[tuple[Request, int]], compiled: bool) -> None:
        """Read so many tokens of each request, and choose the next one where none is left."""
        if not chosen:
            return
        began = time.monotonic()
        parts = [Part(request.slot, request.read, size) for request, size in chosen]
        tokens = [request.window[part.start:part.start + part.size]
                  for (request, _), part in zip(chosen, parts, strict=True)]
        tokens_N = torch.tensor(sum(tokens, []), device=self.device)
        if compiled:
            logits_PV, experts_LNK = self.decode_step(self.model, self.cache, tokens_N, parts)
        else:
            logits_PV, experts_LNK = self._read_plain(tokens_N, parts, chosen)
        self._count(experts_LNK)
        if not compiled and len(tokens_N) >= LEAST:
            self._token_ms += 500 * (time.monotonic() - began) / len(tokens_N) - self._token_ms / 2
        for (request, size), part, ids in zip(chosen, parts, tokens, strict=True):
            self.cache.extend(part, ids, request.repeats)
            request.read += size
        # OpenMP's threads spin on after their work, on cores that a compiled step needs: choosing
        # a token of 50,304 with two threads made the next step of fira-334m 1.4 times as long.
        threads, end = torch.get_num_threads(), 0
        torch.set_num_threads(1)
        try:
            for number, (request, size) in enumerate(chosen):
                end += size
                if request.params.experts and experts_LNK is not None:
                    request.routed.append(experts_LNK[:, end - size:end])
                if not request.unread:
                    self._advance(request, logits_PV[number])
        finally:
            torch.set_num_threads(threads)
            self.after_tokens()

    def _read_plain(self, tokens_N: Tensor, parts: list[Part], chosen: list[tuple[Request, int]]
                    ) -> tuple[Tensor, Tensor | None]:
        """What a `DecodeStep` does, by the model's own forward; prompts are scored if asked for."""
        batch = SlotBatch(self.cache, parts)
        x_ND = self.model.features(tokens_N[None], batch)[0]
        experts = [chosen_NK for chosen_NK in self._watch.experts if chosen_NK is not None]
        for (request, _), x_SD in zip(chosen, x_ND.split([p.size for p in parts]), strict=True):
            request.score_prompt(self.model, x_SD)
        return self.model.logits(x_ND[batch.lasts_P]), torch.stack(experts) if experts else None

    def _take_slot(self, request: Request, reading: Sequence[Request]) -> bool:
        """Before a prompt is read; False: it waits for an earlier one with the same beginning."""
        if request.slot < 0:
            earlier = [other.window for other in reading[:reading.index(request)]
                       if other.repeats or not request.repeats]
            taken = self.cache.take(request.window, earlier, not request.scores_prompt,
                                    request.repeats)
            if taken is None:
                return False
            request.slot, request.read = taken
            request.cached = request.read
        return True

    def _advance(self, request: Request, logits_V: Tensor) -> None:
        """Choose the next token from these logits and tell the listener."""
        if request.params.max_new_tokens == 0:
            self._finish(request, "length")
            return
        try:
            token = request.add_token(logits_V)
        except ValueError as error:
            beyond = isinstance(error, GrammarError)
            self._finish(request, "grammar" if beyond else "error", str(error))
            return
        self._counts["generated_tokens"] += 1
        self._tell(request, token)
        reason = request.end_reason()
        if len(request.window) > self.capacity and not reason:
            if self.slide:
                request.window = request.window[-max(1, self.capacity // 2):]
                request.read, self.cache.tokens[request.slot] = 0, []
            else:
                reason = "length"
        if reason:
            self._finish(request, reason)

    def _finish(self, request: Request, reason: Reason, error: str = "") -> None:
        if request in self._running:
            self._running.remove(request)
        if request.slot >= 0:
            self.cache.release(request.slot)
        self._counts["prompt_tokens"] += len(request.prompt) if request.new else request.read
        self._counts["cached_tokens"] += request.cached
        ended = "failed" if error else "cancelled" if reason == "cancelled" else "finished"
        self._counts[ended] += 1
        with self._changed:
            del self._requests[request.id]
        self._tell(request, request.end(reason, error))

    def _tell(self, request: Request, event: Token | End) -> None:
        """Call the listener; one that fails ends its own request only."""
        try:
            request.listener(event)
        except Exception:
            log.exception("the listener of request %d failed; the request ends", request.id)
            request.cancelled = True

    def _fail(self, error: BaseException) -> None:
        """End what runs; what the cache holds can no longer be trusted."""
        line = f"{type(error).__name__}: {error}".splitlines()[0]
        for request in list(self._running):
            self._finish(request, "error", line)
        self.cache.forget()

    def _count(self, experts_LNK: Tensor | None) -> None:
        if experts_LNK is not None:
            for counts, experts_NK in zip(self._loads, experts_LNK.cpu().numpy(), strict=True):
                counts += np.bincount(experts_NK.ravel(), minlength=len(counts))

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._requests)
                if self._closed and not self._requests:
                    return
            try:
                self.step()
            except Exception:
                log.exception("a step failed; its requests have ended with an error")
