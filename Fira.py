"""`from Fira import FIRA`, as the founding document writes it: a door onto the package fira."""
from __future__ import annotations

from fira.model.fira import FIRA

__all__ = ["FIRA"]
