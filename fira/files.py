"""Files that appear whole or not at all, and folders that can prove they are undamaged.

Everything is written beside its place, pushed to the disk (fsync) and renamed, so that a reader, or
a process that continues after a kill or a power cut, finds the old content or the new one.
"""
from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

MANIFEST = "manifest.json"
LARGE = 1 << 24  # bytes of a file that takes longer to hash than two changes of it lie apart
MOST_JSON = 1 << 24  # bytes of a JSON file; the index of the largest models has about a third


@contextlib.contextmanager
def new_target(path: Path, replace: bool = False) -> Iterator[Path]:
    """A path beside `path` to write to, file or folder; it is renamed when the block ends well.

    Raises ValueError, one line, if `path` cannot be written, or exists already and is not to be
    replaced.
    """
    if not replace:
        check_new(path)
    try:
        with replacing(path) as partial:
            yield partial
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot write {path}: {reason}; give a place that you may write to, with "
                         "room enough") from None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the place of the file `path` when the block ends.

    If the block raises, `path` stays as it was and nothing is left beside it.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        remove(partial)  # what a kill left behind
        yield partial
        _sync_tree(partial)
        os.replace(partial, path)
        sync(path.parent)
    finally:
        with contextlib.suppress(OSError):  # the error that is on its way says why
            remove(partial)


def write_text(path: Path, text: str) -> None:
    """Replace the file `path` as a whole."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Replace the file `path` as a whole."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def inside(folder: Path, name: str) -> Path:
    """The path of the file `name` in a folder that may come from a stranger; it need not exist.

    Raises ValueError, one line, if the name has folders in it, if a link leads out of `folder`, or
    if there is a pipe, a device or a folder. A snapshot in a cache of the Hugging Face hub may also
    link to the cache's blobs: snapshots/REVISION/FILE -> ../../blobs/CHECKSUM.
    """
    root, path = Path(os.path.realpath(folder)), folder / name
    homes = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    if not (Path(name).name == name and len(name) < 256 and name.isprintable() and
            any(Path(os.path.realpath(path)).is_relative_to(home) for home in homes)):
        raise ValueError(f"{name!r:.99} leads out of {folder}; put the file itself there")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a regular file; put the file itself there")
    return path


def read_json(path: Path, remedy: str, most: int = MOST_JSON) -> dict[str, Any]:
    """The JSON object in a file of at most `most` bytes, in which no key stands twice. Raises
    ValueError, one line that ends with `remedy`, if there is none."""
    try:
        if (size := inside(path.parent, path.name).stat().st_size) > most:
            raise ValueError(f"{path} has {size:,} bytes, more than {most:,}; {remedy}")
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path} is missing; {remedy}") from None
    try:
        content = json.loads(text.decode(), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({str(error).partition(';')[0]}); "
                         f"{remedy}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object; {remedy}")
    return content


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice")
    return found


def check_new(path: Path) -> None:
    """Raises ValueError, one line, if `path` exists or its folder cannot be written."""
    if path.exists():
        raise ValueError(f"{path} exists already; delete it or give another name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = path.with_name(f".{path.name}.probe")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror or error}); give a place "
                         "that you may write to") from None


def make_folder(path: Path) -> None:
    """Create a folder, and those above it, unless it is there; it survives a power cut."""
    if not path.exists():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def remove(path: Path) -> None:
    """Delete a file or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_manifest(folder: Path, known: dict[str, str | None] | None = None) -> None:
    """Write the size, SHA-256, if it is not `known`, and time of the last change of every file of
    `folder` into manifest.json; fsync all of it."""
    files = {path.name: {"bytes": path.stat().st_size, "modified": path.stat().st_mtime_ns,
                         "sha256": (known or {}).get(path.name) or sha256(path)}
             for path in sorted(folder.iterdir()) if path.name != MANIFEST}
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=2) + "\n", encoding="utf-8")
    _sync_tree(folder)


def find_damage(folder: Path, names: tuple[str, ...] | None = None,
                required: Iterable[str] = (), only_changed: bool = False) -> str | None:
    """What is wrong with `folder` by its manifest (or only with files `names`); None if nothing.
    A manifest that does not list the `required` files is damaged itself."""
    return next((f"{name} {reason}" for name, ok, reason
                 in check_files(folder, names, required, only_changed) if not ok), None)


def check_files(folder: Path, names: tuple[str, ...] | None = None, required: Iterable[str] = (),
                only_changed: bool = False) -> Iterator[tuple[str, bool, str]]:
    """(file, whether it is as it was written, what is wrong) of each file in a folder's manifest.

    With `names`, only of these, also of those that are in the folder but not in the manifest. Reads
    each file when its turn comes, and raises OSError if that fails; with `only_changed`, only
    small ones and those that were changed after the manifest was written.
    """
    try:
        content = read_json(folder / MANIFEST, "")["files"]
        listed = {name: (one["bytes"], one["sha256"], one.get("modified") if only_changed else None)
                  for name, one in content.items()}
    except (KeyError, TypeError, AttributeError, ValueError):
        yield MANIFEST, False, "is missing or unreadable"
        return
    if lacking := sorted(set(required) - listed.keys()):
        yield MANIFEST, False, f"does not list {lacking[0]}"
    for name in listed if names is None else names:
        if name in listed or (folder / name).exists():
            try:
                due = listed.get(name, ("the manifest's", "", None))
                reason = _fault(inside(folder, name), *due)
            except ValueError as error:
                reason = f"cannot be checked ({error})"
            yield name, not reason, reason


def _fault(path: Path, due: Any, digest: Any, modified: Any) -> str:
    """What is wrong with a file of `due` bytes and this SHA-256 by its manifest; "" if nothing. A
    large one that was last `modified` then is not read."""
    if not path.is_file():
        return "is missing"
    if (size := path.stat().st_size) != due:
        return f"has {size} bytes, not {due!s:.40}"
    same = size >= LARGE and path.stat().st_mtime_ns == modified
    return "" if same or sha256(path) == digest else "was altered"


def free_name(path: Path) -> Path:
    """`path` with .damaged behind its name, as often as it takes to be a name that is free."""
    while os.path.lexists(path := path.with_name(f"{path.name}.damaged")):
        pass
    return path


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """fsync a file or a folder: what was written, or renamed in it, survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_tree(path: Path) -> None:
    if path.is_dir():
        for inner in path.iterdir():
            _sync_tree(inner)
            if inner.is_file():  # what safetensors writes, only its owner could read
                inner.chmod(path.stat().st_mode & 0o666)
    sync(path)
