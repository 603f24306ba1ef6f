"""The tokenizer loses nothing, reads as transformers reads it, and takes only sensible input."""
from __future__ import annotations

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Reference
from tokenizers import decoders, models, pre_tokenizers, trainers

from fira.data.tokenizer import SPECIAL, Tokenizer, train_tokenizer

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ANY_TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.one_of(ANY_TEXT, st.sampled_from(SPECIAL)), max_size=6).map("".join))
def test_any_text_comes_back_and_special_tokens_are_text_unless_allowed(tokenizer, auto, text):
    assert not set(tokenizer.encode(text)) & {tokenizer.special(name) for name in SPECIAL}
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(text, allow_special=True) == auto(text)["input_ids"]
    assert tokenizer.decode(tokenizer.encode(text, allow_special=True)) == text


def test_transformers_reads_the_saved_files(tokenizer, auto, speeches):
    ids = tokenizer.encode(speeches[0])
    assert auto(speeches[0])["input_ids"] == ids and auto.decode(ids) == speeches[0]
    assert len(auto) == tokenizer.vocab_size == 2048
    assert auto.eos_token_id == tokenizer.end_of_text == tokenizer.special("<|endoftext|>")
    assert auto.pad_token == "<|pad|>"


def test_hash_follows_the_content_not_the_file(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "a")
    again = Tokenizer.load(tmp_path / "a")
    assert again.hash == tokenizer.hash and again.settings == tokenizer.settings
    again.save(tmp_path / "b")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    file = tmp_path / "a" / "tokenizer.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content, sort_keys=True))
    assert Tokenizer.load(file).hash == tokenizer.hash
    merges = content["model"]["merges"]
    merges[-1], merges[-2] = merges[-2], merges[-1]
    file.write_text(json.dumps(content))
    assert Tokenizer.load(file).hash != tokenizer.hash
    in_old_folders = "6956015b6de5fa69"  # the hash that existing data folders hold
    assert train_tokenizer(["ab ab ab"], 289).hash.startswith(in_old_folders)


def test_training_is_deterministic_exact_in_size_and_stops_at_max_bytes(speeches):
    one, two = (train_tokenizer(speeches[:5], 400) for _ in range(2))
    assert one.hash == two.hash and one.vocab_size == len(one.token_bytes()) == 400
    assert one.special("<|reserved_21|>") == 399  # special tokens are the last ids
    documents = iter(speeches)
    train_tokenizer(documents, 300, max_bytes=len(speeches[0].encode()) + 1)
    assert next(documents) == speeches[2]


def test_token_bytes_spell_the_text(tokenizer, speeches):
    table = tokenizer.token_bytes()
    text = speeches[3] + "naïve 東京 🎉 <|im_end|>"
    assert b"".join(table[id] for id in tokenizer.encode(text)).decode() == text
    assert table[tokenizer.end_of_text] == b""
    assert {bytes([byte]) for byte in range(256)} <= set(table)


def test_words_too_long_for_the_trainer_are_cut(speeches):
    text = "one " + "a" * 1_000_000 + " " * 1_200_000 + speeches[0]
    learned = train_tokenizer([text], 400)
    assert learned.decode(learned.encode(text)) == text


def test_gpt2_style_file_is_accepted(speeches, tmp_path):
    """GPT-2's own pre-tokenizer, and end of text inside the vocabulary."""
    reference = Reference(models.BPE())
    reference.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    reference.decoder = decoders.ByteLevel()
    reference.train_from_iterator(speeches[:20], trainers.BpeTrainer(
        vocab_size=1000, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    reference.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.slow_reason == "" and loaded.vocab_size == 1000
    for text in [*speeches[::9], "  two  spaces\n\n\nit's 1234 \t x\u3000y  "]:
        assert loaded.encode(text) == reference.encode(text).ids
        assert loaded.decode(loaded.encode(text)) == text
    assert loaded.end_of_text == 0
    assert 0 not in loaded.encode("<|endoftext|>")
    with pytest.raises(ValueError, match=r"no special token <\|im_start\|>"):
        loaded.special("<|im_start|>")


def test_long_text_in_chunks_has_the_ids_of_the_whole(tokenizer, speeches, monkeypatch):
    text = "\n".join(speeches[:8]) + "x" * 3000 + "   " + speeches[9]
    whole = tokenizer.encode(text)
    for block in (700, 4096):
        monkeypatch.setattr("fira.data.encoder.CHUNK", block)
        assert tokenizer.encode(text) == whole


def test_impossible_vocabulary_is_one_line_that_names_a_possible_one(speeches):
    with pytest.raises(ValueError, match=r"vocabulary of 287 is too small: .* need 288"):
        train_tokenizer(speeches[:2], 287)
    with pytest.raises(ValueError, match="vocabulary of 50304 is larger than this text") as caught:
        train_tokenizer(speeches[:2], 50304)
    largest = int(str(caught.value).split("at most ")[1].split()[0])
    assert train_tokenizer(speeches[:2], largest).vocab_size == largest


def test_errors_of_the_text_reach_the_caller_of_training():
    def documents():
        yield "some text"
        raise ValueError("file.txt is not UTF-8 text")

    with pytest.raises(ValueError, match=r"^file.txt is not UTF-8 text$"):
        train_tokenizer(documents(), 300)
    with pytest.raises(ValueError, match="no text to learn"):
        train_tokenizer(["", ""], 300)
    with pytest.raises(ValueError, match=r"character 2 is half of a surrogate pair \(.ud800\)"):
        train_tokenizer(["ab\ud800"], 300)


def test_files_without_a_byte_level_tokenizer_are_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="does not exist; train one"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is not a tokenizer.json"):
        Tokenizer.load(tmp_path)
    Reference(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"tokenizer.json: WordLevel .* needs byte-level BPE"):
        Tokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config.json holds no JSON object"):
        Tokenizer.load(tmp_path)
