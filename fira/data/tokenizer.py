"""Byte-level BPE: text to ids and back without loss, kept in the standard tokenizer.json.

The vocabulary, in order of ids, is: the 256 bytes, the merges as they were learned, and the special
tokens (SPECIAL). Special tokens are last so that adding some does not change ordinary ids.
The pre-tokenizer is Qwen2's, which llama.cpp implements under the name "qwen2".
"""
from __future__ import annotations

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

from fira.data import bounds, encoder
from fira.data.encoder import chunks, to_utf8
from fira.files import read_json, write_json, write_text

END_OF_TEXT, PAD, TURN_START, TURN_END = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"
SPECIAL = (END_OF_TEXT, PAD, TURN_START, TURN_END, "<think>", "</think>", "<tool_call>",
           "</tool_call>", "<tool_response>", "</tool_response>",
           *(f"<|reserved_{number}|>" for number in range(22)))
CHAT_TEMPLATE = (  # ChatML; fira/data/chat.py gives the same ids
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
FILES = ("tokenizer.json", "tokenizer_config.json")
_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<|im_end|>")  # names that other tokenizers use
LONGEST_WORD = 10_000  # characters; the trainer's time for a word grows with its length squared
_LONG_WORD = re.compile(rf"\S{{{LONGEST_WORD},}}|\s{{{LONGEST_WORD},}}")


class Tokenizer:
    """A byte-level BPE tokenizer.json with the settings that transformers keeps beside it."""

    def __init__(self, reference: Reference, settings: dict[str, Any] | None = None):
        reference.no_padding()
        reference.no_truncation()
        self.reference = reference
        self.description: dict[str, Any] = json.loads(reference.to_str())
        _check_byte_level(self.description)
        self.added: dict[str, int] = {token["content"]: token["id"]  # special tokens among them
                                      for token in self.description["added_tokens"]}
        self.settings = settings if settings is not None else _settings(self.added)
        self.vocab_size = 1 + max(*self.description["model"]["vocab"].values(),
                                  *self.added.values())

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a tokenizer.json, or the one in a folder. Raises ValueError if it is unusable."""
        file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise ValueError(f"{file} does not exist; train one with: fira tokenizer train "
                             "SOURCE --out FOLDER")
        try:
            reference = bounds.read(file)
        except ValueError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{file} is not a tokenizer.json ({str(error).splitlines()[0]}); "
                             "give one written by fira or the tokenizers library") from None
        beside = file.with_name("tokenizer_config.json")
        settings = read_json(beside, "copy it again, or delete it to use the settings that fira "
                             "writes") if beside.is_file() else None
        try:
            return cls(reference, settings)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json in the form that transformers reads."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_text(Path(folder) / "tokenizer.json", self.reference.to_str(pretty=True) + "\n")
        write_json(Path(folder) / "tokenizer_config.json", self.settings)

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Ids of `text`. Names of special tokens in it are ordinary text unless allowed."""
        if not allow_special:
            return self.encode_array(text).tolist()
        to_utf8(text)
        return self.reference.encode(text, add_special_tokens=False).ids

    def encode_array(self, text: str) -> np.ndarray:
        """`encode` as a uint32 array; a long text is cut into chunks, which bounds the memory."""
        to_utf8(text)
        parts = chunks(text) if self.can_cut else [text]
        return np.concatenate([self._encode_chunk(part) for part in parts])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, special tokens by name; bytes that are not UTF-8 become U+FFFD."""
        return self.reference.decode([int(id) for id in ids], skip_special_tokens=False)

    def special(self, name: str) -> int:
        """The id of a special token. Raises ValueError if the tokenizer has none of that name."""
        if name not in self.added:
            raise ValueError(f"the tokenizer has no special token {name}; use one trained by "
                             "fira tokenizer train, or one that has it")
        return self.added[name]

    @functools.cached_property
    def end_of_text(self) -> int:
        """The id that separates documents and ends generation."""
        named = self.settings.get("eos_token")
        named = named.get("content") if isinstance(named, dict) else named
        for name in (END_OF_TEXT, str(named), *_ENDS):
            if name in self.added:
                return self.added[name]
        raise ValueError("the tokenizer has no end-of-text token; add one named "
                         f"{END_OF_TEXT} to its added_tokens")

    def token_bytes(self) -> list[bytes]:
        """The bytes that each id stands for; b"" for special tokens and unused ids."""
        byte_of_char = encoder.byte_of_char()
        found = [b""] * self.vocab_size
        for token, id in self.description["model"]["vocab"].items():
            if byte_of_char.keys() >= set(token):
                found[id] = bytes(byte_of_char[char] for char in token)
        for token in self.description["added_tokens"]:
            found[token["id"]] = b"" if token["special"] else token["content"].encode()
        return found

    @functools.cached_property
    def hash(self) -> str:
        """Hex digest of everything that decides the ids of a text, however the file is written."""
        described = {key: self.description.get(key)
                     for key in ("model", "normalizer", "pre_tokenizer", "added_tokens")}
        text = json.dumps(_significant(described), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    @functools.cached_property
    def can_cut(self) -> bool:
        """Whether text can be cut at `safe_cut` without changing ids."""
        return not encoder.cut_obstacle(self.description)

    @property
    def slow_reason(self) -> str:
        """Why ids come from `tokenizers` and not from the faster tiktoken; "" if they do not."""
        return self._fast[1]

    @functools.cached_property
    def _fast(self) -> tuple[encoder.FastEncoder | None, str]:
        return encoder.build(self.description)

    @functools.cached_property
    def _plain(self) -> Reference:
        """The reference without special tokens: their names are ordinary text to it."""
        added = [token for token in self.description["added_tokens"] if not token["special"]]
        bare = self.description | {"added_tokens": added, "post_processor": None}
        return Reference.from_str(json.dumps(bare))

    def _encode_chunk(self, text: str) -> np.ndarray:
        fast = self._fast[0]
        if fast:
            return fast.encode(text)
        return np.array(self._plain.encode(text, add_special_tokens=False).ids, np.uint32)


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
    reference = Reference(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    reference.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(encoder.QWEN2), "isolated"), byte_level])
    reference.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(SPECIAL), show_progress=False,
                                  min_frequency=2,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    reference.train_from_iterator(_training_text(documents, max_bytes), trainer)
    largest = reference.get_vocab_size() + len(SPECIAL)
    if largest < vocab_size:
        raise ValueError(f"vocabulary of {vocab_size} is larger than this text supports: it gives "
                         f"at most {largest} tokens; give {largest} or less, or more text")
    reference.add_special_tokens([AddedToken(name, normalized=False) for name in SPECIAL])
    return Tokenizer(reference)


def _training_text(documents: Iterable[str], max_bytes: int | None) -> Iterator[str]:
    """The text of the documents until it has `max_bytes`."""
    size = 0
    for text in documents:
        size += len(to_utf8(text))
        for chunk in chunks(text):
            yield from _cut_long_words(chunk)
        if max_bytes is not None and size >= max_bytes:
            return
    if not size:
        raise ValueError("the sources hold no text to learn a tokenizer from; give files with text")


def _cut_long_words(text: str) -> Iterator[str]:
    """`text` in parts such that no run of whitespace, or of anything else, is a very long word."""
    start = 0
    for found in _LONG_WORD.finditer(text):
        yield text[start:found.start()]
        for start in range(found.start(), found.end(), LONGEST_WORD):
            yield text[start:min(start + LONGEST_WORD, found.end())]
        start = found.end()
    yield text[start:]


def _settings(names: Iterable[str]) -> dict[str, Any]:
    """The settings for transformers of a tokenizer that has none, by its special tokens."""
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast",
                                "clean_up_tokenization_spaces": False, "bos_token": None,
                                "eos_token": END_OF_TEXT if END_OF_TEXT in names else None,
                                "pad_token": PAD if PAD in names else None}
    if TURN_START in names:
        settings["chat_template"] = CHAT_TEMPLATE
    return settings


def _check_byte_level(description: dict[str, Any]) -> None:
    kind, vocabulary = description["model"].get("type", "BPE"), description["model"]["vocab"]
    if kind != "BPE" or not set(encoder.byte_of_char()) <= set(vocabulary):
        raise ValueError(f"{kind} model without a token for each of the 256 bytes; "
                         "FIRA needs byte-level BPE, like GPT-2's or one trained by fira")


def _significant(value: Any) -> Any:
    """`value` without unset keys, so that a key added by a later library changes no hash."""
    if isinstance(value, dict):
        kept = {key: _significant(inner) for key, inner in value.items() if key != "trim_offsets"}
        return {key: inner for key, inner in kept.items()
                if inner is not None and inner is not False and inner != ""}
    return [_significant(inner) for inner in value] if isinstance(value, list) else value
