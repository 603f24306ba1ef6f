"""The plan's numbers are those of the code: memory kept, bytes sent, parameters held.

The large presets on 64 ranks, at full depth and width, use torch's fake process group and tensors:
nothing is computed or sent, but every group, exchange and gather is the real one, and so is every
shape but those inside the experts, which are multiplied as one.
"""
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # noqa: F401 (teaches fake tensors to be sent)
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from fira.config import load_preset
from fira.data.batches import Batch
from fira.loss.head import next_token_loss
from fira.model import build, build_meta
from fira.model.spec import FIRA2Spec, FIRASpec
from fira.parallel.layout import Layout
from fira.parallel.mesh import AXES, Mesh
from fira.parallel.plan import Work, activations_per_token, count_elements, memory_of, sent_by
from fira.stages.config import configure
from fira.stages.pretrain import PRETRAIN
from fira.train.optim import OptimConfig, make_optimizer, update
from tests.parallel.ranks import mesh_of, on_ranks
from tests.parallel.test_parity import cut


class Traffic(TorchDispatchMode):
    """Counts the bytes that this rank sends, as torch's dispatcher sees them; sums as in a ring,
    gathering as from each rank to each other. Sums of counts (float64) and recording (a few hundred
    bytes) are not planned."""

    def __init__(self):
        super().__init__()
        self.sent = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        space, _, name = func._schema.name.partition("::")
        if space == "c10d" and name not in ("recv_", "allgather_"):
            self.sent += SENT[name](*args)
        return func(*args, **(kwargs or {}))


def size_of(group):
    return dist.ProcessGroup.unbox(group).size()


def all_reduce(tensors, group, *_):
    tensors = [t for t in tensors if t.dtype == torch.float32]
    return sum(t.nbytes for t in tensors) * 2 * (size_of(group) - 1) / size_of(group)


def all_to_all(_, tensor, group, receive, send, *rest):
    if not send:
        return tensor.nbytes * (size_of(group) - 1) / size_of(group)
    own = send[dist.ProcessGroup.unbox(group).rank()]
    return (sum(send) - own) * tensor[:1].nbytes


SENT = {"allreduce_": all_reduce, "alltoall_base_": all_to_all,
        "_allgather_base_": lambda _, tensor, group, *rest: tensor.nbytes * (size_of(group) - 1),
        "_reduce_scatter_base_": lambda part, _, group, *rest: part.nbytes * (size_of(group) - 1),
        "send": lambda tensors, *rest: sum(t.nbytes for t in tensors)}


WIDE = {"vocab_size": 1000, "d_model": 130, "n_head": 5, "num_layers": 3, "d_ff": 70,
        "num_experts": 6, "top_k": 6, "context": 32}  # all experts: loads are balanced exactly
SPECS = [FIRASpec(**WIDE), FIRASpec(**WIDE, dropout=0.0),
         FIRA2Spec(**WIDE, n_kv_head=1, head_dim=24), FIRA2Spec(**(WIDE | {"top_k": 2}),
                                                               n_kv_head=5, head_dim=24),
         FIRA2Spec(**WIDE, n_kv_head=1, head_dim=24, tied=False)]
IDS = torch.randint(0, 1000, (16, 33), generator=torch.Generator().manual_seed(0))
TOKENS, TARGETS = IDS[:, :-1].contiguous(), IDS[:, 1:].contiguous()


@pytest.fixture(scope="module", autouse=True)
def plain_experts():
    """A plan is for any device, with the experts that any device can have."""
    with mock.patch("fira.model.fast.HAS_BATCH", False):
        yield


def kept_bytes(model, tokens, targets):
    """Bytes of what autograd keeps for a batch, parameters and buffers apart."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor, storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        next_token_loss(model, Batch(tokens, targets))
    return sum(size for _, size in kept.values())


@pytest.mark.parametrize("spec", SPECS)
def test_a_layer_keeps_what_the_plan_says(spec):
    two, three = (kept_bytes(build(spec.model_copy(update={"num_layers": layers}), seed=0).train(),
                             TOKENS, TARGETS) for layers in (2, 3))
    assert activations_per_token(spec) * 4 * TOKENS.numel() == pytest.approx(three - two, rel=0.03)


LAYOUTS = {
    2: [{"data": 2}, {"expert": 2}, {"shard": 2}, {"pipeline": 2}],
    4: [{"data": 2, "expert": 2}, {"data": 2, "shard": 2}, {"expert": 2, "shard": 2},
        {"data": 2, "pipeline": 2}, {"expert": 2, "pipeline": 2}, {"pipeline": 4}]}


def measured(rank, spec, jobs):
    """Per job: this rank's pipeline stage; bytes of weights, gradients, optimizer state and kept
    activations; all bytes sent in a step."""
    found = []
    for rule, sizes in jobs:
        layout = Layout(mesh_of(rank, sizes), build_meta(spec), seed=0)
        model = layout.model.train()
        optimizer = make_optimizer(model, OptimConfig(rule=rule))
        batches = cut(Batch(TOKENS, TARGETS), layout.rows(16))
        for _ in range(2):  # a pipeline's first step also makes its connections
            with Traffic() as traffic:
                loss, _ = layout.forward_backward(batches, next_token_loss)
                gradients = sum(getattr(p.grad, "_local_tensor", p.grad).nbytes
                                for p in model.parameters())
                update(optimizer, loss, layout.gradient_norm())
                layout.end_step()
        weights = sum(part.rows.nbytes for part in layout.slices(model.named_parameters()))
        state = sum(tensor.nbytes for one in optimizer.state.values() for tensor in one.values())
        kept = 0 if "shard" in sizes or "pipeline" in sizes else kept_bytes(model, *batches[0])
        found.append((layout.mesh.place["pipeline"], weights, gradients, state, kept, traffic.sent))
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_memory_and_bytes_sent_are_as_planned(world):
    even = {"num_layers": 4, "num_experts": 4, "top_k": 4}  # all ranks hold as much
    spec = SPECS[2].model_copy(update=even)
    jobs = [("adamw", sizes) for sizes in LAYOUTS[world]]
    if world == 2:  # with shards Muon gathers matrices, too
        jobs += [("muon", sizes) for sizes in LAYOUTS[world] if "shard" not in sizes]
    results = on_ranks(world, measured, spec, jobs)
    for number, (rule, sizes) in enumerate(jobs):
        work, grid = Work(spec, 16, 2, 32, rule), tuple(sizes.get(axis, 1) for axis in AXES)
        for place, weights, gradients, state, kept, sent in (r[number] for r in results):
            parts = memory_of(work, grid, place)
            assert weights == pytest.approx(parts["gradients"], rel=0.01)  # as many floats
            assert gradients == pytest.approx(parts["gradients"], rel=0.01)
            assert state == pytest.approx(parts["optimizer"], rel=0.01)
            if kept:  # of the logits the head's gradient
                planned = parts["activations"] + 4 * spec.vocab_size * spec.d_model
                assert kept == pytest.approx(planned, rel=0.03)
            planned = sum(sent_by(work, grid, place).values())
            assert sent == pytest.approx(planned, rel=1e-6), sizes


class Values(TorchDispatchMode):
    """What depends on data, which fake tensors do not know: every number is 1."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1.0 if args[0].dtype.is_floating_point else 1
        if func is torch.ops.aten.bincount.default:
            return args[0].new_empty((kwargs or {}).get("minlength") or args[2])
        return func(*args, **(kwargs or {}))


LENGTH = 128  # tokens of a sequence: divides into equal rows for all experts
LOSS = {"loss": [(1.0, 1.0)]}  # from the last stage of a pipeline
ONE_PRODUCT = SimpleNamespace(apply=lambda rows_Ri, counts_E, weight: rows_Ri @ weight.sum(0).T)


TO_EMPTY = torch.nn.Module.to_empty


def to_empty(model, *, device):
    """Replaces what gets memory, which fake parameters cannot get in place; those of FSDP can."""
    for module in model.modules():
        for table, make in ((module._parameters, torch.nn.Parameter),
                            (module._buffers, torch.Tensor.detach)):
            table.update({name: make(torch.empty_like(tensor, device=device))
                          for name, tensor in table.items() if tensor is not None})
    return model


def step_once(spec, sizes, rank):
    """Build `rank`'s part of `spec` and train a step; returns its stage and its parameters."""
    mesh, rows = mesh_of(rank, sizes), LENGTH * spec.top_k
    if "shard" in sizes:
        assert mesh.shard_meshes  # made before tensors are fake

    def balanced(counts):
        return [rows // len(counts)] * len(counts)

    with (mock.patch.object(Mesh, "gather", lambda mesh, value: [value, LOSS]),
          mock.patch("fira.model.fast.SortedLinear", ONE_PRODUCT),
          mock.patch("torch.nn.Module.to_empty", TO_EMPTY if "shard" in sizes else to_empty),
          mock.patch.object(FakeTensor, "tolist", balanced), FakeTensorMode(), Values()):
        layout = Layout(mesh, build_meta(spec), seed=0)
        optimizer = make_optimizer(layout.model.train(), OptimConfig())
        tokens_BT = torch.zeros(1, LENGTH, dtype=torch.long)
        batches = [Batch(tokens_BT, tokens_BT)] * mesh.sizes["pipeline"]
        loss, _ = layout.forward_backward(batches, next_token_loss)
        assert all(p.grad is not None for p in layout.model.parameters())
        assert update(optimizer, loss, layout.gradient_norm())
        assert len(optimizer.state) == len(list(layout.model.parameters()))
        return mesh.place["pipeline"], sum(
            part.rows.numel() for part in layout.slices(layout.model.named_parameters()))


@pytest.mark.parametrize("preset,sizes", [
    ("fira2-7b", {"shard": 2, "expert": 32}),
    ("fira2-7b", {"pipeline": 8, "expert": 8}),
    ("fira2-30b", {"shard": 8, "expert": 8}),
    ("fira2-30b", {"pipeline": 4, "expert": 16}),
])
def test_a_rank_of_64_is_built_and_steps_without_the_whole_model(preset, sizes):
    spec = configure(PRETRAIN, load_preset(preset), ()).model
    dist.init_process_group("fake", rank=37, world_size=64, store=FakeStore())
    try:
        stage, held = step_once(spec, sizes, 37)
    finally:
        dist.destroy_process_group()
    planned = count_elements(spec, tuple(sizes.get(axis, 1) for axis in AXES), stage)
    assert held == pytest.approx(planned["all"] / sizes.get("shard", 1), rel=0.01)
    assert held < 0.06 * count_elements(spec, (1, 1, 1, 1), 0)["all"]


@pytest.mark.parametrize("preset,total,active", [("fira2-7b", 7e9, 1e9), ("fira2-30b", 30e9, 3e9)])
def test_the_large_presets_fit_64_gpus(preset, total, active, fira):
    answer = fira("plan", preset, "--gpus", 64, "--tokens", 1e12)
    assert answer.code == 0 and "days" in answer.out and "data" in answer.out
    spec = configure(PRETRAIN, load_preset(preset), ()).model
    found = count_elements(spec, (1, 1, 1, 1), 0)
    assert found["all"] >= total
    idle = found["experts"] * (1 - spec.top_k / spec.num_experts)
    assert found["all"] - idle >= active


def test_what_cannot_be_planned_is_one_line(refused):
    assert "no layout of fira2-30b fits 1 x" in refused("plan", "fira2-30b", "--gpus", 1, code=2)
    assert "device 'h1000' is unknown" in refused("plan", "tiny", "--device", "h1000", code=2)
