"""Constraints on generated text: which tokens may come next, so that a text follows a grammar.

`llguidance` compiles JSON schemas, regular expressions and context-free grammars, once for all
requests with the same one, and computes the tokens that each request's own state allows.
"""
from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fira.data.tokenizer import CALL, CALL_END, Tokenizer

LONGEST = 2**15  # characters of a grammar; the slowest found of this length compiles in 0.4 s
# About 4 ms of work at most for the lexer of one token (llguidance: 14,000 units a ms), and 40 MB.
LIMITS: Any = {"initial_lexer_fuel": 200_000, "step_lexer_fuel": 50_000,
               "max_lexer_states": 20_000, "verbose_errors": False}
# JSON is written as Python's json.dumps does: free whitespace lets a weak model write spaces only
JSON_FORM: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Constraint:
    """A compiled grammar and how much of it a text has written."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self.matcher, self.vocab_size = matcher, vocab_size

    def start(self) -> Constraint:
        """The same grammar with a state of its own."""
        return Constraint(self.matcher.deep_copy(), self.vocab_size)

    def allowed(self, ends: Iterable[int]) -> Tensor:
        """Whether each token may come next, [V]; `ends` may where the text may end.

        Raises ValueError if the grammar exceeds its limits on this text.
        """
        bits = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
        if self.matcher.is_error():
            raise ValueError(f"the grammar fails on this text ({_one_line(self.matcher)}); use a "
                             "simpler one")
        allowed_V = np.unpackbits(bits, count=self.vocab_size, bitorder="little").view(bool)
        allowed_V[[*ends]] = self.matcher.is_accepting()
        return torch.from_numpy(allowed_V)

    def accept(self, token: int) -> None:
        """Continue after an allowed token that does not end the text."""
        self.matcher.consume_token(token)

    @property
    def finished(self) -> bool:
        """Whether the text is complete and nothing may follow it."""
        return self.matcher.is_stopped() and not self.matcher.is_error()


class Grammars:
    """Compiles constraints for one tokenizer and a head of `vocab_size` rows."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """Raises ValueError if llguidance is not installed."""
        try:
            import llguidance
        except ImportError:
            raise ValueError("constraints need the package llguidance; install it with: "
                             "pip install 'fira-moe[serve]'") from None
        self.library, self.vocab_size, self.encode = llguidance, vocab_size, tokenizer.encode
        names = tokenizer.token_bytes()
        self.special_token_ids = [id for name, id in tokenizer.added.items()
                                  if not names[id] or name in (CALL, CALL_END)]
        for name, id in tokenizer.added.items():
            names[id] = name.encode()
        self.tokens = names + [b""] * (vocab_size - len(names))
        self.eos_token_id, self.bos_token_id = tokenizer.end_of_text, None
        self.is_tokenizer_wrapper: Any = True  # with these fields LLTokenizer reads this object
        self.tokenizer = llguidance.LLTokenizer(self, n_vocab=vocab_size)  # type: ignore[arg-type]
        self.compile = functools.lru_cache(64)(self._compile)

    def __call__(self, text: str | bytes) -> list[int]:
        """LLTokenizer's way to encode text."""
        return self.encode(text if isinstance(text, str) else text.decode())

    def _compile(self, kind: str, grammar: str) -> Constraint:
        """`kind`: json (a schema), regex, or grammar (Lark's or llama.cpp's GBNF).

        Raises ValueError, one line, for what cannot be compiled within LONGEST and LIMITS.
        """
        from llguidance.gbnf_to_lark import any_to_lark

        if len(grammar) > LONGEST:
            raise ValueError(f"it has {len(grammar)} characters; give at most {LONGEST}")
        matchers = self.library.LLMatcher
        try:
            source = (matchers.grammar_from_json_schema(grammar, JSON_FORM) if kind == "json" else
                      matchers.grammar_from_regex(grammar) if kind == "regex" else
                      matchers.grammar_from_lark(any_to_lark(grammar)))
        except Exception as error:  # any_to_lark raises no narrower kind
            raise ValueError(f"{' '.join(str(error).split())[:160]}; change that part") from None
        matcher = matchers(self.tokenizer, source, log_level=0,
                           limits=self.library.LLParserLimits(**LIMITS))
        matcher.compute_bitmask()  # some grammars exceed a limit only here
        if matcher.is_error():
            raise ValueError(f"{_one_line(matcher)}; change that part")
        return Constraint(matcher, self.vocab_size)


def _one_line(matcher: Any) -> str:
    return " ".join(matcher.get_error().split())[:160]
