"""The standard error of bits per byte is that of the windows as a sample."""
from types import SimpleNamespace

import pytest
import torch

from fira.train.validate import validate


def test_the_error_of_bits_per_byte_is_the_jackknifes():
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 5, (60, 16), generator=generator)
    sizes = torch.tensor([0, 1, 2, 4, 9])
    losses = torch.rand(60, 16, generator=generator, dtype=torch.double) + sizes[targets] / 4

    def bits(rows):
        """`validate` of some windows, in batches of seven."""
        parts = [(SimpleNamespace(targets_BT=targets[part]), losses[part])
                 for part in rows.split(7)]
        layout = SimpleNamespace(
            model=torch.nn.Identity(), sum=lambda sums: sums,
            take_turns=lambda batches: ((batch, True) for batch in batches),
            score=lambda _, batch: next(loss for part, loss in parts if part is batch))
        return validate(layout, [batch for batch, _ in parts], sizes)
    rows = torch.arange(60)
    left_out = torch.tensor([bits(rows[rows != n])["bits_per_byte"] for n in rows])
    jackknife = (59 / 60 * ((left_out - left_out.mean()) ** 2).sum()) ** 0.5
    assert bits(rows)["bits_per_byte_error"] == pytest.approx(float(jackknife), rel=0.02)
    assert "bits_per_byte_error" not in bits(rows[:1])
