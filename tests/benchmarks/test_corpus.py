"""The corpus from packages: what cleaning keeps, and the same packages give the same files."""
import io
import json
import tarfile
import zipfile

import corpus
import pytest
from corpus import Document

MANUAL = """
Models
======

A model is the single source of *information* about your data. See
:doc:`the guide </topics/db>`, :class:`~django.db.models.Model`, ``save()`` and fields_ of it.

* First point,
  which goes on::

    class Person(models.Model):

.. note::

    A note is prose, too.

.. method:: save(force=False)

    :param force: no prose

+-----+-----+
| one | two |
+-----+-----+
"""


def test_prose_keeps_words_and_drops_code_tables_and_markup():
    assert corpus.extract_prose(MANUAL).split("\n\n") == [
        "Models",
        "A model is the single source of information about your data. See the guide, Model, save() "
        "and fields of it.",
        "* First point, which goes on:",
        "A note is prose, too.",
    ]
    assert corpus.tidy("cafe\u0301\r\n\r\n\r\n\ta\u00a0b \u200b\x07\n") == "café\n\n a b"


def test_a_paragraph_occurs_once_and_short_ones_may_repeat():
    paragraph = "A sentence of some length that says the same thing every time. " * 2
    own = ["Yes. " + f"This document has its own words, numbered {n}. " * 6 for n in range(3)]
    found = list(corpus.unique(Document(f"Amen.\n\n{paragraph}\n\n{text}", "s") for text in own))
    assert [one.text.count("A sentence") for one in found] == [2, 0, 0]
    assert all(one.text.startswith("Amen.") for one in found)
    assert not list(corpus.unique([Document("too short", "s")]))


def test_books_come_from_a_module_that_never_runs_and_conversations_turn_by_turn():
    module = ("raise SystemExit\nbible = Bible(V.ONE, '''In the beginning. And so on. `Yes.` "
              "Another book.''', {1001001: 0, 1001002: 18, 1002001: 29, 2001001: 36}, {})")
    assert list(corpus.books(module)) == ["In the beginning. And so on.\n\n'Yes.'", "Another book."]
    turns = [[{"text": "Hello"}, {"text": "how  are you"}], [{"text": "fine"}]]
    assert list(corpus.conversations(json.dumps({"a": {"messages": turns}}))) == [
        "Hello how are you\nfine"]


def test_members_come_by_name_and_only_regular_files_of_bounded_size(tmp_path, monkeypatch):
    wheel, bundle = tmp_path / "a.whl", tmp_path / "a.tar.gz"
    with zipfile.ZipFile(wheel, "w") as file:
        for name in ("p/b.txt", "p/a.txt", "p/a.py"):
            file.writestr(name, name)
    assert list(corpus.members(wheel, "p/*.txt")) == ["p/a.txt", "p/b.txt"]
    with tarfile.open(bundle, "w:gz") as file:
        for name, kind in (("b.txt", tarfile.REGTYPE), ("l.txt", tarfile.SYMTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.size = kind, 4
            file.addfile(entry, io.BytesIO(b"text"))
    assert list(corpus.members(bundle, "*.txt")) == ["text"]
    monkeypatch.setattr(corpus, "LARGEST", 6)
    with pytest.raises(ValueError, match="unpacks to 7 bytes and a file may have 6"):
        list(corpus.members(wheel, "p/*.txt"))


def test_split_and_files_are_the_same_bytes_in_any_order_and_of_enough_text(tmp_path, monkeypatch):
    documents = [Document(f"document {n}, “quoted”", "s") for n in range(1000)]
    with pytest.raises(ValueError, match="only 0.0 MB of text were found"):
        corpus.write(documents, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    monkeypatch.setattr(corpus, "LEAST", 10)
    for place, order in (("a", documents), ("b", documents[::-1])):
        corpus.write(order, tmp_path / place)
    files, again = ([(tmp_path / place / f"{name}.jsonl").read_bytes()
                     for name in ("train", "validation")] for place in "ab")
    assert files == again and 5 <= files[1].count(b"\n") <= 40
    assert len(set(b"".join(files).splitlines())) == 1000
