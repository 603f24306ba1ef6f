"""Configuration: presets, overrides, and one clear line for every mistake."""
import pytest

from fira.config import ConfigError, flatten, load_preset, override, preset_names
from fira.stages.config import configure
from fira.stages.pretrain import PRETRAIN


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_resolves_to_itself(name):
    config = configure(PRETRAIN, load_preset(name), ())
    assert configure(PRETRAIN, config.model_dump(), ()) == config


def test_an_override_changes_only_its_key():
    base, changed = (flatten(configure(PRETRAIN, load_preset("tiny"), settings))
                     for settings in ((), ("optim.lr=1e-4",)))
    assert {key for key in base if base[key] != changed[key]} == {"optim.lr"}
    assert changed["optim.lr"] == 1e-4


@pytest.mark.parametrize("setting, words", [
    ("optim.leanring_rate=1", ["optim.leanring_rate", "unknown"]),
    ("optim.embeding_lr=0.1", ["did you mean optim.embedding_lr"]),
    ("optim.weight_decay=0.2", ["optim.weight_decay", "0.1 in every run"]),
    ("optim.turns=2", ["optim.turns", "optim.expert_interval"]),
    ("model.num_expert=3", ["did you mean model.num_experts"]),
    ("speed=9", ["unknown key speed", "--dry-run lists every key"]),
    ("model=5", ["model is a section", "write model.KEY=VALUE"]),
    ("optim.lr=fast", ["optim.lr=fast", "number", "peak learning rate", "optim.lr=0.0006"]),
    ("optim.lr=1e999", ["optim.lr=inf", "finite number"]),
    ("train.steps=1.5", ["train.steps=1.5", "valid integer"]),
    ("optim.lr=-1", ["optim.lr=-1", "greater than 0", "0.0006"]),
    ("model.top_k=99", ["top_k=99", "num_experts", "at most"]),
    ("model.n_kv_head=3", ["n_kv_head=3", "divide", "try n_kv_head=2"]),
    ("model.architecture=gpt", ["architecture", "fira2"]),
    ("train.sequence_length=100000", ["train.batch_tokens", "try"]),
    ("train.steps=0", ["train.steps=0", "greater than or equal to 1"]),
    ("train.steps", ["section.key=value"]),
    ("train.batch_tokens=1000", ["batch_tokens=1000", "try train.batch_tokens=2048"]),
    ("train.first_length=48", ["first_length=48", "by doubling", "try train.first_length=64"]),
    ("model.context=8", ["train.sequence_length", "model.context=8"]),
])
def test_a_mistake_is_one_line_with_value_rule_and_remedy(setting, words):
    with pytest.raises(ConfigError) as error:
        configure(PRETRAIN, load_preset("tiny"), [setting])
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_heads_must_divide_the_width_of_the_founding_model():
    with pytest.raises(ConfigError, match="n_head=7 must divide d_model=768; try n_head=6"):
        configure(PRETRAIN, load_preset("fira-334m"), ["model.n_head=7"])


def test_a_horizon_given_replaces_the_presets():
    assert configure(PRETRAIN, load_preset("tiny"), ["train.steps=7"]).train.minutes is None
    assert configure(PRETRAIN, load_preset("fira-334m"), ["train.minutes=7.0"]).train.steps is None


def test_override_leaves_its_input_alone():
    data = {"a": {"b": 1}}
    assert override(data, ["a.b=2"]) == {"a": {"b": 2}}
    assert data == {"a": {"b": 1}}


def test_sequences_double():
    train = configure(PRETRAIN, load_preset("tiny"), ["train.first_length=16"]).train
    assert train.sequence_length == 128 and train.lengths == [16, 32, 64, 128]
    assert configure(PRETRAIN, load_preset("tiny"), []).train.lengths == [128]
