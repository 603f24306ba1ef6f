"""One chat request and one training step pass few files of fira/: counted, and printed with -s."""
from __future__ import annotations

import pytest
from rich.console import Console

from fira.infer.decode import open_step
from fira.infer.engine import Engine
from fira.serve.api import ServedModel
from fira.serve.process import architecture
from fira.stages.pretrain import pretrain
from fira.train.loop import Loop
from tests.serve.conftest import RunningServer, model, tokenizer, window  # noqa: F401
from tests.trace import tracing


def chat(running, text: str) -> int:
    """Send one chat request; the number of prompt tokens that had to be read."""
    response = running.http.post("/v1/chat/completions", json={
        "model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 8,
        "temperature": 0.7, "top_k": 1, "ignore_eos": True})
    assert response.status_code == 200, response.text
    usage = response.json()["usage"]
    assert usage["completion_tokens"] == 8
    return usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]


@pytest.mark.parametrize("compiled, most", [(True, 15), (False, 18)])
def test_a_chat_request_passes_few_files(model, tokenizer, compiled, most):  # noqa: F811
    """15 with the compiled step and a short message, 18 where the model itself reads a prompt."""
    if compiled:
        pytest.importorskip("numba")
    with tracing() as path:
        engine = Engine(model, tokenizer, capacity=100)
        engine.decode_step = open_step(model, "float32", print) if compiled else None
        engine.start()
        served = ServedModel("tiny", tokenizer, 100, 320, chat_tuned=True,
                             architecture=architecture(model))
        running = RunningServer(lambda: (served, engine)).wait()
        chat(running, "The state")
        path.clear()
        assert 1 < chat(running, "Un") <= 16  # the turn's beginning is in the cache
        files, report = path.files, str(path)
        running.stop()
    print(report)
    assert len(files) <= most


def test_a_training_step_passes_few_files(preset, data_folder, tmp_path, monkeypatch):
    step, paths = Loop._step, []

    def traced(loop, line):
        if loop.state.step != 3:
            return step(loop, line)
        with tracing() as path:
            step(loop, line)
            loop._save()
        return paths.append(path)

    monkeypatch.setattr(Loop, "_step", traced)
    pretrain(str(preset), [f"data.folder={data_folder}", "train.steps=5", "optim.rule=muon"],
             tmp_path / "run", "cpu", False, Console(quiet=True))
    print(paths[0])
    assert len(paths[0].files) <= 13
