"""Muon: orthogonal updates, expert stacks as single matrices, AdamW for the rest; and a head that
follows the embedding moves as the sum that it stands for would."""
import pytest
import torch
from torch.nn import functional as F

from fira.model import build
from fira.model.spec import FIRA2Spec
from fira.stages.config import configure
from fira.stages.pretrain import PRETRAIN
from fira.train import optim
from fira.train.optim import MuonAdamW, OptimConfig, make_optimizer, orthogonalize, set_rates

SHAPE = {"vocab_size": 40, "d_model": 16, "n_head": 2, "n_kv_head": 1, "head_dim": 8,
         "num_layers": 1, "d_ff": 8, "context": 8}


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16), (3, 16, 24)])
def test_orthogonalized_singular_values_are_near_one_and_directions_stay(shape, monkeypatch):
    monkeypatch.setattr(optim, "product_dtype", lambda device: torch.float32)
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    result = orthogonalize(matrix)
    inner = u.mT @ result @ vt.mT  # diagonal if the singular directions are kept
    values = torch.diagonal(inner, dim1=-2, dim2=-1)
    norm = torch.linalg.matrix_norm(matrix).unsqueeze(-1)
    assert 0.49 < float(values[s > 0.006 * norm].min()) and float(values.max()) < 1.51
    torch.testing.assert_close(inner, torch.diag_embed(values), atol=1e-3, rtol=0)


def test_bfloat16_products_orthogonalize_nearly_as_well(monkeypatch):
    matrices = torch.randn(8, 64, 128, generator=torch.Generator().manual_seed(0))
    exact, rounded = [], []
    for dtype, results in ((torch.float32, exact), (torch.bfloat16, rounded)):
        monkeypatch.setattr(optim, "product_dtype", lambda device, dtype=dtype: dtype)
        results.append(orthogonalize(matrices))
    assert rounded[0].dtype == torch.float32
    assert 0 < float((rounded[0] - exact[0]).norm() / exact[0].norm()) < 0.02


def test_a_stack_of_experts_is_updated_as_single_matrices():
    weights = torch.randn(3, 12, 8, generator=torch.Generator().manual_seed(1))
    gradient = torch.randn(3, 12, 8, generator=torch.Generator().manual_seed(2))
    stack = torch.nn.Parameter(weights.clone())
    singles = [torch.nn.Parameter(weights[e].clone()) for e in range(3)]
    for parameters, gradients in (([stack], [gradient]), (singles, list(gradient))):
        group = {"params": parameters, "rule": "muon", "lr": 0.1, "weight_decay": 0.1}
        optimizer = MuonAdamW([group], (0.9, 0.95))
        for parameter, one in zip(parameters, gradients, strict=True):
            parameter.grad = one.clone()
        optimizer.step()
    torch.testing.assert_close(stack, torch.stack([p.detach() for p in singles]))


def test_the_adamw_part_equals_torch():
    weights = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    ours, theirs = (torch.nn.Parameter(weights.clone()) for _ in range(2))
    group = {"params": [ours], "rule": "adamw", "lr": 0.01, "weight_decay": 0.1}
    optimizers = (MuonAdamW([group], (0.9, 0.95)),
                  torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1))
    for step in range(3):
        gradient = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


def test_an_expert_without_gradient_keeps_its_direction_of_rest():
    stack = torch.nn.Parameter(torch.ones(2, 6, 4))
    optimizer = MuonAdamW([{"params": [stack], "rule": "muon", "lr": 0.1, "weight_decay": 0.0}],
                          (0.9, 0.95))
    stack.grad = torch.zeros(2, 6, 4)
    stack.grad[1] = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert torch.equal(stack[0], torch.ones(6, 4)) and not torch.equal(stack[1], torch.ones(6, 4))


@pytest.mark.parametrize("experts", [5, 2])  # of two, nobody moves in the third step
def test_experts_updated_every_nth_step_move_as_far(experts):
    weights, gradient = torch.randn(2, experts, 6, 4, generator=torch.Generator().manual_seed(0))
    ends = []
    for interval in (1, 3):
        stack = torch.nn.Parameter(weights.clone())
        optimizer = MuonAdamW([{"params": [stack], "rule": "muon", "peak_lr": 0.1,
                                "interval": interval, "weight_decay": 0.0}], (0.9, 0.95))
        for step in range(3):
            before = stack.detach().clone()
            stack.grad = gradient.clone()
            set_rates(optimizer, step, 0.5)
            optimizer.step()
            moved = (stack.detach() != before).flatten(1).any(dim=1).tolist()
            assert moved == [interval == 1 or expert % 3 == step for expert in range(experts)]
        ends.append(stack.detach())
    torch.testing.assert_close(ends[0], ends[1])  # by an unchanging gradient


def test_only_inner_matrices_are_muons():
    model = build(FIRA2Spec(**SHAPE, num_experts=2, top_k=1), seed=0)
    groups = make_optimizer(model, OptimConfig(rule="muon")).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    muons = {names[id(p)].split(".", 2)[2]
             for group in groups if group["rule"] == "muon" for p in group["params"]}
    assert muons == {"attention.qkv.weight", "attention.output.weight", "moe.experts.gate.weight",
                     "moe.experts.up.weight", "moe.experts.down.weight"}


def test_a_dense_model_is_updated_in_every_step():
    for experts, interval in ((4, 3), (1, 1)):
        model = build(FIRA2Spec(**SHAPE, num_experts=experts, top_k=1), seed=0)
        groups = make_optimizer(model, OptimConfig(rule="muon", expert_interval=3)).param_groups
        assert [group["interval"] for group in groups if group["rule"] == "muon"] == [interval]


STRENGTH = 0.25
UNTIED = FIRA2Spec(**SHAPE, num_experts=2, top_k=1, tied=False)


def steps(rule, whole):
    """Three steps, `whole` with the sum in the forward pass, else by `head_follows`."""
    model = build(UNTIED, seed=0)
    embedding, head = model.token_embedding.weight, model.head.weight
    if whole:  # what the head learns for itself is what is left of it
        with torch.no_grad():
            head.sub_(STRENGTH * optim.rotated(embedding))
    optimizer = make_optimizer(model, OptimConfig(
        rule=rule, lr=0.01, embedding_lr=0.05, head_follows=0.0 if whole else STRENGTH),
        weight_decay=0.0)
    for step in range(3):
        ids = torch.randint(0, 40, (4, 9), generator=torch.Generator().manual_seed(step))
        rows = STRENGTH * optim.rotated(embedding) + head if whole else head
        logits = F.linear(model.features(ids[:, :-1]), rows)
        F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        set_rates(optimizer, step, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return embedding, STRENGTH * optim.rotated(embedding) + head if whole else head


@pytest.mark.parametrize("rule", ["adamw", "muon"])
def test_following_equals_learning_the_two_parts_of_a_sum(rule):
    torch.testing.assert_close(steps(rule, False), steps(rule, True), atol=1e-5, rtol=0)


@pytest.mark.parametrize("width", [6, 7])
def test_a_quarter_turn_is_orthogonal_and_has_an_inverse(width):
    rows = torch.randn(5, width, generator=torch.Generator().manual_seed(0))
    assert torch.equal(optim.rotated_back(optim.rotated(rows)), rows)
    torch.testing.assert_close(optim.rotated(rows) @ optim.rotated(rows).T, rows @ rows.T)
    if width % 2 == 0:
        torch.testing.assert_close((optim.rotated(rows) * rows).sum(1), torch.zeros(5))


@pytest.mark.parametrize(("setting", "remedy"), [
    ("model.tied=true", "set model.tied=false or optim.head_follows=0"),
    ("parallel.pipeline=2", "set the first to 0 or the second to 1")])
def test_what_has_no_head_to_move_is_refused(setting, remedy):
    preset = {"model": UNTIED.model_dump(), "train": {"steps": 1, "sequence_length": 8,
                                                    "batch_tokens": 32}}
    configure(PRETRAIN, preset, ["optim.head_follows=0.25"])
    with pytest.raises(ValueError, match=remedy):
        configure(PRETRAIN, preset, ["optim.head_follows=0.25", setting])
