"""Constraints on generated text: which tokens may come next, so that a text follows a grammar.

`llguidance` compiles JSON schemas, regular expressions and context-free grammars, once for all
requests with the same one, and computes the tokens that each request's own state allows.
"""
from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fira.data.tokenizer import Tokenizer

LONGEST = 2**15  # characters of a grammar; the slowest found of this length compiles in 0.4 s
# About 4 ms of work at most for the lexer of one token (llguidance: 14,000 units a ms), and 40 MB.
LIMITS: Any = {"initial_lexer_fuel": 200_000, "step_lexer_fuel": 50_000,
               "max_lexer_states": 20_000, "verbose_errors": False}
# JSON is written as Python's json.dumps does: free whitespace lets a weak model write spaces only
JSON_FORM: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class GrammarError(ValueError):
    """A grammar exceeds its limits on a text, which llguidance finds out while it is written."""


class Constraint:
    """A compiled grammar and how much of it a text has written.

    All its copies share one lexer, which can do no more once it is beyond its limits; `discard` is
    called then.
    """

    def __init__(self, matcher: Any, vocab_size: int, discard: Callable[[], None]) -> None:
        self.matcher, self.vocab_size, self.discard = matcher, vocab_size, discard

    def start(self) -> Constraint:
        """The same grammar with a state of its own."""
        return Constraint(self.matcher.deep_copy(), self.vocab_size, self.discard)

    def allowed(self, ends: Iterable[int]) -> Tensor:
        """Whether each token may come next, [V]; `ends` may where the text may end.

        Raises GrammarError if the grammar exceeds its limits on this text.
        """
        bits = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
        if self.matcher.is_error():
            self.discard()
            raise GrammarError(f"the grammar exceeds its limits on this text "
                               f"({_one_line(self.matcher)}); use a simpler one")
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
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self.compile = functools.lru_cache(64)(self._compile)

    @functools.cached_property
    def library(self) -> Any:
        """llguidance. Raises ValueError if it is not installed."""
        try:
            import llguidance.gbnf_to_lark
        except ImportError:
            raise ValueError("the package llguidance is not installed; run: pip install "
                             "'fira-moe[serve]'") from None
        return llguidance

    @functools.cached_property
    def tokens(self) -> Any:
        """The vocabulary as llguidance's tree of bytes; 50,257 tokens take a second."""
        return self.library.LLTokenizer(self.tokenizer.reference.to_str(), n_vocab=self.vocab_size,
                                        eos_token=self.tokenizer.end_of_text)

    def _compile(self, kind: str, grammar: str) -> Constraint:
        """`kind`: json (a schema), regex, or grammar (Lark's or llama.cpp's GBNF).

        Raises ValueError, one line, for what cannot be compiled within LONGEST and LIMITS.
        """
        library = self.library
        if len(grammar) > LONGEST:
            raise ValueError(f"it has {len(grammar)} characters; give at most {LONGEST}")
        matchers = library.LLMatcher
        try:
            source = (matchers.grammar_from_json_schema(grammar, JSON_FORM) if kind == "json" else
                      matchers.grammar_from_regex(grammar) if kind == "regex" else
                      matchers.grammar_from_lark(library.gbnf_to_lark.any_to_lark(grammar)))
        except Exception as error:  # any_to_lark raises no narrower kind
            raise ValueError(f"{' '.join(str(error).split())[:160]}; change that part") from None
        matcher = matchers(self.tokens, source, log_level=0,
                           limits=library.LLParserLimits(**LIMITS))
        matcher.compute_bitmask()  # some grammars exceed a limit only here
        if matcher.is_error():
            raise ValueError(f"{_one_line(matcher)}; change that part")
        return Constraint(matcher, self.vocab_size, self.compile.cache_clear)


def _one_line(matcher: Any) -> str:
    return " ".join(matcher.get_error().split())[:160]
