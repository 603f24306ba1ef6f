r"""What a tokenizer.json from elsewhere may ask for: work that grows as the text does, no faster.

A regular expression can take quadratic time (`a*b` on a long run of a) or exponential, and a
normalizer can write a thousand letters for each one. So few steps are accepted, of known types that
lengthen a text by a constant factor, and regular expressions whose alternatives have these forms:

- up to four bounded items, then perhaps an unbounded one, and after it only items that may be
  absent, so that a run that was read is never given back: ` ?[^\s\p{L}\p{N}]+[\r\n]*`;
- `A*B+` where the next alternative is the same with `A+B*`, which takes the run if this one fails;
- `\s*[\r\n]+`, `\s+(?!\S)` or `\s+$` where such a form or `\s+` comes next, which takes the run.
"""
from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Reference

from fira.files import read_json

MOST_BYTES = 1 << 27  # of a tokenizer.json; those with 260,000 tokens have a quarter of it
MOST_TOKENS = 1 << 20
MOST_PARTS = 64       # JSON objects in a normalizer, pre-tokenizer, post-processor or decoder
TYPES = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Strip", "Replace", "Prepend",
         "ByteLevel", "Digits", "Punctuation", "Split", "Whitespace", "WhitespaceSplit",
         "Metaspace", "ByteFallback", "Fuse", "Sequence", "TemplateProcessing", "RobertaProcessing"}
_SET = r"\[\^?(?:[^\[\]\\]|\\.|\[\^?(?:[^\[\]\\]|\\.)+\])+\]"
_ITEM = rf"(?:\\[pP]\{{\^?\w+\}}|\\[sSdDwWrnt]|\\[^\w\s]|{_SET}|[^\\()\[\]{{}}.*+?|^$])"
_WORDS = r"(?:\((?:\?i?:)?[^\\(){}.*+?^$]+\))"
_BOUNDED = rf"(?:(?:{_ITEM}|{_WORDS})(?:\?|\{{[1-4](?:,[1-4])?\}})?){{0,4}}"
_LINEAR = rf"{_BOUNDED}(?:{_ITEM}[+*](?:{_ITEM}[?*]|{_WORDS}\?)*)?"
_PAIR = rf"({_BOUNDED}{_ITEM})\*({_ITEM})\+((?:{_WORDS}\?)?)\|\1\+\2\*\3"
_BLANK = r"\\s(?:\*\[\\r\\n\]\+?|\+(?:\(\?!\\S\)|\\z|\$))(?=\|\\s(?:\+(?:\||\Z|\(|\\z|\$)|\*\[))"
_REGEX = re.compile(rf"(?:(?:^|\|)(?:{_PAIR}|{_BLANK}|{_LINEAR})(?=\||\Z))+")


def read(file: Path) -> Reference:
    """The tokenizer in a tokenizer.json. Raises ValueError, one line, if it is not as stated above,
    or not a tokenizer."""
    description = read_json(file, "give one written by fira or the tokenizers library", MOST_BYTES)
    if isinstance(description.get("vocab"), list):
        raise ValueError(f"{file} is a tekken file, which FIRA does not read; give the "
                         "tokenizer.json of the same model")
    largest = 0
    with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):  # the library says
        largest = max(description["model"]["vocab"].values())
    if largest >= MOST_TOKENS:
        raise ValueError(f"{file}: id {largest} is above the {MOST_TOKENS:,} tokens that a model "
                         "can have; use another tokenizer")
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if reason := _obstacle(description.get(part)):
            raise ValueError(f"{file}: its {part} has {reason}; FIRA reads no tokenizer whose work "
                             "can grow faster than the text, use another one")
    try:
        return Reference.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{file} is not a tokenizer.json ({str(error).splitlines()[0]}); give "
                         "the tokenizer.json of a byte-level BPE") from None


def _obstacle(part: Any) -> str:
    """Why a part of a tokenizer.json is not accepted; "" if it is."""
    inner, objects = [part], list[dict[str, Any]]()
    while inner:
        if isinstance(value := inner.pop(), dict):
            objects.append(value)
            inner += value.values()
        elif isinstance(value, list):
            inner += value
    kinds = [str(one["type"]) for one in objects if "type" in one]
    if unknown := sorted(set(kinds) - TYPES):
        return f"a step of type {unknown[0]:.40}, which is not one of {', '.join(sorted(TYPES))}"
    if len(objects) > MOST_PARTS or kinds.count("ByteLevel") > 1:
        return f"more than {MOST_PARTS} parts, or ByteLevel twice"
    for one in objects:
        if not is_linear(str(one.get("Regex", ""))):
            return f"the pattern {one['Regex']!r:.120}, which is not of a form whose time is linear"
        pattern = one.get("pattern")
        word = str(pattern.get("String", "")) if isinstance(pattern, dict) else ""
        if len(str(one.get("content", ""))) > max(1, len(word)) or len(str(one.get("prepend"))) > 8:
            return "a step that makes the text longer"
    return ""


def is_linear(regex: str) -> bool:
    """Whether the time of a regular expression is linear in the text, by its form."""
    return len(regex) <= 10_000 and regex.count("|") < 64 and _REGEX.fullmatch(regex) is not None
