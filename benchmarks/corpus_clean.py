"""Plain text out of what packages hold: whitespace set right, manuals without their markup."""
from __future__ import annotations

import re
import unicodedata

# Directives whose body is no prose; a body of any other (note, class, setting) is kept.
NO_PROSE = re.compile(r"\.\. (?!(\S+ )?[\w:-]+::)|\.\. (_|\[|\|)|\.\. (code|code-block|sourcecode|"
                      r"console|parsed-literal|literalinclude|include|image|figure|toctree|module|"
                      r"currentmodule|highlight|index|table|list-table|csv-table|math|graphviz|"
                      r"snippet|raw|contents|rubric|default-domain|cmdoption|role)::")
RULED = re.compile(r"([=\-~^\"'`*+#.])\1{2,}[=\-~^\"'`*+#. ]*$|[+|]")  # under titles, in tables
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


def tidy(text: str) -> str:
    """Composed characters, no control characters, single blank lines, no space at line ends."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = "".join(" " if c.isspace() and c != "\n" else c for c in text
                   if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co"))
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def prose(markup: str) -> str:
    """The paragraphs of a reStructuredText manual, unwrapped; code, tables and targets go."""
    paragraphs: list[str] = []
    current: list[str] = []
    skipped: int | None = None  # lines indented deeper than this belong to something dropped

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
