"""One request passes few files of fira/, from the server to the token and back."""
from __future__ import annotations

import pytest

from fira.infer.decode import open_step
from fira.infer.engine import Engine
from fira.serve.api import ServedModel
from fira.serve.process import architecture
from tests.serve.conftest import RunningServer, model, tokenizer  # noqa: F401
from tests.trace import tracing

REQUEST = {"model": "tiny", "messages": [{"role": "user", "content": "The state"}],
           "max_tokens": 8, "temperature": 0.7, "seed": 1, "ignore_eos": True}


def test_a_chat_request_passes_at_most_14_files(model, tokenizer):  # noqa: F811
    pytest.importorskip("numba")
    with tracing() as path:
        engine = Engine(model, tokenizer, capacity=100)
        engine.decode_step = open_step(model, "float32", print)
        engine.start()
        served = ServedModel("tiny", tokenizer, 100, 320, chat_tuned=True,
                             architecture=architecture(model))
        running = RunningServer(lambda: (served, engine)).wait()
        for _ in range(2):
            path.clear()
            response = running.http.post("/v1/chat/completions", json=REQUEST)
        print(path)
        assert response.status_code == 200, response.text
    running.stop()
    assert response.json()["usage"]["completion_tokens"] == 8
    assert len(path.files) <= 14, path
