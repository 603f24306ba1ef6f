"""Which files and functions of fira/ run while something is done: the reading path, counted.

Do the thing once before it is traced, so that lazy imports and caches are not part of the path.
"""
from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

PACKAGE = str(Path(__file__).resolve().parents[1] / "fira") + "/"


class ReadingPath:
    """Files in the order in which they were first entered, with their functions."""

    def __init__(self) -> None:
        self.functions: dict[str, dict[str, None]] = {}  # file -> its functions, in order

    def clear(self) -> None:
        self.functions.clear()

    @property
    def files(self) -> list[str]:
        return list(self.functions)

    def __str__(self) -> str:
        count = sum(map(len, self.functions.values()))
        lines = [f"{len(self.functions)} files, {count} functions"]
        lines += [f"  {file}: {', '.join(names)}" for file, names in self.functions.items()]
        return "\n".join(lines)

    def _enter(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        inside = code.co_filename.startswith(PACKAGE) and code.co_name != "<module>"
        if event == "call" and inside:
            name = getattr(code, "co_qualname", code.co_name)  # Python 3.11
            self.functions.setdefault(code.co_filename[len(PACKAGE):], {})[name] = None


@contextlib.contextmanager
def tracing() -> Iterator[ReadingPath]:
    """Watch this thread, threads started in the block and, from Python 3.12 on, all others."""
    path = ReadingPath()
    setters: list[Callable[[Any], None]] = [sys.setprofile, threading.setprofile]
    if sys.version_info >= (3, 12):
        setters.append(threading.setprofile_all_threads)
    try:
        for setter in setters:
            setter(path._enter)
        yield path
    finally:
        for setter in reversed(setters):
            setter(None)
