"""Other training programs: scored by the rule of `fira eval`, seeded, and their results kept."""
from __future__ import annotations

import pytest
import torch
import training_peers as peers

from fira.eval.bits_per_byte import windows


def test_documents_are_divided_into_the_windows_of_fira_eval():
    for length in (1, 2, 7, 8, 9, 12, 13, 31):
        ids = list(range(1, length + 1))
        expected = [(one.tokens, one.known) for one in windows([(ids, True)], 8, 0)]
        assert peers.windows(ids, 0, 8) == expected


def test_every_token_is_scored_once_with_any_batch_size():
    documents = [list(range(1, n)) for n in (2, 3, 9, 40, 5)]

    def losses(tokens, targets):
        assert tokens.shape == targets.shape and tokens.shape[1] > 1
        return torch.where(targets < 0, 0, targets).float()

    for batch in (1, 3):
        assert peers.sum_losses(losses, 0, documents, 8, batch) == sum(map(sum, documents))


def test_a_program_that_fixes_its_seed_gets_another(tmp_path):
    (tmp_path / "program.py").write_text(
        "import sys, torch\ntorch.manual_seed(1337)\nprint(torch.initial_seed(), sys.argv[1:])")
    assert peers.run_seeded(tmp_path, 5, "program.py", "--x").split() == ["5", "['--x']"]
    assert peers.run_seeded(tmp_path, 6, "program").split() == ["6", "[]"]
    with pytest.raises(ValueError, match="missing.py in .* exited with 1"):
        peers.run_seeded(tmp_path, 5, "missing.py")


def test_a_kept_result_is_not_made_again_and_settings_must_be_equal(tmp_path):
    path = tmp_path / "nanochat-seed1.json"
    made = peers.keep_result(path, {"seed": 1}, lambda: {"bits_per_byte": 2.0})
    assert peers.keep_result(path, {"seed": 1}, lambda: pytest.fail("made again")) == made
    assert peers.read_results(tmp_path) == {"nanochat": [made]}
    with pytest.raises(ValueError, match="choose another --out"):
        peers.keep_result(path, {"seed": 2}, dict)
