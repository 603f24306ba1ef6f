"""What all tests of ranks share."""
from unittest import mock

import pytest
import torch


@pytest.fixture(scope="package", autouse=True)
def exact_products():
    """In bfloat16 Muon's products round the last digits that layouts differ in to large ones."""
    with mock.patch("fira.train.optim.product_dtype", lambda device: torch.float32):
        yield
