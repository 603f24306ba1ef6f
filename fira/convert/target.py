"""Where a conversion writes: a folder or file that appears whole or not at all."""
from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fira.checkpoint import write_manifest
from fira.model.files import CONFIG, save_weights


@contextlib.contextmanager
def new_target(path: Path) -> Iterator[Path]:
    """A partial path beside `path` to write to, a folder or file; renamed when the block ends well.

    Raises ValueError if `path` exists already or its folder cannot be written.
    """
    check_new(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        _remove(partial)  # what a kill left behind
        yield partial
        os.rename(partial, path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}; "
                         "give a place that you may write to, with room enough") from None
    finally:
        with contextlib.suppress(OSError):  # the error above says why
            _remove(partial)


def check_new(path: Path) -> None:
    """Raises ValueError, one line, if `path` exists or there is no place for it."""
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


def write_run(run: Path, model: Any, tokenizer: Any, step: int, record: dict[str, Any]) -> None:
    """A new run folder that every verb reads, with one step in it."""
    with new_target(run) as partial:
        folder = partial / f"step-{step:06d}"
        save_weights(model, folder)
        tokenizer.save(folder)
        write_manifest(folder)
        (partial / CONFIG).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
