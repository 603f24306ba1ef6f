"""Which files and functions of fira/ run while something is done: the reading path, counted.

    with tracing() as path:
        engine = start(...)      # threads started in here are watched too
        path.clear()             # what was made ready does not count
        answer(engine)
    print(path)

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
    """Files in the order in which they were first entered, and who called whom."""

    def __init__(self) -> None:
        self.functions: dict[str, dict[str, None]] = {}  # file -> its functions, in order
        self.calls: set[tuple[str, str]] = set()  # (file of the caller, file of the called)

    def clear(self) -> None:
        self.functions.clear()
        self.calls.clear()

    @property
    def files(self) -> list[str]:
        return list(self.functions)

    @property
    def circles(self) -> list[tuple[str, str]]:
        """Pairs of files that call each other: the path goes up again there."""
        return sorted((a, b) for a, b in self.calls if a < b and (b, a) in self.calls)

    def __str__(self) -> str:
        count = sum(map(len, self.functions.values()))
        lines = [f"{len(self.functions)} files, {count} functions"]
        lines += [f"  {file}: {', '.join(names)}" for file, names in self.functions.items()]
        lines += [f"  in both directions: {a} and {b}" for a, b in self.circles]
        return "\n".join(lines)

    def _enter(self, frame: FrameType, event: str, _: Any) -> None:
        file = _file(frame)
        if event != "call" or file is None or frame.f_code.co_name == "<module>":
            return
        name = getattr(frame.f_code, "co_qualname", frame.f_code.co_name)  # Python 3.11
        self.functions.setdefault(file, {})[name] = None
        caller = frame.f_back
        while caller is not None and _file(caller) is None:
            caller = caller.f_back
        if caller is not None:
            self.calls.add((_file(caller) or "", file))


def _file(frame: FrameType) -> str | None:
    name = frame.f_code.co_filename
    return name[len(PACKAGE):] if name.startswith(PACKAGE) else None


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


def trace(call: Callable[[], object]) -> ReadingPath:
    """The path of one call."""
    with tracing() as path:
        call()
    return path
