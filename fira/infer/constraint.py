"""Constraints on generated text: which tokens may come next, so that a text follows a grammar.

A constraint is compiled once; each request then has a state of its own. `llguidance` compiles JSON
schemas, regular expressions and context-free grammars, and computes the tokens that a state allows.
"""
from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
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


class Constraint:
    """A compiled grammar. `start` gives the state of one request."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self.matcher, self.vocab_size = matcher, vocab_size

    def start(self) -> State:
        return State(self.matcher.deep_copy(), self.vocab_size)


class State:
    """How much of a grammar one request has written."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self.matcher, self.vocab_size = matcher, vocab_size

    def allowed(self, ends: Iterable[int]) -> Tensor:
        """Whether each token may come next, [V]; `ends` may where the text may end.

        Raises ValueError if the grammar became too complex for its limits.
        """
        bits = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
        if self.matcher.is_error():
            raise ValueError(f"the grammar fails on this text ({one_line(self.matcher.get_error())}"
                             "); use a simpler one")
        allowed_V = torch.from_numpy(np.unpackbits(bits, count=self.vocab_size,
                                                   bitorder="little").view(bool))
        allowed_V[[*ends]] = self.matcher.is_accepting()
        return allowed_V

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
            from llguidance import LLTokenizer
        except ImportError:
            raise ValueError("constraints need the package llguidance; install it with: "
                             "pip install 'fira-moe[serve]'") from None
        self.vocab_size, names = vocab_size, tokenizer.token_bytes()
        names += [b""] * (vocab_size - len(names))
        self.eos_token_id, self.bos_token_id = tokenizer.end_of_text, None
        self.special_token_ids = [id for id in tokenizer.added.values() if not names[id]]
        for name, id in tokenizer.added.items():
            names[id] = name.encode()
        self.tokens, self.is_tokenizer_wrapper = names, True  # what LLTokenizer reads
        self.encode = tokenizer.encode
        this: Any = self
        self.tokenizer = LLTokenizer(this, n_vocab=vocab_size)
        self.compile = functools.lru_cache(64)(self._compile)

    def __call__(self, text: str | bytes) -> list[int]:
        """LLTokenizer's way to encode text."""
        return self.encode(text if isinstance(text, str) else text.decode())

    def _compile(self, kind: str, grammar: str) -> Constraint:
        """`kind`: json (a schema), regex, or grammar (Lark's or llama.cpp's GBNF).

        Raises ValueError, one line, for what cannot be compiled within llguidance's limits.
        """
        from llguidance import LLMatcher, LLParserLimits
        from llguidance.gbnf_to_lark import any_to_lark

        if len(grammar) > LONGEST:
            raise ValueError(f"it has {len(grammar)} characters; give at most {LONGEST}")
        try:
            if kind == "json":
                source = LLMatcher.grammar_from_json_schema(grammar, JSON_FORM)
            elif kind == "regex":
                source = LLMatcher.grammar_from_regex(grammar)
            else:
                source = LLMatcher.grammar_from_lark(any_to_lark(grammar))
        except Exception as error:  # any_to_lark raises no narrower kind
            raise ValueError(f"{one_line(str(error))}; change that part") from None
        matcher = LLMatcher(self.tokenizer, source, log_level=0,
                            limits=LLParserLimits(**LIMITS))
        matcher.compute_bitmask()  # some grammars exceed a limit only here
        if matcher.is_error():
            raise ValueError(f"{one_line(matcher.get_error())}; change that part")
        return Constraint(matcher, self.vocab_size)


def one_line(text: str) -> str:
    """The first 160 characters of an error."""
    return " ".join(text.split())[:160]


def choices(texts: Sequence[str]) -> str:
    """The grammar of one of these texts."""
    return "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
