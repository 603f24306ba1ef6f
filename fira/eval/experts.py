"""Which experts a task uses more than general text does."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fira.convert.files import Loaded
from fira.data.batches import Shards
from fira.data.shards import read_manifest
from fira.eval.score import Loads, Window, score
from fira.eval.specialization import read_tokens
from fira.files import MANIFEST, read_json, sha256
from fira.model.generate import window_length
from fira.model.router import routers

TOKENS = 1 << 15  # of general text


GeneralLoad = tuple[np.ndarray, str]  # each expert's share of a layer's rows [L, E]; on what text


def general_load(loaded: Loaded, sources: Sequence[str]) -> GeneralLoad | None:
    """The load on the beginning of `sources`; without them on held-out text of the run's data, or,
    if that is not there, the one that training stored. None for a dense model.

    Raises ValueError, one line, for a source that cannot be read or has no text.
    """
    layers, eot = routers(loaded.model), loaded.tokenizer.end_of_text
    if not layers:
        return None
    tokens, text = [eot], ", ".join(sources)
    if sources:
        for ids, ends in read_tokens(loaded.tokenizer, sources, TOKENS):
            tokens += [*ids, eot] if ends else ids
    elif (folder := _own_data(loaded.folder)) is not None:
        tokens += Shards(folder, "validation")[:TOKENS].tolist()
        text = "the run's held-out text"
    else:
        return np.array([each.load_share_E.tolist() for each in layers]), "the text of training"
    if len(set(tokens)) < 2:
        raise ValueError(f"{text} has no text; give as --general a file with text in it")
    window = window_length(loaded.model)
    loads = Loads(loaded.model)
    with loads:
        score(loaded.model, [[Window(tokens[first:first + window + 1], 0)]
                             for first in range(0, len(tokens) - 1, window)])
    return _shares(loads.counts_LE), text


def over_used(counts_LE: np.ndarray, usual: GeneralLoad) -> dict[str, Any]:
    """The load per layer, its distance from the usual one (half the sum of differences, 0..1) and
    the three experts whose share rose most."""
    load_LE, (usual_LE, text) = _shares(counts_LE), usual
    ratio_LE = load_LE / np.maximum(usual_LE, 1e-9)
    top = sorted(np.ndindex(ratio_LE.shape), key=lambda place: -ratio_LE[place])[:3]
    return {"load": load_LE.round(5).tolist(), "relative_to": text,
            "distance": (abs(load_LE - usual_LE).sum(axis=1) / 2).tolist(),
            "over_used": [{"layer": layer, "expert": expert,
                           "ratio": float(ratio_LE[layer, expert])} for layer, expert in top]}


def _shares(counts_LE: np.ndarray) -> np.ndarray:
    return counts_LE / np.maximum(counts_LE.sum(axis=1, keepdims=True), 1)


def _own_data(step: Path) -> Path | None:
    """The data folder that the run of a step was trained on, if it is still there, unchanged, and
    has held-out text."""
    file = step.parent / "config.json"
    about = read_json(file, "restore it from a backup") if file.is_file() else {}
    folder = Path(((about.get("config") or {}).get("data") or {}).get("folder") or "")
    manifest, known = folder / MANIFEST, (about.get("data") or {}).get("sha256") or ()
    same = manifest.is_file() and sha256(manifest) in known
    return folder if same and "validation" in read_manifest(folder)["splits"] else None
