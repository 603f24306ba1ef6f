"""A head that follows the embedding moves as the sum it stands for would."""
import pytest
import torch
from torch.nn import functional as F

from fira.model import build
from fira.model.spec import FIRA2Spec
from fira.stages.pretrain import PRETRAIN
from fira.stages.run import configure
from fira.train.optim import OptimConfig, make_optimizer, rotated, rotated_back, set_rates

STRENGTH = 0.25
SPEC = FIRA2Spec(vocab_size=40, d_model=16, n_head=2, n_kv_head=1, head_dim=8, num_layers=1,
                 d_ff=8, num_experts=2, top_k=1, context=8, tied=False)


def steps(rule, whole):
    """Three steps, `whole` with the sum in the forward pass, else by `head_follows`."""
    model = build(SPEC, seed=0)
    embedding, head = model.token_embedding.weight, model.head.weight
    if whole:  # what the head learns for itself is what is left of it
        with torch.no_grad():
            head.sub_(STRENGTH * rotated(embedding))
    optimizer = make_optimizer(model, OptimConfig(
        rule=rule, lr=0.01, embedding_lr=0.05, head_follows=0.0 if whole else STRENGTH),
        weight_decay=0.0)
    for step in range(3):
        ids = torch.randint(0, 40, (4, 9), generator=torch.Generator().manual_seed(step))
        rows = STRENGTH * rotated(embedding) + head if whole else head
        logits = F.linear(model.features(ids[:, :-1]), rows)
        F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        set_rates(optimizer, step, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return embedding, STRENGTH * rotated(embedding) + head if whole else head


@pytest.mark.parametrize("rule", ["adamw", "muon"])
def test_following_equals_learning_the_two_parts_of_a_sum(rule):
    for ours, theirs in zip(steps(rule, False), steps(rule, True), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("width", [6, 7])
def test_a_quarter_turn_is_orthogonal_and_has_an_inverse(width):
    rows = torch.randn(5, width, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rotated_back(rotated(rows)), rows)
    torch.testing.assert_close(rotated(rows) @ rotated(rows).T, rows @ rows.T)
    if width % 2 == 0:
        torch.testing.assert_close((rotated(rows) * rows).sum(1), torch.zeros(5))


@pytest.mark.parametrize(("setting", "remedy"), [
    ("model.tied=true", "set model.tied=false or optim.head_follows=0"),
    ("parallel.pipeline=2", "set the first to 0 or the second to 1")])
def test_what_has_no_head_to_move_is_refused(setting, remedy):
    preset = {"model": SPEC.model_dump(), "train": {"steps": 1, "sequence_length": 8,
                                                    "batch_tokens": 32}}
    configure(PRETRAIN, preset, ["optim.head_follows=0.25"])
    with pytest.raises(ValueError, match=remedy):
        configure(PRETRAIN, preset, ["optim.head_follows=0.25", setting])
