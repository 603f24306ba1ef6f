"""Every layout trains as one process does: losses, gradient norms, routing, final weights."""
import functools

import pytest
import torch

from fira.data.batches import Batch
from fira.loss.head import next_token_loss
from fira.model import build_meta
from fira.model.fast import expert_linear
from fira.model.moe import ExpertLinear
from fira.model.spec import FIRA2Spec, FIRASpec
from fira.parallel.layout import Layout
from fira.train.optim import OptimConfig, make_optimizer, set_rates, update
from tests.parallel.ranks import mesh_of, on_ranks

SHAPE = {"vocab_size": 60, "d_model": 16, "n_head": 2, "num_layers": 4, "d_ff": 24,
         "num_experts": 4, "top_k": 2, "context": 8, "balance_weight": 0.02}
FIRA2 = FIRA2Spec(**SHAPE, n_kv_head=1, head_dim=8)
SPECS = {"fira": FIRASpec(**SHAPE, dropout=0.0), "fira2": FIRA2, "adapted": FIRA2,
         "quantile": FIRA2.model_copy(update={"balance": "quantile"}),
         "untied": FIRA2.model_copy(update={"tied": False, "look_back": True})}
BATCH = 8
LAYOUTS = {
    "data2": {"data": 2}, "shard2": {"shard": 2}, "expert2": {"expert": 2},
    "gpipe2": {"pipeline": 2}, "1f1b2": {"pipeline": 2},
    "data2-expert2": {"data": 2, "expert": 2}, "data2-pipeline2": {"data": 2, "pipeline": 2},
    "expert2-pipeline2": {"expert": 2, "pipeline": 2},
    "data2-shard2": {"data": 2, "shard": 2}, "expert2-shard2": {"expert": 2, "shard": 2},
}


class AdaptedLinear(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x) + x @ self.lora_down.T @ self.lora_up.T


class AdaptedExperts(ExpertLinear):
    def forward(self, rows_Ri, counts_E):
        hidden_Rr = expert_linear(rows_Ri, counts_E, self.lora_down, None)
        return super().forward(rows_Ri, counts_E) + expert_linear(hidden_Rr, counts_E,
                                                                  self.lora_up, None)


def adapt(model, rank=3):
    """Freeze all weights but some norms; add low-rank ones to attention and experts."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("moe_norm" in name)
    for block in model.blocks:
        for module, adapted in ((block.attention.qkv, AdaptedLinear),
                                (block.moe.experts.up, AdaptedExperts)):
            *experts, width_out, width_in = module.weight.shape
            module.__class__ = adapted
            for name, shape in (("lora_down", (*experts, rank, width_in)),
                                ("lora_up", (*experts, width_out, rank))):
                empty = torch.empty(shape, device=module.weight.device)
                module.register_parameter(name, torch.nn.Parameter(empty))
    return model


def batch(step):
    ids = torch.randint(0, 60, (BATCH, 9), generator=torch.Generator().manual_seed(step))
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


def cut(whole, rows, count=2):
    """Micro-batches of `count` rows, of a rank's rows of the whole batch."""
    return [Batch(*(part[i:i + count] for part in whole))
            for i in range(rows.start, rows.stop, count)]


def train(rank, arch, layout, rule, steps, starve):
    """Train as the loop does; every step's loss, norm and loads, and this rank's final weights."""
    model = build_meta(SPECS[arch])
    layout = Layout(mesh_of(rank, LAYOUTS.get(layout, {})),
                    adapt(model) if arch == "adapted" else model, seed=5,
                    schedule="gpipe" if layout == "gpipe2" else "1f1b")
    if starve:  # every row to experts 0 and 1: the second half gets none, nor a rank that has it
        for part in layout.slices(model.named_parameters()):
            if part.name.endswith("router.weight"):
                part.rows.zero_()
            elif part.name.endswith("router.bias"):
                preferred = torch.tensor([2.0, 1.0, -1.0, -2.0])
                part.rows.copy_(preferred[part.start:part.start + len(part.rows)])
    follows = 0.25 if rule == "muon" else 0.0  # those jobs have no pipeline
    optimizer = make_optimizer(model, OptimConfig(lr=2e-3, rule=rule, expert_interval=2,
                                                  head_follows=follows))
    record = []
    model.train()
    for step in range(steps):
        loss, _ = layout.forward_backward(cut(batch(step), layout.rows(BATCH)), next_token_loss)
        set_rates(optimizer, step, 1.0)
        norm = layout.gradient_norm()
        assert update(optimizer, loss, norm, max_norm=0.5)
        found = layout.end_step()
        record.append((loss, norm, found and found["load"], found and found["entropy"]))
    weights = [(p.name, p.start, p.rows.clone())
               for p in layout.slices(model.state_dict().items())]
    return record, weights


def train_all(rank, jobs):
    return {name: train(rank, *job) for name, job in jobs.items()}


def jobs_of(world):
    """Name -> arguments of `train` for everything that is compared on so many ranks."""
    jobs = {}
    for layout in LAYOUTS:
        if 2 ** len(layout.split("-")) == world:
            for arch in SPECS:
                steps = 8 if arch in ("fira", "fira2") else 3
                jobs[f"{arch} {layout}"] = (arch, layout, "adamw", steps, False)
            if "pipeline" not in LAYOUTS[layout]:
                jobs[f"muon {layout}"] = ("untied", layout, "muon", 4, False)
            if "expert" in LAYOUTS[layout]:
                jobs[f"starved {layout}"] = ("fira", layout, "adamw", 3, True)
    return jobs


JOBS = {2: jobs_of(2), 4: jobs_of(4)}


@functools.cache
def alone(arch, rule, steps, starve):
    """The one-process run of a job."""
    return train(0, arch, "one process", rule, steps, starve)


@pytest.fixture(scope="module")
def results():
    """world -> what each rank did in every job, in one set of processes."""
    return {world: on_ranks(world, train_all, jobs) for world, jobs in JOBS.items()}


@pytest.mark.parametrize("world,name", [(world, name) for world in JOBS for name in JOBS[world]])
def test_a_layout_equals_one_process(world, name, results):
    arch, _, rule, steps, starve = JOBS[world][name]
    expected, weights = alone(arch, rule, steps, starve)
    if starve:
        assert all(loads == [0.5, 0.5, 0, 0] for row in expected for loads in row[2])
    whole = {key: rows for key, _, rows in weights}
    seen = dict.fromkeys(whole, 0)
    for rank in results[world]:
        record, parts = rank[name]
        for ours, theirs in zip(record, expected, strict=True):
            assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
            assert ours[1] == pytest.approx(theirs[1], rel=1e-4)
            assert ours[2] == theirs[2]
            assert ours[3] == pytest.approx(theirs[3], abs=1e-5)
        for key, start, rows in parts:
            torch.testing.assert_close(rows, whole[key][start:start + len(rows)] if rows.dim()
                                       else whole[key], atol=1e-4, rtol=0)
            seen[key] += rows.numel()
    assert all(seen[key] >= whole[key].numel() for key in whole)
