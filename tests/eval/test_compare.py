"""Two models are compared on the same requests only, and items in the training text are found."""
import json

import numpy as np
import pytest

from fira.data.batches import Shards
from fira.data.tokenizer import Tokenizer


@pytest.fixture
def items(tmp_path):
    """A task file of 12 rows, the first of which continues with `answer`."""
    def write(answer=" the"):
        rows = [{"context": f"Item {n}:", "continuations": [answer, " zqx", " of"][n % 2:],
                 "gold": 0, "group": f"passage {n // 3}"} for n in range(12)]
        path = tmp_path / "items.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path
    return write


def test_a_comparison_is_the_difference_of_the_two_results(fira, refused, run, items, tmp_path):
    words, file = ("eval", run, "--task", items()), tmp_path / "earlier.json"
    fira("eval", run / "step-000005", "--task", items(), "--json", file)
    found = json.loads(fira(*words, "--against", file, "--json").out)
    ours, theirs = (one["suites"]["own"]["tasks"]["items.jsonl"]
                    for one in (found, json.loads(file.read_text())))
    row = found["against"]["suites"]["own"]["items.jsonl"]
    assert row["accuracy"]["mean"] == pytest.approx(ours["accuracy"] - theirs["accuracy"])
    assert row["bits_per_byte"]["mean"] == pytest.approx(
        ours["bits_per_byte"] - theirs["bits_per_byte"])
    assert row["flips"] == np.mean(np.not_equal(ours["correct"], theirs["correct"]))
    shown = fira(*words, "--against", run).out
    assert "+0.0000 ±0.0000" in shown and "mean of own" in shown
    line = refused(*words, "--limit", 5, "--against", file)
    assert "suite own has protocol" in line and "the same --suite, --data and --limit" in line


def test_items_of_the_training_text_are_found_and_left_out(fira, refused, run, data_folder, items):
    tokenizer, tokens = Tokenizer.load(data_folder), Shards(data_folder)
    known = tokenizer.decode(tokens[100:118])
    words = ("eval", run, "--task", items(known), "--limit", 3, "--leak")
    leak = json.loads(fira(*words, data_folder, "--json").out)[
        "suites"]["own"]["tasks"]["items.jsonl"]["leak"]
    assert min(leak["longest"][::2]) > 13 and leak["longest"][1] == 0
    assert (leak["-"]["n"], leak["runs of 8"]["n"]) == (3, 1)
    assert "runs of 13" in fira(*words, data_folder).out
    assert "is not a data folder" in refused(*words, run)
