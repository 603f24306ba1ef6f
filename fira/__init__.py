"""FIRA: train, tune, measure and use small Mixture-of-Experts language models."""
from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["FIRA", "FIRA2", "Tokenizer"]

_HOMES = {"FIRA": "fira.model.fira", "FIRA2": "fira.model.fira2",
          "Tokenizer": "fira.data.tokenizer"}


def __getattr__(name: str) -> Any:
    """Import the public classes on first use, so that `import fira` stays instant."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fira' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
