"""Byte-level BPE: text to ids and back without loss, kept in the standard tokenizer.json.

The vocabulary, in order of ids, is: the 256 bytes, the merges as they were learned, and the special
tokens (SPECIAL). Special tokens are last so that adding some does not change ordinary ids.
The pre-tokenizer is Qwen2's, which llama.cpp implements under the name "qwen2".
"""
from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken
from tokenizers import Tokenizer as Reference

from fira.data import bounds, encoder
from fira.data.encoder import chunks, to_utf8
from fira.files import inside, read_json, write_json, write_text

END_OF_TEXT, PAD, TURN_START, TURN_END = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"
SPECIAL = (END_OF_TEXT, PAD, TURN_START, TURN_END, "<think>", "</think>", "<tool_call>",
           "</tool_call>", "<tool_response>", "</tool_response>",
           *(f"<|reserved_{number}|>" for number in range(22)))
THINK, THINK_END, CALL, CALL_END, RESPONSE, RESPONSE_END = SPECIAL[4:10]
# Tools stand in the system message in Qwen3's own words: programs made for Qwen3 know them.
TOOLS_HEAD = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are "
    "provided with function signatures within <tools></tools> XML tags:\n<tools>\n")
TOOLS_TAIL = (
    "</tools>\n\nFor each function call, return a json object with function name and arguments "
    f"within {CALL}{CALL_END} XML tags:\n{CALL}\n"
    f'{{"name": <function-name>, "arguments": <args-json-object>}}\n{CALL_END}')
CHAT_TEMPLATE = (  # ChatML with Qwen3's form of tools; fira/data/chat.py gives the same ids
    "{% if tools %}<|im_start|>system\n{% if messages[0]['role'] == 'system' %}"
    "{{ messages[0]['content'] + '\n\n' }}{% endif %}" + TOOLS_HEAD +
    "{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}" + TOOLS_TAIL + "<|im_end|>\n"
    "{% endif %}{% set last = namespace(user=-1) %}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
    "{% for message in messages %}{% if message['role'] == 'tool' %}"
    "{% if loop.first or messages[loop.index0 - 1]['role'] != 'tool' %}<|im_start|>user{% endif %}"
    "{{ '\n<tool_response>\n' + message['content'] + '\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1]['role'] != 'tool' %}<|im_end|>\n{% endif %}"
    "{% elif not (tools and loop.first and message['role'] == 'system') %}"
    "<|im_start|>{{ message['role'] }}\n{% set content = message['content'] or '' %}"
    "{% if message['role'] == 'assistant' and loop.index0 > last.user "
    "and message['reasoning_content'] is string %}"
    "{% set content = content.lstrip('\n') %}"
    "{{ '<think>\n' + message['reasoning_content'].strip('\n') + '\n</think>\n\n' }}{% endif %}"
    "{{ content }}{% for call in message['tool_calls'] or [] %}"
    "{% if content or not loop.first %}{{ '\n' }}{% endif %}"
    "{% set call = call['function'] or call %}"
    "{{ '<tool_call>\n{\"name\": \"' + call['name'] + '\", \"arguments\": ' }}"
    "{{ call['arguments'] if call['arguments'] is string else call['arguments'] | tojson }}"
    "{{ '}\n</tool_call>' }}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
DIRECT = (  # after it in the template of a model that thinks: an empty thought, if asked for
    "{% if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}"
    f"{{{{ '{THINK}\n\n{THINK_END}\n\n' }}}}{{% endif %}}")
FILES = ("tokenizer.json", "tokenizer_config.json")
INPUTS = {"model_input_names": ["input_ids", "attention_mask"]}  # transformers 4 would add others
KNOWN = {  # vocabularies without a pattern, by a hash of their ids: pattern, and special tokens
    "3720a44527b7": (encoder.GPT2, {END_OF_TEXT: 50256}),  # GPT-2, r50k_base
    "f11a467d8170": (encoder.GPT2, {END_OF_TEXT: 50256}),  # p50k_base
    "44eb29a02c00": (encoder.CL100K, {"<|unused|>": 100256, END_OF_TEXT: 100257}),  # cl100k_base
    "772db41d64c0": (encoder.LLAMA3, {"<|begin_of_text|>": 128000, "<|end_of_text|>": 128001}),
    "dd17cdae09d3": (encoder.QWEN2, {END_OF_TEXT: 151643}),  # Qwen
}
_IDS = ("vocab.json", "encoder.json")  # files of ids alone
_ENDS = ("endoftext", "/s", "eos", "endofsentence", "eot", "imend")  # letters of others' names
_PROBE = "A \ufb01  e\u0301 \uff21"  # capitals, two spaces, characters that have another form
LONGEST_WORD = 128  # characters; longer words take the trainer longer, shorter ones lose merges
BYTES_PER_MERGE = 100  # a vocabulary larger than that for its text has tokens that occur once
_LONG_WORD = re.compile(rf"(\S{{{LONGEST_WORD}}}|\s{{{LONGEST_WORD}}})")


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
        self.settings = (_settings(self.added) if settings is None else settings) | INPUTS
        self.vocab_size = 1 + max(*self.description["model"]["vocab"].values(),
                                  *self.added.values())

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a tokenizer.json, or ids of KNOWN: GPT-2's vocab.json, a rank file of tiktoken. Of a
        folder the first of them is read. Raises ValueError if it is unusable."""
        file = Path(path)
        if file.is_dir():
            names = ("tokenizer.json", *_IDS, "tokenizer.model")
            file = next((file / name for name in names if (file / name).is_file()), file / names[0])
        if not file.is_file():
            raise ValueError(f"{file} does not exist; train one with: fira tokenizer train "
                             "SOURCE --out FOLDER")
        is_ids = file.suffix != ".json" or file.name in _IDS
        reference = _read_ids(file) if is_ids else bounds.read(file)
        beside = file.with_name("tokenizer_config.json")
        settings = read_json(beside, "copy it again, or delete it to use the settings that fira "
                             "writes") if beside.is_file() else None
        try:
            tokenizer = cls(reference, settings)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        template = inside(file.parent, "chat_template.jinja")  # it outranks the settings' own
        if template.is_file():
            tokenizer.settings["chat_template"] = template.read_text("utf-8", "backslashreplace")
        return tokenizer

    def save(self, folder: str | Path, **settings: Any) -> None:
        """Write tokenizer.json and tokenizer_config.json in the form that transformers reads;
        `settings` replace the tokenizer's own."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_text(Path(folder) / "tokenizer.json", self.reference.to_str(pretty=True) + "\n")
        write_json(Path(folder) / "tokenizer_config.json", self.settings | settings)

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
        """The id that separates documents and ends generation. Raises ValueError if no special
        token is known to do that."""
        named = self.settings.get("eos_token")
        named = named.get("content") if isinstance(named, dict) else named
        known = {re.sub("[^a-z/]", "", name.lower()): name for name in reversed(self.added)}
        for name in (END_OF_TEXT, str(named), *(known.get(end) for end in _ENDS)):
            if name in self.added:
                return self.added[name]
        raise ValueError("no token is known to end a document; name one of the special tokens ("
                         f"{', '.join([*self.added][:20]) or 'none: add one with tokenizers'}) in "
                         'tokenizer_config.json beside tokenizer.json: {"eos_token": "NAME"}')

    @functools.cached_property
    def rewrites(self) -> str:
        """What encoding makes of some text that this tokenizer changes; "" if it keeps all text."""
        table = self.token_bytes()
        found = b"".join(table[id] for id in self.encode(_PROBE)).decode("utf-8", "replace")
        return "" if found == _PROBE else f"{_PROBE!r} becomes {found!r}"

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
    """Learn a byte-level BPE of `vocab_size` tokens from the first `max_bytes` of text.

    Text of fewer than BYTES_PER_MERGE bytes per merge gives a smaller vocabulary. Raises ValueError
    for an empty text, or a size below the bytes and special tokens.
    """
    smallest, seen = 256 + len(SPECIAL), 0
    if vocab_size < smallest:
        raise ValueError(f"vocabulary of {vocab_size} is too small: 256 bytes and {len(SPECIAL)} "
                         f"special tokens need {smallest}; give {smallest} or more")

    def text() -> Iterator[str]:
        nonlocal seen
        for document in documents:
            seen += len(to_utf8(document))
            for chunk in chunks(document):
                yield from _LONG_WORD.split(chunk)
            if max_bytes is not None and seen >= max_bytes:
                return

    import rustbpe  # needed for training only

    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(text(), vocab_size - len(SPECIAL), pattern=encoder.QWEN2)
    if not seen:
        raise ValueError("the sources hold no text to learn a tokenizer from; give files with text")
    learned = [bytes(token) for token, _ in trainer.get_mergeable_ranks()]
    tokens = [bytes([byte]) for byte in encoder.byte_of_char().values()]
    tokens += learned[256:256 + seen // BYTES_PER_MERGE]
    reference = encoder.from_ids({token: id for id, token in enumerate(tokens)}, encoder.QWEN2, {})
    reference.add_special_tokens([AddedToken(name, normalized=False) for name in SPECIAL])
    return Tokenizer(reference)


def _read_ids(file: Path) -> Reference:
    """The tokenizer of a file that holds ids alone. Raises ValueError if it is not of KNOWN."""
    remedy = "give the tokenizer.json of a byte-level BPE"
    ids: dict[bytes, int] = {}
    with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):  # then it is unknown
        if file.suffix == ".json":
            named, byte = read_json(file, remedy, bounds.MOST_BYTES), encoder.byte_of_char()
            ids = {bytes(map(byte.__getitem__, name)): id
                   for name, id in named.items() if name != END_OF_TEXT}
        else:
            lines = (line.split() for line in file.read_bytes().splitlines())
            ids = {base64.b64decode(token): int(rank) for token, rank in lines}
    digest = hashlib.sha256(repr(sorted(ids.items())).encode()).hexdigest()[:12]
    if digest not in KNOWN:
        raise ValueError(f"{file} holds none of the vocabularies without a pattern that FIRA knows "
                         f"(of GPT-2, p50k_base, cl100k_base, Llama 3, Qwen); {remedy}")
    return encoder.from_ids(ids, *KNOWN[digest])


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
