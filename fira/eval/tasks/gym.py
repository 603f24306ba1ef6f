"""Questions of the package reasoning-gym, for tests outside of what a model was trained on."""
from __future__ import annotations

import difflib
import functools
from typing import Any


@functools.cache
def _source(name: str, seed: int) -> Any:
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError:
        raise ValueError(f"task gym:{name} needs the package reasoning-gym: pip install "
                         "'fira-moe[gym]'") from None
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, 3, 0.5) or ["chain_sum"]
        raise ValueError(f"reasoning-gym has no data set {name!r}; try gym:{' or gym:'.join(near)}")
    return create_dataset(name, seed=seed)


def find(key: str) -> tuple[Any, dict[str, Any]]:
    """The data set of a key gym:NAME/SEED.NUMBER, and the entry with its question and answer.
    Raises ValueError if there is no such data set, or no package."""
    name, _, place = key.partition(":")[2].partition("/")
    seed, _, number = place.partition(".")
    source = _source(name, int(seed))
    return source, source[int(number)]


def score(answer: str, key: str) -> float:
    """What the data set gives for an answer to the question of a key, 0 to 1."""
    source, entry = find(key)
    return float(source.score_answer(answer.strip(), entry))
