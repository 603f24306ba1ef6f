"""A faster encoder, tiktoken, that gives the same ids as the reference, `tokenizers`.

tiktoken is used only where the two provably agree, which takes two conditions:

- The pre-tokenizer is one of PATTERNS (tests/data/test_encoder.py checks that both regex engines
  agree on every code point there), and nothing rewrites the text before it.
- The order of merges is a function of the token that a merge forms. tiktoken joins two neighbors
  whenever their bytes are a token, lowest rank first; `tokenizers` joins only listed pairs, first
  listed first. Suppose that each token's own text is merged to that one token. Then neighbors that
  form a token can only be the last pair of that merge, because the merges inside their span are
  the same as if the span stood alone. With each token ranked by its last merge, both encoders
  therefore take the same step each time.
"""
from __future__ import annotations

import collections
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import tiktoken
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Reference

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{_WORDS}|\p{{N}}|{_REST}"
LLAMA3 = rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
CL100K = LLAMA3.replace(r"|\s*[\r\n]+", r"|\s+\z|\s*[\r\n]+")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# pattern -> llama.cpp's name
PATTERNS = {QWEN2: "qwen2", LLAMA3: "llama-bpe", GPT2: "gpt-2", CL100K: "dbrx"}

CHUNK = 1 << 22        # characters of a long text that are encoded at once; at most twice as many
LONG_TEXT = 1 << 23    # characters; from here on ids come as a buffer, slower but 9 times smaller
LONG_BLANK = 100_000   # whitespace characters in a row; both regex engines fail near a million
_BLANK = r"\t\v\f \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # \s but \r, \n
_CUT = re.compile(r"(?<=[^\W_])(?= [^\W_])|(?<=\S\n)(?=\S)|(?<=[^\W_])(?=[,.;:!?、。，；：！？])")


class FastEncoder(NamedTuple):
    """tiktoken's encoder, and the id of each of its ranks."""

    encoding: tiktoken.Encoding
    ids: np.ndarray

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text` as uint32; the names of special tokens in it are ordinary text."""
        blanks = long_blanks(text, newlines=self.encoding._pat_str == GPT2)
        return self.ids[self._encode_around(blanks, text) if blanks else self._ranks(text)]

    def _ranks(self, text: str) -> np.ndarray:
        core = self.encoding._core_bpe
        if len(text) >= LONG_TEXT:
            return np.frombuffer(core.encode_to_tiktoken_buffer(text, set()), np.uint32)
        return np.array(core.encode_ordinary(text), np.uint32)

    def _encode_around(self, blanks: list[tuple[int, int]], text: str) -> np.ndarray:
        """Ranks of a text with whitespace too long for the regex engines.

        No pattern counts whitespace beyond two characters. The text is therefore split into words
        with each long run cut down to four, and the cut whitespace is put back into its word.
        """
        short, cuts, start = "", [], 0
        for begin, end in blanks:
            short += text[start:begin + 2]
            cuts.append((len(short), text[begin + 2:end - 2]))
            start = end - 2
        short += text[start:]
        split = pre_tokenizers.Split(Regex(self.encoding._pat_str), "isolated")
        ranks: list[int] = []
        for _, (begin, end) in split.pre_tokenize_str(short):
            word = ""
            while cuts and cuts[0][0] < end:
                place, cut = cuts.pop(0)
                word += short[begin:place] + cut
                begin = place
            word += short[begin:end]
            ranks += self.encoding._core_bpe.encode_single_piece(word.encode())
        return np.array(ranks, np.uint32)


def safe_cut(text: str) -> int:
    """The last place where every supported pre-tokenizer splits `text`, whatever surrounds it.

    That is before a space between two letters or digits, after a single newline, or between a
    letter or digit and a mark like a comma, which scripts without spaces have. 0 if there is none.
    """
    for start in (max(0, len(text) - 4096), max(0, len(text) - CHUNK)):
        found = collections.deque(_CUT.finditer(text, start), maxlen=1)
        if found:
            return found[0].end()
    return 0


def chunks(text: str) -> Iterator[str]:
    """`text` in chunks of about CHUNK characters, cut at safe places as far as there are any."""
    start = 0
    while len(text) - start > 2 * CHUNK:
        cut = safe_cut(text[start:start + CHUNK])
        if not cut:
            break
        yield text[start:start + cut]
        start += cut
    yield text[start:]


def to_utf8(text: str, where: str = "text") -> bytes:
    """`text` as UTF-8. Raises ValueError, naming `where`, for half of a surrogate pair."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: character {error.start} is half of a surrogate pair "
                         f"(\\u{ord(text[error.start]):04x}), which UTF-8 cannot hold; remove it "
                         "or write both halves") from None


def long_blanks(text: str, newlines: bool = True) -> list[tuple[int, int]]:
    """Start and end of each run of whitespace that is too long for the regex engines."""
    if len(text) < LONG_BLANK:
        return []
    blank = f"[{_BLANK}\r\n]" if newlines else f"[{_BLANK}]"
    return [found.span() for found in re.finditer(f"{blank}{{{LONG_BLANK},}}", text)]


def pattern_of(description: dict[str, Any]) -> str | None:
    """The regex that splits text before merging, if the pre-tokenizer is just that, byte-level."""
    steps = description.get("pre_tokenizer") or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    *splits, last = steps
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if not splits:
        return GPT2 if last.get("use_regex", True) else None
    split = splits[0]
    plain = (len(splits) == 1 and split.get("type") == "Split" and not split.get("invert")
             and split.get("behavior") == "Isolated" and not last.get("use_regex", True))
    return split["pattern"].get("Regex") if plain else None


def byte_of_char() -> dict[str, int]:
    """The printable character with which byte-level vocabularies write each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{chr(byte): byte for byte in printable},
            **{chr(256 + index): byte for index, byte in enumerate(others)}}


def build(description: dict[str, Any]) -> tuple[FastEncoder | None, str]:
    """The fast encoder of a tokenizer.json, or None and the reason why there is none."""
    model, pattern = description["model"], pattern_of(description)
    features = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    used = [name for name in features if model.get(name)]
    if reason := f"its model uses {used[0]}" if used else cut_obstacle(description):
        return None, reason
    assert pattern is not None
    special = {token["content"] for token in description["added_tokens"]}
    vocabulary = {token: id for token, id in model["vocab"].items() if token not in special}
    order = _merge_order(vocabulary, model["merges"])
    if isinstance(order, str):
        return None, order
    chars = byte_of_char()
    ranks = {bytes(chars[char] for char in token): rank for rank, token in enumerate(order)}
    ids = np.array([vocabulary[token] for token in order], np.uint32)
    encoding = tiktoken.Encoding("fira", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return FastEncoder(encoding, ids), ""


def from_ids(ids: Mapping[bytes, int], pattern: str, special: Mapping[str, int]) -> Reference:
    """The tokenizer that splits by `pattern` and joins neighbors whose bytes are a token, lowest id
    first, as tiktoken does. Of the pairs that spell a token only the last one of its own text ever
    meets, as above; a token without it is found as a whole word (`ignore_merges`)."""
    chars = {byte: char for char, byte in byte_of_char().items()}
    names = {token: "".join(chars[byte] for byte in token)
             for token, _ in sorted(ids.items(), key=lambda item: item[1])}
    pairs = [(names[token[:at]], names[token[at:]]) for token in names
             for at in range(1, len(token)) if token[:at] in ids and token[at:] in ids]
    rank = {pair: index for index, pair in enumerate(pairs)}
    used = {_last_merge(name, rank) for name in names.values() if len(name) > 1}
    reference = Reference(models.BPE(
        {name: ids[token] for token, name in names.items()} | dict(special),
        [pairs[index] for index in sorted(used - {len(pairs)})], ignore_merges=len(pairs) in used))
    reference.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"),
         pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    reference.decoder = decoders.ByteLevel()
    reference.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    return reference


def cut_obstacle(description: dict[str, Any]) -> str:
    """Why text cannot be cut at `safe_cut` without changing ids; "" if it can."""
    if pattern_of(description) not in PATTERNS:
        return "its pre-tokenizer is not one of " + ", ".join(PATTERNS.values())
    if description.get("normalizer"):
        return "it has a normalizer"
    if any(not token["special"] for token in description["added_tokens"]):
        return "it has added tokens that ordinary text may contain"
    return ""


def _merge_order(vocabulary: dict[str, int], merges: list) -> list[str] | str:
    """Tokens by the last merge that forms them, single bytes first; or why there is no order."""
    pairs = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]
    rank = {pair: index for index, pair in reversed(list(enumerate(pairs)))}
    makers: dict[str, list[int]] = {}
    for pair, index in rank.items():
        makers.setdefault(pair[0] + pair[1], []).append(index)
    model = {"type": "BPE", "vocab": vocabulary, "merges": pairs}
    only_model = Reference.from_str(json.dumps({"version": "1.0", "added_tokens": [],
                                                "model": model})).model
    last: dict[str, int] = {}
    for token in vocabulary:
        if len(token) == 1:
            last[token] = -1
            continue
        if len(only_model.tokenize(token)) != 1:
            return f"its token {token!r} is not reached by its merges"
        last[token] = makers[token][0] if len(makers[token]) == 1 else _last_merge(token, rank)
    return sorted(vocabulary, key=lambda token: (last[token], vocabulary[token]))


def _last_merge(token: str, rank: dict[tuple[str, str], int]) -> int:
    """Which merge comes last when `token` alone is merged, by plain byte-pair encoding; the number
    of merges if they do not reach it."""
    parts, used = list(token), -1
    while len(parts) > 1 and used < len(rank):
        found = [rank.get(pair, len(rank)) for pair in itertools.pairwise(parts)]
        used = min(found)
        at = found.index(used)
        parts[at:at + 2] = [parts[at] + parts[at + 1]]
    return used
