"""Models for tests: untrained, but with weights so large that logits and routing are decided."""
from unittest import mock

from fira import model


def build(spec, seed, std=0.3):
    """A new model of `spec` whose initial weights have the standard deviation `std`."""
    with mock.patch("fira.model.initialize.STD", std):
        return model.build(spec, seed)
