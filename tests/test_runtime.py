"""Which device `auto` takes."""
import pytest
import torch

from fira.runtime import pick_device


@pytest.mark.parametrize("cuda, mps, taken", [
    (True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_auto_takes_the_fastest_device_there_is(cuda, mps, taken, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert pick_device("auto").type == taken
