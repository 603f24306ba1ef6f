"""Sampling and the generation loop.

The window rule. The model reads at most as many tokens at once as it was trained on, or its
`context` where that is not known. A longer prompt is cut to its newest tokens. When the window is
full and one more token is to be read, the window is shortened to its newest half (window // 2
tokens, at least one, counting the new one), whose positions start at 0 again, and the cache is
rebuilt from it.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import fira.model.fast as fast

COLDEST = 1e-6  # by which a logit of float32 can still be divided
Ids = Sequence[int] | Sequence[Sequence[int]] | Tensor


def generate(model: Any, ids: Ids, max_new_tokens: int = 128, temperature: float = 1.0,
             top_k: int | None = None, **options: Any) -> Tensor:
    """Continue `ids` (one prompt, or several of equal length): prompt and new tokens [B, T+new].

    Arguments are those of `stream`. Ends early once every row has ended; a row that ended before
    others is filled with the end-of-text id.
    """
    prompt_BT = prompt_tensor(model, ids)
    new = list(stream(model, prompt_BT, max_new_tokens, temperature, top_k, **options))
    return torch.cat([prompt_BT, *(token_B[:, None] for token_B in new)], dim=1)


def stream(model: Any, ids: Ids, max_new_tokens: int = 128, temperature: float = 1.0,
           top_k: int | None = None, top_p: float | None = None, seed: int | None = None,
           end_of_text: int | None = None) -> Iterator[Tensor]:
    """Yield the next token of every row, [B], until `max_new_tokens` or all rows have ended.

    temperature 0 is greedy; top_k keeps the k likeliest tokens; top_p keeps the fewest likeliest
    whose probabilities reach it. `seed` fixes the draw; None takes one from torch's global
    generator. `end_of_text` None means the model's own id, if it has one; -1 never ends. The model
    is in eval mode while streaming. Raises ValueError on a value out of range.
    """
    check_sampling(max_new_tokens, temperature, top_k, top_p)
    prompt_BT = prompt_tensor(model, ids)
    if end_of_text is None:
        end_of_text = model.end_of_text
    generator = torch.Generator(device=prompt_BT.device)
    generator.manual_seed(int(torch.randint(2**62, ())) if seed is None else seed)
    return _stream(model, prompt_BT, max_new_tokens, end_of_text,
                   lambda logits_BV: sample(logits_BV, temperature, top_k, top_p, generator))


@torch.inference_mode()
def _stream(model: Any, prompt_BT: Tensor, max_new_tokens: int, end_of_text: int | None,
            choose: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
    window = window_length(model)
    window_BT = unread_BT = prompt_BT[:, -window:]
    cache = model.new_cache(len(prompt_BT), min(window, window_BT.shape[1] + max_new_tokens))
    ended_B = torch.zeros(len(prompt_BT), dtype=torch.bool, device=prompt_BT.device)
    was_training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            token_B = choose(model.logits(model.features(unread_BT, cache)[:, -1]))
            if end_of_text is not None:
                token_B = torch.where(ended_B, end_of_text, token_B)
                ended_B = ended_B | (token_B == end_of_text)
            yield token_B
            if end_of_text is not None and bool(ended_B.all()):
                return
            unread_BT = token_B[:, None]
            window_BT = torch.cat([window_BT, unread_BT], dim=1)
            if window_BT.shape[1] > window:
                window_BT = unread_BT = window_BT[:, -max(1, window // 2):]
                cache.reset()
    finally:
        model.train(was_training)


def window_length(model: Any) -> int:
    """Tokens that the model reads at once: the length it was trained on, else its whole context.

    A model trained on sequences shorter than its context has never seen the later positions.
    """
    return model.trained_length or model.spec.context


def sample(logits_BV: Tensor, temperature: float = 1.0, top_k: int | None = None,
           top_p: float | None = None, generator: torch.Generator | None = None,
           min_p: float = 0.0) -> Tensor:
    """Draw one token per row, [B]; greedy at temperature 0 and below COLDEST.

    One uniform number per row is looked up in the cumulative probabilities of the kept tokens:
    first the `top_k` likeliest, of these the fewest whose share reaches `top_p`, of these the ones
    at least `min_p` times as likely as the likeliest (Nguyen et al. 2024).
    """
    if temperature < COLDEST:
        return logits_BV.argmax(dim=-1)
    probs_BV = (logits_BV.float() / temperature).softmax(dim=-1)
    order_BV = None
    if top_k is not None:
        probs_BV, order_BV = probs_BV.topk(min(top_k, probs_BV.shape[1]), dim=-1)
    if top_p is not None:
        probs_BV = nucleus(probs_BV, top_p)
    if min_p > 0:
        floor_B1 = min_p * probs_BV.amax(dim=-1, keepdim=True)
        probs_BV = probs_BV.masked_fill(probs_BV < floor_B1, 0)
    sums_BV = probs_BV.cumsum(dim=-1)
    point_B1 = sums_BV[:, -1:] * torch.rand(len(sums_BV), 1, generator=generator,
                                            device=sums_BV.device)
    drawn_B1 = torch.searchsorted(sums_BV, point_B1, right=True).clamp(max=sums_BV.shape[1] - 1)
    return (drawn_B1 if order_BV is None else order_BV.gather(-1, drawn_B1)).squeeze(-1)


def nucleus(probs_BV: Tensor, top_p: float) -> Tensor:
    """Probabilities, 0 but for the fewest likeliest whose share of their sum reaches `top_p`
    (Holtzman et al. 2019, section 3.1). What is as likely as the last of them is kept too."""
    falling_BV = fast.sort_values(probs_BV).flip(-1)
    sums_BV = falling_BV.cumsum(dim=-1, dtype=torch.float64)
    last_B1 = torch.searchsorted(sums_BV, top_p * sums_BV[:, -1:])
    least_B1 = falling_BV.gather(-1, last_B1)
    kept_BV = torch.ge(probs_BV, least_B1, out=torch.empty_like(probs_BV))  # 1 or 0
    return kept_BV.mul_(probs_BV)  # in 6 us; masked_fill takes 134 us where the mask changes often


def prompt_tensor(model: Any, ids: Ids) -> Tensor:
    """Ids as int64 [B, T] on the model's device. Raises ValueError if empty, ragged or unknown."""
    device = next(model.parameters()).device
    try:
        ids_BT = torch.as_tensor(ids, device=device)
    except (ValueError, TypeError):
        raise ValueError("prompt rows differ in length or are not token ids; give one list of "
                         "ids, or several of equal length") from None
    if ids_BT.numel() == 0:
        raise ValueError("the prompt is empty; give at least one token, for example the "
                         "end-of-text id")
    if ids_BT.dim() > 2 or ids_BT.is_floating_point():
        raise ValueError(f"prompt of shape {tuple(ids_BT.shape)}, {ids_BT.dtype}: ids must be "
                         "integers [T] or [B, T]; encode the text first")
    ids_BT = ids_BT.reshape(-1, ids_BT.shape[-1]).long()
    low, high, size = int(ids_BT.min()), int(ids_BT.max()), model.spec.vocab_size
    if low < 0 or high >= size:
        raise ValueError(f"token id {low if low < 0 else high} is outside the vocabulary of "
                         f"{size}; encode the prompt with this model's own tokenizer")
    return ids_BT


def check_sampling(max_new_tokens: int, temperature: float, top_k: int | None,
                   top_p: float | None) -> None:
    """Raise ValueError, one line, on a value out of range."""
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be 0 or more; try 128")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be a number of at least 0; "
                         "0 is greedy, 1 samples the model's own distribution")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1; leave it out to keep every token")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be above 0 and at most 1; "
                         "leave it out to keep every token")
