"""create_pipeline_model: the founding call trains as the unsplit model does."""
import pytest
import torch

from fira.config import ConfigError
from fira.data.batches import Batch
from fira.loss.head import next_token_loss
from fira.model import build
from fira.model.router import end_step, health, routers
from fira.train.optim import OptimConfig, make_optimizer
from tests.parallel.ranks import on_ranks
from tests.parallel.test_parity import SPECS, batch
from training_with_MoE import create_pipeline_model

STEPS, CLIP = 6, 0.3


def train_split(rank, arch, schedules, stages=2):
    """Per schedule: losses, norms and loads, and weights under this rank's names. On one rank the
    stages share the CPU."""
    results = []
    for schedule in schedules:
        pipe = create_pipeline_model(build(SPECS[arch], seed=5), stages, None, 4, schedule)
        optimizer, record = make_optimizer(pipe, OptimConfig(lr=2e-3)), []
        pipe.train()
        for step in range(STEPS):
            loss = pipe.train_batch(*batch(step))
            norm = pipe.clip_gradients(CLIP)
            optimizer.step()
            optimizer.zero_grad()
            loads = health(routers(pipe.model))["load"]
            pipe.end_step()
            record.append((loss, norm, loads))
        results.append((record, {name: value.clone() for name, value in pipe.state_dict().items()}))
    return results


@pytest.fixture(scope="module", params=["fira", "fira2"])
def unsplit(request):
    model = build(SPECS[request.param], seed=5)
    optimizer, record = make_optimizer(model, OptimConfig(lr=2e-3)), []
    for step in range(STEPS):
        loss, _ = next_token_loss(model, Batch(*batch(step)))
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP))
        optimizer.step()
        optimizer.zero_grad()
        loads = health(routers(model))["load"]
        end_step(model)
        record.append((float(loss.detach()), norm, loads))
    return request.param, record, model.state_dict()


def assert_same(record, weights, unsplit, loads=True):
    for ours, theirs in zip(record, unsplit[1], strict=True):
        assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
        assert ours[1] == pytest.approx(theirs[1], rel=1e-4)
        assert not loads or ours[2] == theirs[2]
    for name, value in weights.items():
        torch.testing.assert_close(value, unsplit[2][name], atol=1e-4, rtol=0)


def test_stages_on_the_devices_of_one_process(unsplit):
    for stages in (1, 2, 4):
        (record, weights), = train_split(0, unsplit[0], ["GPipe"], stages)
        assert weights.keys() == unsplit[2].keys()
        assert_same(record, weights, unsplit)


def test_a_stage_on_each_rank(unsplit):
    first, last = on_ranks(2, train_split, unsplit[0], ["GPipe", "1F1B"], join=False)
    for ours, theirs in zip(first, last, strict=True):
        assert_same(*ours, unsplit, loads=False)
        assert_same(*theirs, unsplit, loads=False)
        assert ours[1].keys() | theirs[1].keys() == unsplit[2].keys() > ours[1].keys()


@pytest.mark.parametrize("options,words", [
    ({"schedule": "chimera"}, "schedule='chimera' is unknown; choose GPipe or 1F1B"),
    ({"schedule": "1F1B"}, "needs a process for every stage.*torchrun --nproc-per-node 2"),
    ({"num_stages": 9}, "num_stages=9 must be from 1 to the model's 4 blocks"),
    ({"devices": ["cpu"]}, "are 1, but num_stages=2"),
])
def test_what_cannot_be_split_is_one_line(options, words):
    with pytest.raises(ConfigError, match=words):
        create_pipeline_model(build(SPECS["fira"], seed=0), **options)


@pytest.mark.parametrize("fraction, left", [(0.5, True), (1.0, False)])
def test_a_handover_fades_as_far_as_the_caller_says(fraction, left):
    model = build(SPECS["fira2"].model_copy(update={"balance": "handover"}), seed=5)
    pipe = create_pipeline_model(model, num_stages=2, chunks=2)
    pipe.train()
    pipe.train_batch(*batch(0))
    pipe.end_step(fraction)
    assert all(bool(router.selection_bias_E.any()) == left for router in routers(pipe.model))
