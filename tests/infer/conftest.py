"""A small model with its tokenizer, in memory and as a step folder."""
from __future__ import annotations

from pathlib import Path

import pytest

from fira.data.tokenizer import Tokenizer, train_tokenizer
from fira.files import write_manifest
from fira.model.files import save_weights
from fira.model.spec import FIRA2Spec
from tests.models import build

TEXT = ["The state of the Union is strong. Größe, naïve café, 你好 and 🙂🙃 are text too. " * 80]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer([*TEXT, "user assistant " * 400], vocab_size=310)


@pytest.fixture(scope="session")
def model(tokenizer: Tokenizer):
    spec = FIRA2Spec(vocab_size=320, d_model=32, n_head=2, n_kv_head=1, head_dim=16, num_layers=2,
                     d_ff=32, num_experts=4, top_k=2, context=64)
    return build(spec, seed=1).eval()


@pytest.fixture
def step_folder(tmp_path: Path, model, tokenizer: Tokenizer) -> Path:
    folder = tmp_path / "run" / "step-000010"
    save_weights(model, folder)
    tokenizer.save(folder)
    write_manifest(folder)
    (folder.parent / "config.json").write_text('{"config": {}}')
    return folder
