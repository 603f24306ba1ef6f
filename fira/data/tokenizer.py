"""Byte-level BPE: text to ids and back without loss, kept in the standard tokenizer.json.

Vocabulary, in order of ids: the 256 bytes, the merges as they were learned, then the special
tokens (SPECIAL) as the last ids, so that ordinary ids do not move when special ones are added.
The pre-tokenizer is Qwen2's, which llama.cpp implements under the name "qwen2".
"""
from __future__ import annotations

import copy
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Reference

from fira.data import fast
from fira.data.text import pieces

END_OF_TEXT, PAD, TURN_START, TURN_END = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"
SPECIAL = (END_OF_TEXT, PAD, TURN_START, TURN_END, "<think>", "</think>", "<tool_call>",
           "</tool_call>", "<tool_response>", "</tool_response>",
           *(f"<|reserved_{number}|>" for number in range(22)))
CHAT_TEMPLATE = (  # ChatML; fira/data/chat.py gives the same ids
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<|im_end|>")  # of tokenizers made elsewhere
WORD = 10_000  # characters
_ENDLESS = re.compile(rf"\S{{{WORD},}}|\s{{{WORD},}}")


class Tokenizer:
    """A tokenizer.json and what FIRA asks of it."""

    def __init__(self, reference: Reference, settings: dict[str, Any] | None = None):
        reference.no_padding()
        reference.no_truncation()
        self.reference = reference
        self.description: dict[str, Any] = json.loads(reference.to_str())
        _check_byte_level(self.description)
        self.settings = settings if settings is not None else _settings(self.added_names())
        self.vocab_size = 1 + max(reference.get_vocab(with_added_tokens=True).values())

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """From a folder that holds tokenizer.json, or from such a file."""
        file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise ValueError(f"{file} does not exist; train one with: fira tokenizer train "
                             "SOURCE --out FOLDER")
        try:
            reference = Reference.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{file} is not a tokenizer.json ({str(error).splitlines()[0]}); "
                             "give one written by fira or the tokenizers library") from None
        config = file.with_name("tokenizer_config.json")
        settings = _read_settings(config) if config.is_file() else None
        try:
            return cls(reference, settings)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, as transformers reads them."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        files = {"tokenizer.json": self.reference.to_str(pretty=True),
                 "tokenizer_config.json": json.dumps(self.settings, indent=2, ensure_ascii=False)}
        for name, text in files.items():
            (Path(folder) / name).write_text(text + "\n", encoding="utf-8")

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Ids of `text`. Special tokens' names in it count as ordinary text, unless allowed."""
        if not allow_special:
            return self.encode_array(text).tolist()
        _check_text(text)
        return self.reference.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def encode_array(self, text: str) -> np.ndarray:
        """`encode` as a uint32 array; long texts in pieces, so that memory stays near theirs."""
        _check_text(text)
        if not self.cuts:
            return self._encode_piece(text)
        return np.concatenate([self._encode_piece(piece) for piece in pieces(text)])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, special tokens by name; bytes that are not UTF-8 become U+FFFD."""
        return self.reference.decode([int(id) for id in ids], skip_special_tokens=False)

    def special(self, name: str) -> int:
        """The id of a special token. Raises ValueError if the tokenizer has none of that name."""
        for token in self.description["added_tokens"]:
            if token["content"] == name:
                return token["id"]
        raise ValueError(f"the tokenizer has no special token {name}; use one trained by "
                         "fira tokenizer train, or one that has it")

    @functools.cached_property
    def end_of_text(self) -> int:
        """The id that separates documents and ends generation."""
        named = self.settings.get("eos_token")
        named = named["content"] if isinstance(named, dict) else named
        for name in (END_OF_TEXT, named, *_ENDS):
            if name in self.added_names():
                return self.special(name)
        raise ValueError("the tokenizer has no end-of-text token; add one named "
                         f"{END_OF_TEXT} to its added_tokens")

    def token_bytes(self) -> list[bytes]:
        """The bytes each id stands for; b"" for special tokens and unused ids."""
        chars = fast.byte_of_char()
        found = [b""] * self.vocab_size
        for token, id in self.description["model"]["vocab"].items():
            if all(char in chars for char in token):
                found[id] = bytes(chars[char] for char in token)
        for token in self.description["added_tokens"]:
            found[token["id"]] = b"" if token["special"] else token["content"].encode()
        return found

    @functools.cached_property
    def hash(self) -> str:
        """Hex digest of all that decides which ids a text gets, however the file is written."""
        described = {key: self.description.get(key)
                     for key in ("model", "normalizer", "pre_tokenizer", "added_tokens")}
        text = json.dumps(_significant(described), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    @functools.cached_property
    def cuts(self) -> bool:
        """May text be cut at `safe_cut` without changing ids?"""
        known = fast.pattern_of(self.description) in fast.PATTERNS
        return known and not self.description.get("normalizer") and all(
            token["special"] for token in self.description["added_tokens"])

    @property
    def fast_reason(self) -> str:
        """Why ids come from `tokenizers`, not from the faster tiktoken; "" if they do not."""
        return self._fast[1]

    @functools.cached_property
    def _fast(self) -> tuple[fast.Fast | None, str]:
        return fast.build(self.description)

    @functools.cached_property
    def _plain(self) -> Reference:
        """The reference, knowing no special tokens: their names are text like any other."""
        bare = copy.deepcopy(self.description)
        bare["added_tokens"] = [token for token in bare["added_tokens"] if not token["special"]]
        bare["post_processor"] = None
        return Reference.from_str(json.dumps(bare))

    def _encode_piece(self, text: str) -> np.ndarray:
        quick = self._fast[0]
        if quick:
            return quick.encode(text)
        return np.array(self._plain.encode(text, add_special_tokens=False).ids, np.uint32)

    def added_names(self) -> set[str]:
        """Names of the tokens beside the vocabulary, the special ones among them."""
        return {token["content"] for token in self.description["added_tokens"]}


def train_tokenizer(documents: Iterable[str], vocab_size: int = 50304,
                    max_bytes: int | None = None) -> Tokenizer:
    """Learn a byte-level BPE of exactly `vocab_size` tokens from the first `max_bytes` of text.

    Raises ValueError for an empty text, a size below the bytes and special tokens, or one that
    the text cannot fill.
    """
    smallest = 256 + len(SPECIAL)
    if vocab_size < smallest:
        raise ValueError(f"vocabulary of {vocab_size} is too small: 256 bytes and {len(SPECIAL)} "
                         f"special tokens need {smallest}; give {smallest} or more")
    reference = _untrained()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(SPECIAL), show_progress=False,
                                  min_frequency=2,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    text = _Taken(documents, max_bytes)
    reference.train_from_iterator(text, trainer)
    if not text.bytes:
        raise ValueError("the sources hold no text to learn a tokenizer from; give files with text")
    largest = reference.get_vocab_size() + len(SPECIAL)
    if largest < vocab_size:
        raise ValueError(f"vocabulary of {vocab_size} is larger than this text supports: its "
                         f"{text.bytes:,} bytes give at most {largest} tokens; give {largest} or "
                         "less, or more text")
    reference.add_special_tokens([AddedToken(name, normalized=False) for name in SPECIAL])
    return Tokenizer(reference)


class _Taken:
    """Iterate over documents until `max_bytes` of text, counting them."""

    def __init__(self, documents: Iterable[str], max_bytes: int | None):
        self.documents, self.max_bytes, self.bytes = documents, max_bytes, 0

    def __iter__(self) -> Iterator[str]:
        for text in self.documents:
            self.bytes += len(_check_text(text))
            for piece in pieces(text):
                yield from _short_words(piece)
            if self.max_bytes is not None and self.bytes >= self.max_bytes:
                return


def _short_words(text: str) -> Iterator[str]:
    """`text`, rows of letters or of blanks without end cut up: the trainer's time for a word grows
    with the square of its length."""
    start = 0
    for found in _ENDLESS.finditer(text):
        yield text[start:found.start()]
        for start in range(found.start(), found.end(), WORD):
            yield text[start:min(start + WORD, found.end())]
        start = found.end()
    yield text[start:]


def _untrained() -> Reference:
    reference = Reference(models.BPE())
    split = pre_tokenizers.Split(Regex(fast.QWEN2), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    reference.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    reference.decoder = decoders.ByteLevel()
    return reference


def _check_text(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} is half of a surrogate pair "
                         f"(\\u{ord(text[error.start]):04x}) and no text; remove it") from None


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is not valid JSON of settings; copy it again, or delete it to "
                         "take FIRA's own") from None
    return settings


def _check_byte_level(description: dict[str, Any]) -> None:
    model = description["model"]
    if model.get("type", "BPE") != "BPE" or not set(fast.byte_of_char()) <= set(model["vocab"]):
        raise ValueError(f"{model.get('type')} model without a token for each of the 256 bytes; "
                         "FIRA needs byte-level BPE, like GPT-2's or one trained by fira")


def _settings(names: set[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast",
                                "clean_up_tokenization_spaces": False}
    for key, name in (("bos_token", None), ("eos_token", END_OF_TEXT), ("pad_token", PAD)):
        settings[key] = name if name in names else None
    if TURN_START in names:
        settings["chat_template"] = CHAT_TEMPLATE
    return settings


def _significant(value: Any) -> Any:
    """Without what is off or absent: a key that a later library version adds changes no hash."""
    if isinstance(value, dict):
        kept = {key: _significant(inner) for key, inner in value.items() if key != "trim_offsets"}
        return {key: inner for key, inner in kept.items()
                if inner is not None and inner is not False and inner != ""}
    return [_significant(inner) for inner in value] if isinstance(value, list) else value
