"""Shards read as one sequence; a damaged one is found before anything is trained on it."""
from __future__ import annotations

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
    with pytest.raises(ValueError, match="is not valid JSON; delete"):
        Shards(folder)
