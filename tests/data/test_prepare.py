"""A data folder holds every token once, is the same bytes every time, and survives being killed."""
from __future__ import annotations

import errno
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from rich.console import Console

from fira import runtime
from fira.data import prepare as module
from fira.data.batches import Shards
from fira.data.prepare import prepare
from fira.data.shards import ShardWriter, read_manifest
from fira.data.sources import Reading
from fira.data.tokenizer import Tokenizer, train_tokenizer
from fira.files import sha256

ROOT = Path(__file__).parents[2]


def digests(folder: Path) -> dict[str, str]:
    return {file.name: sha256(file) for file in sorted(folder.glob("[!.]*"))}


def stream(tokenizer: Tokenizer, documents: list[str]) -> list[int]:
    return [id for text in documents for id in [*tokenizer._plain.encode(text).ids,
                                                tokenizer.end_of_text]]


@pytest.fixture
def documents(speeches) -> list[str]:
    return [line for text in speeches[:10] for line in text.split("\n") if line][:123]


@pytest.fixture
def source(documents, jsonl) -> str:
    return jsonl(documents)


@pytest.fixture
def small_commits(monkeypatch):
    """Write a journal entry after every single item."""
    monkeypatch.setattr(module, "COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(module, "BATCH_CHARS", 1)


def test_folder_holds_every_document_once_split_by_document(tokenizer, documents, jsonl, tmp_path):
    source = jsonl([*documents[:50], "", *documents[50:]])  # an empty one counts for nothing
    manifest = prepare([source], tmp_path / "data", tokenizer, shard_tokens=1000)
    kept = [text for number, text in enumerate(documents) if number % 20 != 19]
    for split, expected in (("train", kept), ("validation", documents[19::20])):
        shards, facts = Shards(tmp_path / "data", split), manifest["splits"][split]
        shards.verify()
        assert shards[:].tolist() == stream(tokenizer, expected)
        assert len(shards) == facts["tokens"] and facts["documents"] == len(expected)
        assert facts["bytes"] == sum(len(text.encode()) for text in expected)
        assert {shard["tokens"] for shard in facts["shards"][:-1]} <= {1000}
    assert manifest["tokenizer_hash"] == tokenizer.hash == Tokenizer.load(tmp_path / "data").hash
    assert manifest["dtype"] == "uint16"
    assert sorted(digests(tmp_path / "data")) == sorted(
        ["manifest.json", "tokenizer.json", "tokenizer_config.json",
         *(shard["file"] for split in manifest["splits"].values() for shard in split["shards"])])


def test_validation_sources_are_held_out_whole(tokenizer, documents, jsonl, tmp_path):
    train, held_out = jsonl(documents[:30], "a.jsonl"), jsonl(documents[30:40], "b.jsonl")
    prepare([train], tmp_path / "data", tokenizer, validation_sources=[held_out])
    for split, expected in (("train", documents[:30]), ("validation", documents[30:40])):
        assert Shards(tmp_path / "data", split)[:].tolist() == stream(tokenizer, expected)
    with pytest.raises(ValueError, match="no source for training"):
        prepare([train], tmp_path / "other", tokenizer, validation_sources=[train])


def test_bytes_do_not_depend_on_the_number_of_workers(tokenizer, source, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BATCH_CHARS", 3000)
    for workers in (1, 3):
        prepare([source], tmp_path / str(workers), tokenizer, shard_tokens=999, workers=workers)
    assert digests(tmp_path / "1") == digests(tmp_path / "3")


@pytest.mark.parametrize("after", [False, True])
def test_a_kill_at_every_single_step_ends_byte_identical(tokenizer, jsonl, tmp_path, monkeypatch,
                                                         small_commits, after):
    """Process n ends before or after its n-th change of the disk, and the next one continues."""
    source = jsonl([f"document number {number} " * 9 for number in range(24)])
    prepare([source], tmp_path / "calm", tokenizer, shard_tokens=150)

    def killing(real):
        def call(*arguments):
            last = next(calls) == stop
            if last and not after:
                os._exit(9)
            try:
                real(*arguments)
            finally:
                if last:
                    os._exit(9)
        return call

    for name in ("replace", "fsync", "unlink"):
        monkeypatch.setattr(os, name, killing(getattr(os, name)))
    status, stop = 9, 0
    while status == 9:
        stop, calls = stop + 1, itertools.count(1)
        child = os.fork()
        if not child:
            try:
                prepare([source], tmp_path / "killed", tokenizer, shard_tokens=150, workers=1)
            finally:
                os._exit(0 if (tmp_path / "killed" / "manifest.json").exists() else 1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0 and stop > 20
    assert digests(tmp_path / "killed") == digests(tmp_path / "calm")


@pytest.mark.parametrize("texts", [1, 3])
def test_of_few_documents_the_end_is_held_out_and_said_before(tokenizer, speeches, tmp_path, texts,
                                                              monkeypatch, small_commits, capsys):
    monkeypatch.setattr("fira.data.encoder.CHUNK", 2000)
    for number in range(texts):
        (tmp_path / f"{number}.txt").write_text(speeches[number])
    sources = [str(tmp_path / f"{number}.txt") for number in range(texts)]
    for every, folder in ((20, "a"), (4, "b")):
        facts = prepare(sources, tmp_path / folder, tokenizer, validation_every=every,
                        screen=Console(stderr=True))["splits"]
        said = capsys.readouterr().err
        assert said.index("validation: the last") < said.index("\ndata ")
        assert facts["train"]["bytes"] + facts["validation"]["bytes"] == sum(
            len(text.encode()) for text in speeches[:texts])
        share = facts["validation"]["bytes"] / facts["train"]["bytes"]
        assert share == pytest.approx(1 / (every - 1), rel=0.1)
        ids = np.concatenate([Shards(tmp_path / folder, split)[:]
                              for split in ("train", "validation")]).tolist()
        assert ids.count(tokenizer.end_of_text) == texts + 1
        assert tokenizer.decode(ids).replace("<|endoftext|>", "") == "".join(speeches[:texts])


def interrupted(monkeypatch, last, *arguments, **options):
    """A preparation that is stopped at the first batch after item `last`."""
    def stop(tokenizer, batch):
        if batch[0].number > last:
            raise KeyboardInterrupt
        return encode(tokenizer, batch)

    encode = module.encode_batch
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "encode_batch", stop)
        prepare(*arguments, **options)


def test_what_is_left_out_is_counted_once_also_after_an_interruption(tokenizer, tmp_path,
                                                                     monkeypatch, small_commits):
    rows = [{"text": f"document {number}" if number % 3 else None} for number in range(90)]
    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)) + "\n{")
    arguments = ([str(source)], tmp_path / "data", tokenizer)

    interrupted(monkeypatch, 50, *arguments, reading=Reading(skip_bad=True))
    manifest = prepare(*arguments, reading=Reading(skip_bad=True))
    assert manifest["left_out"] == {
        "null or empty": {"count": 30, "first": [f"{source}:{line}" for line in (1, 4, 7)]},
        "unreadable": {"count": 1, "first": [f"{source}:91"]}}
    assert sum(split["documents"] for split in manifest["splits"].values()) == 60


def test_long_text_file_resumes_inside_the_document(tokenizer, speeches, tmp_path, monkeypatch,
                                                    small_commits):
    monkeypatch.setattr("fira.data.encoder.CHUNK", 5000)
    text = "".join(speeches[:5])
    (tmp_path / "long.txt").write_text(text)
    arguments = ([str(tmp_path / "long.txt")], tmp_path / "data", tokenizer)

    interrupted(monkeypatch, 8, *arguments, validation_every=0)
    journal = json.loads((tmp_path / "data" / "journal.json").read_text())
    assert journal["place"] == [0, 9] and journal["documents"] == 0
    prepare(*arguments, validation_every=0)
    assert Shards(tmp_path / "data")[:].tolist() == stream(tokenizer, [text])


def test_shard_that_lost_synced_ids_is_not_continued(tokenizer, jsonl, tmp_path, small_commits):
    source = jsonl(["a document " * 50] * 30)
    Path(source).write_bytes(Path(source).read_bytes() + b"{")
    with pytest.raises(ValueError, match="not valid JSON"):
        prepare([source], tmp_path / "data", tokenizer)
    os.truncate(tmp_path / "data" / "train-00000.bin.partial", 10)
    with pytest.raises(ValueError, match=r"bin.partial is truncated: 10 bytes, not .*again"):
        prepare([source], tmp_path / "data", tokenizer)


def test_finished_folder_is_returned_at_once_and_never_overwritten(tokenizer, speeches, documents,
                                                                   source, jsonl, tmp_path):
    folder = tmp_path / "data"
    manifest = prepare([source], folder, tokenizer)
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert prepare([source], folder, tokenizer) == manifest == read_manifest(folder)
    assert before == {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    with pytest.raises(ValueError, match=r"another tokenizer.*give another folder, or delete"):
        prepare([source], folder, train_tokenizer(speeches[:5], 400))
    with pytest.raises(ValueError, match=r"another source.*give another folder, or delete"):
        prepare([jsonl(documents[1:], "c.jsonl")], folder, tokenizer)
    with pytest.raises(ValueError, match=r"another validation_every \(20, now 10\)"):
        prepare([source], folder, tokenizer, validation_every=10)


def test_input_may_be_mended_only_where_it_was_not_read_yet(tokenizer, documents, tmp_path,
                                                            small_commits):
    sources = tmp_path / "sources"
    sources.mkdir()
    for number, text in enumerate(documents[:30]):
        (sources / f"{number:02d}.txt").write_text(text)
    (sources / "25.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"25.txt:1: not UTF-8"):
        prepare([str(sources)], tmp_path / "data", tokenizer)
    assert json.loads((tmp_path / "data" / "journal.json").read_text())["documents"] == 24
    (sources / "25.txt").write_text("café")
    before = (sources / "03.txt").stat()
    os.utime(sources / "03.txt", ns=(0, 0))
    with pytest.raises(ValueError, match=r"another source .*or delete this one"):
        prepare([str(sources)], tmp_path / "data", tokenizer)
    os.utime(sources / "03.txt", ns=(before.st_atime_ns, before.st_mtime_ns))
    for name in ("data", "calm"):
        prepare([str(sources)], tmp_path / name, tokenizer)
    assert digests(tmp_path / "data") == digests(tmp_path / "calm")


def test_a_folder_with_other_content_or_another_writer_is_refused(tokenizer, source, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "train-00000.bin").write_text("mine")
    with pytest.raises(ValueError, match=r"holds other files .*train-00000.bin.*; give a new"):
        prepare([source], folder, tokenizer)
    assert digests(folder).keys() == {"train-00000.bin"}
    tokenizer.save(tmp_path / "with-tokenizer")  # learned into the same folder: accepted
    with runtime.claim(tmp_path / "with-tokenizer"):
        with pytest.raises(ValueError, match="another process is writing"):
            prepare([source], tmp_path / "with-tokenizer", tokenizer)
    prepare([source], tmp_path / "with-tokenizer", tokenizer)
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "data", Path("/proc/fira")):
        with pytest.raises(ValueError, match=f"{folder}.* cannot be written .*; give a folder"):
            prepare([source], folder, tokenizer)


def test_many_ids_need_four_bytes(tokenizer, source, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "vocab_size", 70_000)
    assert prepare([source], tmp_path / "data", tokenizer)["dtype"] == "uint32"
    assert Shards(tmp_path / "data", "validation")[:].dtype == np.uint32


@pytest.mark.parametrize("documents, options, line", [
    ([], {}, "0 documents with text"),
    (["", ""], {"validation_every": 0}, "0 documents with text, 0 characters"),
    (["one", "two"], {}, "2 documents with text, 6 characters; give files with more text"),
    (["one", "two"], {"validation_sources": ["empty.txt"]}, "empty.txt: 0 documents with text"),
    (["one"], {"validation_every": 1}, "validation_every=1 must be 0"),
])
def test_unusable_sources_are_one_line_and_others_may_follow(tokenizer, jsonl, tmp_path, documents,
                                                             options, line, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=line):
        prepare([jsonl(documents)], tmp_path / "data", tokenizer, **options)
    prepare([jsonl(["some text"] * 20, "b.jsonl")], tmp_path / "data", tokenizer)
    Shards(tmp_path / "data").verify()


def test_full_disk_is_one_line_and_nothing_is_lost(tokenizer, source, tmp_path, monkeypatch):
    prepare([source], tmp_path / "calm", tokenizer, shard_tokens=700)
    close, calls = ShardWriter._close_shard, itertools.count(1)

    def full(writer):
        if next(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        close(writer)

    monkeypatch.setattr(ShardWriter, "_close_shard", full)
    with pytest.raises(ValueError, match=r"No space left .*the same command then continues"):
        prepare([source], tmp_path / "data", tokenizer, shard_tokens=700)
    prepare([source], tmp_path / "data", tokenizer, shard_tokens=700)
    assert digests(tmp_path / "data") == digests(tmp_path / "calm")


MEASURE = """
import resource, sys
from fira.data.prepare import prepare
from fira.data.tokenizer import Tokenizer
tokenizer = Tokenizer.load(sys.argv[1])
for name in sys.argv[3:]:
    prepare([f"{sys.argv[2]}/{name}"], f"{sys.argv[2]}/{name}-data", tokenizer, workers=1)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peaks(tokenizer_folder, folder, *names) -> list[float]:
    """The largest resident memory, in MB, after preparing each file in turn."""
    printed = subprocess.check_output(
        [sys.executable, "-c", MEASURE, tokenizer_folder, folder, *names], timeout=90,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])})
    return [int(line) / 1024 for line in printed.split()]


def test_memory_does_not_grow_with_the_corpus(tokenizer_folder, speeches, tmp_path):
    text = "".join(speeches[:20])
    for name, rows in (("a", 1000), ("b", 12_000)):  # 5 and 60 MB of text
        documents = [text[start % 400_000:start % 400_000 + 5000]
                     for start in range(0, rows * 5003, 5003)]
        table = pyarrow.table({"text": documents})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet", row_group_size=1000)
    small, large = peaks(tokenizer_folder, tmp_path, "a.parquet", "b.parquet")
    assert large - small < 30, (small, large)  # MB; the text alone is 60, its ids twice that


def test_memory_is_flat_for_text_without_spaces_and_for_rows_that_share_a_text(tokenizer_folder,
                                                                               tmp_path):
    line = "".join(chr(0x4e00 + number % 997) for number in range(60)) + "。\n"
    (tmp_path / "a.txt").write_text(line * 30_000)   # 5 MB
    (tmp_path / "b.txt").write_text(line * 300_000)  # 55 MB, which took 930 MB
    table = pyarrow.table({"text": [line * 6000] * 100})  # 110 MB in 2 kB
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet", compression="zstd")
    small, *large = peaks(tokenizer_folder, tmp_path, "a.txt", "b.txt", "c.parquet")
    assert max(large) - small < 150, (small, large)
