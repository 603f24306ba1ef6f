"""The thought with which an answer may begin: told apart from the answer, and closed at a limit."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fira.data.chat import can_think
from fira.data.tokenizer import THINK, THINK_END


def limit_thought(model: Any, think: str | None, limit: int | None,
                  longest: int) -> tuple[bool, int | None]:
    """Whether an answer of at most `longest` tokens begins with an empty thought, and
    `max_thinking_tokens`, None if it has no other.

    `think` is on, off, or None: as the model was tuned. Raises ValueError if it cannot think.
    """
    thinks = bool(getattr(model, "think", False))
    if not thinks and (think == "on" or limit):
        raise ValueError("this model was not tuned to think; leave out --think on and "
                         "--max-thinking, or tune it on answers with reasoning_content")
    if not thinks or think == "off" or limit == 0:
        return thinks, None
    return False, longest if limit is None else limit


class Thought:
    """Follows the tokens of a request: a thought that its prompt has begun or that its first token
    begins, then the answer. `begun` and `over` say how far it is; `tokens` are counted without
    those around the thought and those that were forced."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int], limit: int, release: Any) -> None:
        """`release` turns tokens into text. Raises ValueError without the tokens around thoughts.
        """
        if not can_think(tokenizer):
            raise ValueError(f"max_thinking_tokens={limit} needs a tokenizer with {THINK} and "
                             f"{THINK_END}, and this model's has not both; leave it out")
        self.begin, self.end = (tokenizer.special(name) for name in (THINK, THINK_END))
        self.line, self.gap = (list(tokenizer.encode(text)) for text in ("\n", "\n\n"))
        marks = (token for token in reversed(prompt) if token in (self.begin, self.end))
        self.begun, self.over = next(marks, None) == self.begin, False
        self.limit, self.release, self.tokens = limit, release, 0
        self.coming, self.held, self.shown = list[int](), "", False

    def forced(self) -> int | None:
        """The token that must come now: of the thought's end at its limit, and of the empty line
        after it, as it was written in training."""
        if self.begun and not self.coming and self.tokens >= self.limit:
            self.coming = [*([] if self.held else self.line if self.tokens else self.gap), self.end]
        return self.coming.pop(0) if self.coming else None

    def push(self, token: int, forced: bool) -> bool:
        """Continue with a token; whether it is the thought's, or of what stands around it."""
        if self.over:
            return False
        if not self.begun and not forced:  # the first token
            self.begun, self.over = token == self.begin, token != self.begin
        elif token == self.end and self.begun:
            self.begun, self.coming = False, [*self.gap]
        elif self.begun:
            self.tokens += not forced
        else:
            self.over = not self.coming
        return not self.over or forced

    def text(self, token: int) -> str:
        """The text that a token of the thought releases, without line breaks at its ends."""
        if token in (self.begin, self.end):
            return ""
        text = self.held + self.release.push(token)
        text = text if self.shown else text.lstrip("\n")
        shown = text.rstrip("\n")
        self.held, self.shown = text[len(shown):], self.shown or bool(shown)
        return shown
