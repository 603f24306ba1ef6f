"""Many requests, one model: continuous batching over a key-value cache with slots.

A step reads one token of every answer under way (`decode_step`) and at most `prefill_tokens` of the
prompts that are not read yet. Requests join and leave between steps. A prompt that begins like what
a slot holds, live or finished, copies those rows of the cache instead of reading the tokens again.

The window rule of an engine: a request has the `capacity` of its slot and never slides. The prompt
must fit; the answer ends with "length" when its last token would find no place, so prompt and
answer together are at most capacity + 1 tokens. (`fira.model.generate` slides instead.)

Listeners are called in the thread that steps; they must be quick and may call `add` and `cancel`.
"""
from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Iterator, Sequence
from queue import SimpleQueue
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from fira.infer.cache import Part, SlotCache
from fira.infer.progress import Progress
from fira.infer.queue import Queue, Request, share
from fira.infer.request import End, Listener, Piece, QueueFull, SamplingParams
from fira.infer.slots import Slots
from fira.infer.step import DecodeStep, TorchStep
from fira.model.generate import window_length
from fira.runtime import one_thread

log = logging.getLogger(__name__)


class Stats(TypedDict):
    """A snapshot of what the engine does and did."""

    waiting: int
    running: int
    slots: int
    finished: int  # requests that ended by themselves
    cancelled: int
    failed: int
    prompt_tokens: int  # read, or found read
    cached_tokens: int  # found read
    generated_tokens: int
    steps: int


class Engine:
    """Continues prompts for many callers at once. `step` does the work; `start` keeps stepping."""

    def __init__(self, model: Any, tokenizer: Any, *, slots: int = 8, capacity: int | None = None,
                 max_waiting: int = 64, prefill_tokens: int = 512) -> None:
        """Raises ValueError on a number out of range."""
        context = model.spec.context
        self.capacity = window_length(model) if capacity is None else capacity
        for name, value, most in (("slots", slots, None), ("prefill_tokens", prefill_tokens, None),
                                  ("capacity", self.capacity, context)):
            if value < 1 or (most and value > most):
                raise ValueError(f"{name}={value} must be at least 1"
                                 + (f" and at most the model's context={most}" if most else ""))
        self.model, self.prefill_tokens = model.eval(), prefill_tokens
        self.token_bytes, self.end_of_text = tokenizer.token_bytes(), tokenizer.end_of_text
        self.device = model.token_embedding.weight.device
        self.slots = Slots(SlotCache(model, slots, self.capacity))
        self.reader = TorchStep(model)
        self.decode_step: DecodeStep = self.reader
        self._queue = Queue(max_waiting)
        self._requests: dict[int, Request] = {}
        self._ids = itertools.count(1)
        self._changed = threading.Condition()  # guards what is above
        self._stepping = threading.Lock()  # held by whoever steps; guards what is below
        self._running: list[Progress] = []  # oldest first
        self._thread: threading.Thread | None = None
        self._closed = self._draining = False
        self._loads = np.zeros((len(self.reader.probe.layers), model.spec.num_experts), np.int64)
        self._counts = dict.fromkeys(Stats.__annotations__, 0)

    def add(self, prompt_ids: Sequence[int], params: SamplingParams, listener: Listener) -> int:
        """Queue a request; its id. Raises QueueFull, or ValueError for what can never be run."""
        prompt = [int(token) for token in prompt_ids]
        self._check(prompt, params)
        with self._changed:
            if self._closed:
                raise QueueFull("the engine is closed and takes no requests; start another")
            request = Request(next(self._ids), prompt, params, listener)
            self._queue.push(request)
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
        """One token of every answer and a piece of the prompts; False if there was no request.

        What goes wrong inside ends every running request with an error and is raised.
        """
        with self._stepping:
            try:
                self._settle()
                if not self._running:
                    return False
                self._counts["steps"] += 1
                reading = [one for one in self._running if not one.new]
                self._decode([one for one in self._running if one.new])
                self._prefill(reading)
                return True
            except BaseException as error:
                self._fail(error)
                raise

    def start(self) -> None:
        """Step in a thread of its own, whenever there is work, until `close`."""
        assert self._thread is None, "the engine has been started"
        self._thread = threading.Thread(target=self._work, name="fira-engine", daemon=True)
        self._thread.start()

    def close(self, drain: bool = False) -> None:
        """Take no more requests; end what there is with End("cancelled"), or answer it first."""
        with self._changed:
            self._closed, self._draining = True, drain
            if not drain:
                for request in self._requests.values():
                    request.cancelled = True
            self._changed.notify_all()
        if self._thread:
            self._thread.join()
        while self.step():  # without a thread the rest is done here
            pass
        self.reader.close()

    def stream(self, prompt_ids: Sequence[int], params: SamplingParams) -> Iterator[Piece | End]:
        """The events of one request. Steps itself if no thread does; leaving early cancels."""
        events: SimpleQueue[Piece | End] = SimpleQueue()
        return self._events(self.add(prompt_ids, params, events.put), events)

    @property
    def stats(self) -> Stats:
        counts = {**self._counts, "waiting": len(self._queue), "running": len(self._running),
                  "slots": len(self.slots.cache.held)}
        return Stats(**counts)  # type: ignore[typeddict-item]

    @property
    def loads(self) -> list[list[int]]:
        """Tokens routed to each expert since the start, per layer; empty for a dense model."""
        return self._loads.tolist()

    def _check(self, prompt: list[int], params: SamplingParams) -> None:
        vocab = self.model.spec.vocab_size
        if not prompt:
            raise ValueError("the prompt is empty; give at least one token, for example the "
                             "end-of-text id")
        for what, ids in (("prompt", prompt), ("logit_bias", params.logit_bias),
                          ("stop_ids", params.stop_ids)):
            odd = next((token for token in ids if not 0 <= token < vocab), None)
            if odd is not None:
                raise ValueError(f"token id {odd} in {what} is outside the vocabulary of {vocab}; "
                                 "encode with this model's own tokenizer")
        if len(prompt) > self.capacity:
            raise ValueError(f"prompt of {len(prompt)} tokens leaves no room: {self.capacity} fit; "
                             "shorten it")

    def _settle(self) -> None:
        """Between forwards: let go what was cancelled, admit what waits."""
        with self._changed:
            gone = self._queue.take_cancelled()
            left = [one for one in self._running if one.request.cancelled]
            arrived = self._queue.next_batch(self.slots.free + len(left))
        for request in gone:
            self._tell(request, End("cancelled", prompt_tokens=len(request.prompt)))
        for one in left:
            self._finish(one, one.end("cancelled"))
        for request in arrived:
            slot, cached = self.slots.take(request.prompt, request.params.prompt_logprobs is None)
            one = Progress(request, slot, cached, self.token_bytes, self.end_of_text, self.device)
            self._running.append(one)
            if request.params.max_new_tokens == 0 and request.params.prompt_logprobs is None:
                self._finish(one, one.end("length"))

    def _decode(self, answering: list[Progress]) -> None:
        if not answering:
            return
        tokens_N = torch.tensor([one.ids[-1] for one in answering], device=self.device)
        positions_N = torch.tensor([one.read for one in answering], device=self.device)
        logits_NV, experts_LNK = self.decode_step(
            self.model, self.slots.cache, tokens_N, positions_N, [one.slot for one in answering])
        self._count(experts_LNK)
        for one in answering:
            self.slots.cache.held[one.slot].append(one.ids[-1])
            one.read += 1
        with one_thread():
            for row, one in enumerate(answering):
                self._advance(one, logits_NV[row],
                              None if experts_LNK is None else experts_LNK[:, row])

    def _prefill(self, reading: list[Progress]) -> None:
        """Read up to `prefill_tokens` of the prompts, all their pieces in one flat batch."""
        ready = [one for one in reading if self.slots.begin(one, reading)]
        sizes = share(self.prefill_tokens, [one.unread for one in ready])
        pieces = [(one, size) for one, size in zip(ready, sizes, strict=True) if size]
        if not pieces:
            return
        tokens = [one.ids[one.read:one.read + size] for one, size in pieces]
        parts = [Part(one.slot, one.read, size) for one, size in pieces]
        x_ND, experts_LNK = self.reader.read(
            self.model, self.slots.cache, torch.tensor(sum(tokens, []), device=self.device), parts)
        self._count(experts_LNK)
        end = 0
        for (one, size), ids in zip(pieces, tokens, strict=True):
            start, end = end, end + size
            self.slots.cache.held[one.slot].extend(ids)
            one.score_prompt(self.model, x_ND[start:end])
            one.read += size
            if not one.unread:
                if one.request.params.max_new_tokens == 0:
                    self._finish(one, one.end("length"))
                    continue
                self._advance(one, self.model.logits(x_ND[end - 1]),
                              None if experts_LNK is None else experts_LNK[:, end - 1])

    def _advance(self, one: Progress, logits_V: Tensor, experts_LK: Tensor | None) -> None:
        """Choose the next token from these logits and tell the listener."""
        try:
            piece = one.choose(logits_V, experts_LK)
        except ValueError as error:
            self._finish(one, one.end("error", error=str(error)))
            return
        self._counts["generated_tokens"] += 1
        self._tell(one.request, piece)
        reason = one.reason(self.capacity)
        if reason:
            self._finish(one, one.end(reason))

    def _finish(self, one: Progress, end: End) -> None:
        self._running.remove(one)
        self.slots.give_back(one.slot)
        self._counts["prompt_tokens"] += min(one.read, len(one.request.prompt))
        self._counts["cached_tokens"] += one.cached
        self._tell(one.request, end)

    def _tell(self, request: Request, event: Piece | End) -> None:
        """Call the listener; one that fails ends its own request only."""
        if isinstance(event, End):
            kind = {"cancelled": "cancelled", "error": "failed"}.get(event.reason, "finished")
            self._counts[kind] += 1
            with self._changed:
                del self._requests[request.id]
        try:
            request.listener(event)
        except Exception:
            log.exception("the listener of request %d failed; the request ends", request.id)
            request.cancelled = True

    def _fail(self, error: BaseException) -> None:
        """End what runs; what the cache holds is not to be trusted any more."""
        line = f"{type(error).__name__}: {error}".splitlines()[0]
        for one in list(self._running):
            self._finish(one, one.end("error", error=line))
        self.slots.forget()

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

    def _events(self, request_id: int, events: SimpleQueue[Piece | End]) -> Iterator[Piece | End]:
        try:
            while True:
                while self._thread is None and events.empty():
                    self.step()
                event = events.get()
                yield event
                if isinstance(event, End):
                    return
        finally:
            self.cancel(request_id)
