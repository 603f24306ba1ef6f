"""The small model of tests/infer."""
from tests.infer.conftest import model, step_folder, tokenizer  # noqa: F401
