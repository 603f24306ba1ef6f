"""Text in, text out, piece by piece: the model's stream of token ids as readable characters."""
from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from fira.model.generate import stream


def complete(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int = 128,
             temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
             seed: int | None = None) -> Iterator[str]:
    """Yield the continuation of `prompt` as text, without the prompt, until end of text.

    As in training, the model reads the end-of-text token before the prompt. Arguments are those of
    `fira.model.generate.stream`. Raises ValueError at once, for an empty prompt too.
    """
    if not prompt:
        raise ValueError("the prompt is empty; give the text to continue, for example "
                         "'The state of the Union is'")
    ids = [tokenizer.end_of_text, *tokenizer.encode(prompt)]
    return pieces(model, tokenizer, ids, max_new_tokens, temperature, top_k, top_p, seed)


def pieces(model: Any, tokenizer: Any, ids: Sequence[int], max_new_tokens: int = 128,
           temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
           seed: int | None = None, stop: Iterable[int] = ()) -> Iterator[str]:
    """Yield what follows `ids` as text, until end of text or one of the `stop` ids."""
    ends = {tokenizer.end_of_text, *stop}
    tokens = stream(model, ids, max_new_tokens, temperature, top_k, top_p, seed, end_of_text=-1)
    return decode(_until(tokens, ends), tokenizer.token_bytes())


def decode(ids: Iterable[int], token_bytes: Sequence[bytes]) -> Iterator[str]:
    """Text of a stream of ids, each piece as soon as its characters are whole.

    Bytes that are no UTF-8 appear as U+FFFD. Ids without text, the special ones and the rows that
    pad the vocabulary, show nothing; neither does a character cut off by the end of the stream.
    """
    release = Release(token_bytes)
    for token in ids:
        text = release.push(token)
        if text:
            yield text


class Release:
    """The text of one answer, let go as soon as no stop string can begin in it.

    Characters come whole, as in `decode`. Of several stop strings the one that is complete first
    ends the answer, the longest of those complete at once, so that it does not matter how the text
    is cut into tokens.
    """

    def __init__(self, token_bytes: Sequence[bytes], stop: Sequence[str] = ()) -> None:
        self.token_bytes, self.stop = token_bytes, stop
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.held = ""
        self.stopped: str | None = None  # the stop string that ended the answer

    def push(self, token: int) -> str:
        """The text that this token sets free."""
        data = self.token_bytes[token] if token < len(self.token_bytes) else b""
        self.held += self.decoder.decode(data)
        found = [(self.held.find(stop) + len(stop), -len(stop), stop)
                 for stop in self.stop if stop in self.held]
        if found:
            end, _, self.stopped = min(found)
            free, self.held = self.held[:end - len(self.stopped)], ""
            return free
        keep = max((_overlap(self.held, stop) for stop in self.stop), default=0)
        cut = len(self.held) - keep
        free, self.held = self.held[:cut], self.held[cut:]
        return free

    def finish(self) -> str:
        """What was held back, at an end that no stop string made."""
        free, self.held = self.held, ""
        return free


def _overlap(text: str, stop: str) -> int:
    """Length of the longest beginning of `stop` that `text` ends with."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1)
                 if text.endswith(stop[:size])), 0)


def _until(tokens: Iterator[Any], ends: set[int]) -> Iterator[int]:
    for token_B in tokens:
        token = int(token_B[0])
        if token in ends:
            return
        yield token
