"""A FIRA2 with widths that every GGUF type takes, and a FIRA, both trained for a moment."""
from __future__ import annotations

import json
import shutil

import pytest
from rich.console import Console

from fira.files import write_manifest
from fira.infer.load import load
from fira.stages.pretrain import pretrain

WIDTHS = ["model.d_model=256", "model.n_head=4", "model.n_kv_head=2", "model.head_dim=64",
          "model.d_ff=256"]
HARD = ["Größe, naïve café, Ǆ ﬁ e\u0301", "你好,世界。こんにちは 한국어", "🙂🙃👩‍👩‍👧 🇫🇷",
        "3.14159 2026-11-24 1,000,000",
        "def f(x):\n    return x**2  # ok\n\n\tpass", "  two  spaces\r\n\r\n", "it's I'LL don't",
        "user says <|im_end|> and <|endoftext|><think>", "\u0000\u200b\u00a0\ufeff", "The Union"]

ADD = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
KINDS = [  # conversations with tools, and with thoughts
    {"messages": [{"role": "user", "content": "1 + 1?"},
                  {"role": "assistant", "content": "I add.", "tool_calls": [CALL]},
                  {"role": "tool", "content": "2"}, {"role": "tool", "content": "3"},
                  {"role": "assistant", "content": "2."}], "tools": json.dumps([ADD])},
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"},
                  {"role": "assistant", "reasoning_content": "Hm.", "content": "So."},
                  {"role": "user", "content": "And?"},
                  {"role": "assistant", "reasoning_content": "Hm!", "content": "No."}]},
]


def train(preset, data_folder, folder, *settings):
    pretrain(str(preset), [f"data.folder={data_folder}", *settings], folder, "cpu", False,
             Console(quiet=True))
    return folder


def trained(*settings):
    """A fixture: the preset of all tests, trained with `settings`."""
    @pytest.fixture(scope="session")
    def make(preset, data_folder, tmp_path_factory):
        return train(preset, data_folder, tmp_path_factory.mktemp("trained") / "run", *settings)
    return make


run = trained(*WIDTHS, "train.steps=40")
dense_run = trained("model.num_experts=1", "model.top_k=1", "train.steps=10")
untied_run = trained("model.tied=false", "train.steps=10")
top1_run = trained("model.top_k=1", "train.steps=10")
raw_run = trained("model.renormalize=false", "model.norm_eps=1e-4", "train.steps=10")


@pytest.fixture(scope="session")
def founding_run(preset, data_folder, tmp_path_factory):
    """A FIRA of the same small size; its spec has other fields, so the preset is its own."""
    text = preset.read_text().replace('"fira2"', '"fira"')
    path = tmp_path_factory.mktemp("founding") / "fira.toml"
    path.write_text("\n".join(line for line in text.splitlines()
                              if not line.startswith(("n_kv_head", "head_dim"))))
    return train(path, data_folder, path.parent / "run", "train.steps=10")


@pytest.fixture(scope="session")
def chat_run(run, tmp_path_factory):
    """The same run, whose step folders say that the model knows chat turns."""
    folder = shutil.copytree(run, tmp_path_factory.mktemp("chat") / "chat")
    for path in folder.glob("step-*/config.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat": True}))
        write_manifest(path.parent)
    return folder


@pytest.fixture(scope="session")
def loaded(run):
    return load(run, "cpu")
