"""The tokenizer loses nothing, reads as transformers reads it, and takes only sensible input."""
from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import re

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Reference
from tokenizers import models

from fira.data import encoder
from fira.data import tokenizer as module
from fira.data.tokenizer import BYTES_PER_MERGE, SPECIAL, Tokenizer, train_tokenizer

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
    assert train_tokenizer(["ab" + " ab" * 40], 289).hash.startswith(in_old_folders)


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


def test_words_too_long_for_the_trainer_are_cut_and_compress_as_well(speeches, monkeypatch):
    text = "one " + "a" * 1_000_000 + " " * 1_200_000 + speeches[0]
    learned = train_tokenizer([text], 400)
    assert learned.decode(learned.encode(text)) == text
    rng = random.Random(0)
    words = ["".join(rng.choices("acgt", k=rng.randint(2, 6))) for _ in range(300)]
    text = "".join(rng.choices(words, range(300), k=20_000))
    cut = len(train_tokenizer([text], 700).encode(text))
    monkeypatch.setattr(module, "_LONG_WORD", re.compile("(?!)"))
    assert cut < 1.01 * len(train_tokenizer([text], 700).encode(text))


@pytest.mark.parametrize("pattern", [encoder.GPT2, encoder.CL100K, encoder.LLAMA3])
@pytest.mark.parametrize("seed", range(3))
def test_vocabularies_of_ids_alone_give_the_ids_of_tiktoken(pattern, seed, tmp_path, monkeypatch):
    """Also with tokens that joining never reaches, which are found only as whole words."""
    rng = random.Random(seed)
    tokens = sorted({bytes(rng.choices(b"ab \n1\xe4\xb8\x80", k=rng.randint(2, 5)))
                     for _ in range(150)}, key=lambda token: (len(token), token))
    ids = {token: id for id, token in enumerate([bytes([byte]) for byte in range(256)] + tokens)}
    digest = hashlib.sha256(repr(sorted(ids.items())).encode()).hexdigest()[:12]
    monkeypatch.setitem(module.KNOWN, digest, (pattern, {"<|endoftext|>": len(ids)}))
    char = {byte: char for char, byte in encoder.byte_of_char().items()}
    (tmp_path / "vocab.json").write_text(json.dumps(
        {"".join(char[byte] for byte in token): id for token, id in ids.items()}))
    (tmp_path / "ranks").write_bytes(b"".join(
        base64.b64encode(token) + b" %d\n" % id for token, id in ids.items()))
    peer = tiktoken.Encoding("peer", pat_str=pattern, mergeable_ranks=ids, special_tokens={})
    Tokenizer.load(tmp_path).save(tmp_path / "saved")
    for made in (Tokenizer.load(tmp_path / name) for name in ("vocab.json", "ranks", "saved")):
        assert made.end_of_text == len(ids) and made.rewrites == ""
        for _ in range(200):
            text = "".join(rng.choices("aab  \n1\u4e00", k=rng.randint(1, 30)))
            assert made.encode(text) == peer.encode_ordinary(text), text


def with_special(tokenizer, *names, **changes) -> Tokenizer:
    """The tokenizer with other special tokens."""
    added = [dict(tokenizer.description["added_tokens"][0], id=2016 + number, content=name)
             for number, name in enumerate(names)]
    description = tokenizer.description | {"added_tokens": added} | changes
    return Tokenizer(Reference.from_str(json.dumps(description)))


def test_the_end_token_is_found_by_its_name_or_the_advice_works(tokenizer, tmp_path):
    for name in ("</s>", "<|end_of_text|>", "<eos>", "<EOT>",
                 "<\uff5cend\u2581of\u2581sentence\uff5c>"):
        assert with_special(tokenizer, "<s>", "<|eot_id|>", name).end_of_text == 2018
    made = with_special(tokenizer, "<s>", "<stop>")
    with pytest.raises(ValueError, match=r"\(<s>, <stop>\) in tokenizer_config.json") as caught:
        made.end_of_text  # noqa: B018
    made.save(tmp_path)
    advised = str(caught.value).rpartition(": {")[2].replace("NAME", "<stop>")
    (tmp_path / "tokenizer_config.json").write_text("{" + advised)
    assert Tokenizer.load(tmp_path).end_of_text == 2017


def test_gpt2_style_file_is_accepted(tokenizer, speeches):
    made = with_special(tokenizer, "<|endoftext|>", pre_tokenizer={
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True})
    assert made.slow_reason == "" and made.vocab_size == 2017 and made.end_of_text == 2016
    for text in [*speeches[::9], "  two  spaces\n\n\nit's 1234 \t x\u3000y  <|endoftext|>"]:
        assert made.encode(text) == made._plain.encode(text).ids
    with pytest.raises(ValueError, match=r"no special token <\|im_start\|>"):
        made.special("<|im_start|>")


def test_long_text_in_chunks_has_the_ids_of_the_whole(tokenizer, speeches, monkeypatch):
    text = "\n".join(speeches[:8]) + "x" * 3000 + "   " + speeches[9]
    whole = tokenizer.encode(text)
    for block in (700, 4096):
        monkeypatch.setattr("fira.data.encoder.CHUNK", block)
        assert tokenizer.encode(text) == whole


def test_text_too_small_for_the_vocabulary_gives_a_smaller_one(speeches):
    with pytest.raises(ValueError, match=r"vocabulary of 287 is too small: .* need 288"):
        train_tokenizer(speeches[:2], 287)
    learned, size = train_tokenizer(speeches[:1], 50304), len(speeches[0].encode())
    assert learned.vocab_size == 288 + size // BYTES_PER_MERGE


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
    for name, content in (("tokenizer.json", b"{}"), ("vocab.json", b'{"a": 0}'), ("x", b"IQ== 0"),
                          ("vocab.json", b"["), ("tokenizer.model", b"\n\x0e<unk>\x15")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="give the tokenizer.json of a byte-level BPE"):
            Tokenizer.load(tmp_path / name)
    (tmp_path / "tekken.json").write_text('{"config": {}, "vocab": [], "special_tokens": []}')
    with pytest.raises(ValueError, match="is a tekken file, which FIRA does not read; give the"):
        Tokenizer.load(tmp_path / "tekken.json")
    Reference(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"tokenizer.json: WordLevel .* needs byte-level BPE"):
        Tokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config.json holds no JSON object"):
        Tokenizer.load(tmp_path)
