"""Shards read as one sequence; a damaged one is found before anything is trained on it."""
from __future__ import annotations

import json

import numpy as np
import pytest

from fira.data.batches import Shards
from fira.data.prepare import prepare


@pytest.fixture
def folder(tokenizer, speeches, jsonl, tmp_path):
    prepare([jsonl(speeches[:4])], tmp_path / "data", tokenizer, validation_every=0,
            shard_tokens=1000)
    return tmp_path / "data"


def test_ranges_are_read_across_shards(folder):
    shards = Shards(folder)
    whole = np.concatenate([np.fromfile(file, np.uint16)
                            for file in sorted(folder.glob("train-*.bin"))])
    length = len(whole)
    assert len(shards) == length and len(shards.shards) > 4
    for start, stop in [(0, 10), (990, 1010), (0, 3500), (1000, 2000), (5, 5),
                        (length - 3, length + 9)]:
        assert np.array_equal(shards[start:stop], whole[start:stop])
    assert isinstance(shards[10:20].base, np.memmap)
    assert len(Shards(folder, "validation")) == 0
    with pytest.raises(ValueError, match="no split 'test'; it has: train, validation"):
        Shards(folder, "test")


def test_damaged_shard_is_found(folder):
    Shards(folder).verify()
    file = folder / "train-00002.bin"
    content = file.read_bytes()
    file.write_bytes(content[:777] + bytes([content[777] ^ 1]) + content[778:])
    with pytest.raises(ValueError, match=r"train-00002.bin was altered .*prepare it again"):
        Shards(folder).verify()
    file.write_bytes(content[:-2])
    with pytest.raises(ValueError, match=r"train-00002.bin is truncated: 1,998 bytes, not 2,000"):
        Shards(folder)
    file.unlink()
    with pytest.raises(ValueError, match=r"train-00002.bin is missing"):
        Shards(folder)


def test_folder_without_data_says_what_to_run(folder, tmp_path):
    with pytest.raises(ValueError, match=r"not a data folder .*fira data SOURCE"):
        Shards(tmp_path)
    (folder / "manifest.json").rename(folder / "journal.json")
    with pytest.raises(ValueError, match="not finished; run the same fira data command again"):
        Shards(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"is not valid JSON \(.* line 1 .*\); delete"):
        Shards(folder)


@pytest.mark.parametrize("key, value, words", [
    ("splits.train.tokens", 10**9, "tokens=1000000000 or shard_tokens=1000 does not agree with"),
    ("splits.train.tokens", 1.5, "splits.train.tokens=1.5 should be a valid integer"),
    ("splits.train.shards", [{"file": "../x"}], "splits.train.shards.0.file='../x' "),
    ("splits", [1], "splits should be a valid dictionary"), ("shard_tokens", 7, "does not agree"),
    ("shard_tokens", 0, "shard_tokens=0 should be greater than or equal to 1"),
    ("vocab_size", 10**30, "vocab_size=1000"), ("dtype", "int16", "'uint16' or 'uint32'"),
    ("shard_tokens", "DIGITS", "is not valid JSON (Exceeds the limit"),
    ("shard_tokens", "DEEP", "is not valid JSON (maximum recursion depth"),
])
def test_an_impossible_manifest_is_one_line_that_names_file_and_key(folder, key, value, words):
    file = folder / "manifest.json"
    place = manifest = json.loads(file.read_text())
    *sections, leaf = key.split(".")
    for section in sections:
        place = place[section]
    place[leaf] = value
    text = json.dumps(manifest).replace('"DIGITS"', "9" * 10_000).replace('"DEEP"', "[" * 100_000)
    file.write_text(text)
    with pytest.raises(ValueError, match=r"prepare the data again$") as caught:
        Shards(folder)
    assert str(caught.value).startswith(str(file)) and words in str(caught.value)
