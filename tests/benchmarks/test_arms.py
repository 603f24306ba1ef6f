"""Arms of a comparison: their learning rates change together, and the best factor is found."""
from __future__ import annotations

from types import SimpleNamespace

import arms


def test_a_factor_changes_every_rate_that_is_set_and_no_other():
    preset = arms.Arm("moe", "small", ("optim.embedding_lr=0.04",))
    twice = preset.with_rates(2).config().optim
    before = preset.config().optim
    assert (twice.lr, twice.embedding_lr) == (2 * before.lr, 0.08)
    assert twice.router_lr == before.router_lr
    assert arms.Arm("moe", "tiny", ()).with_rates(2).config().optim.embedding_lr is None


def test_the_find_best_rate_is_found_over_equal_steps(monkeypatch, tmp_path, capsys):
    asked = []

    def train(arm, folder, seed, ranks):
        config = arm.config()
        asked.append((folder.name, config.train.minutes, config.train.steps))
        return SimpleNamespace(
            steps=[{"step": 70}], score="bits_per_byte",
            validations=[{"bits_per_byte": abs(config.optim.lr - 0.01)}])

    monkeypatch.setattr(arms, "train_arm", train)
    arm = arms.Arm("moe", "small", ("optim.lr=0.005",))
    assert arms.find_best_rate(arm, tmp_path, [0.5, 1, 2, 4], minutes=3) == 2
    assert [name for name, *_ in asked] == [f"rate-moe-{each}" for each in ("0.5", "1", "2", "4")]
    assert asked[0][1] == 3 and {steps for *_, steps in asked[1:]} == {70}
    assert not capsys.readouterr().err
    arms.find_best_rate(arm, tmp_path, [0.5, 1, 2], minutes=3)
    assert "edge" in capsys.readouterr().err
