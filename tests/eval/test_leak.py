"""The runs found equal those of a search written out, and collisions of hashes are not reported."""
from unittest import mock

import numpy as np
import pytest

from fira.eval import leak


def plain(item, tokens):
    """The longest run of `item` in `tokens`, every run tried."""
    text = "".join(f"{token} " for token in tokens)
    return max((n for n in range(8, len(item) + 1) for start in range(len(item) - n + 1)
                if f" {''.join(f'{token} ' for token in item[start:start + n])}" in " " + text),
               default=0)


@pytest.mark.parametrize("changes", [{"CHUNK": 4096}, {"CHUNK": 64}, {"FACTOR": 1}], ids=str)
def test_the_longest_run_is_the_one_a_plain_search_finds(changes):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 3, 2000).astype(np.uint16)
    items = [rng.integers(0, 3, size) for size in (0, 7, 8, 20, 40)] + [
        tokens[start:start + size] for start, size in ((0, 8), (995, 30), (1980, 20), (7, 7))]
    items += [np.concatenate([tokens[500:515], [9], tokens[515:540]]), np.full(30, 65535)]
    with mock.patch.multiple(leak, **changes):  # with the factor 1, any order has the same hash
        found = leak.longest_runs(items, tokens)
    assert found.tolist() == [plain(item, tokens) for item in items]
    assert max(found) == 30 and min(found) == 0
