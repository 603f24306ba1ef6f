"""The large presets on 64 ranks, at full depth and width: torch's fake process group and tensors.

Nothing is computed or sent, but every group, exchange and gather is the real one, and so is every
shape but those inside the experts, which are multiplied as one.
"""
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # noqa: F401 (teaches fake tensors to be sent)
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from fira.config import load_preset
from fira.data.batches import Batch
from fira.loss.head import next_token_loss
from fira.model import build_meta
from fira.parallel.layout import Layout
from fira.parallel.mesh import AXES, Mesh, make_mesh
from fira.parallel.plan import count_elements
from fira.stages.pretrain import PRETRAIN
from fira.stages.run import configure
from fira.train.optim import OptimConfig, make_optimizer, update

LOSS = {"loss": (1.0, 1.0)}  # from the last stage of a pipeline
ONE_PRODUCT = SimpleNamespace(apply=lambda rows_Ri, counts_E, weight: rows_Ri @ weight.sum(0).T)
LENGTH = 128  # tokens of a sequence: divides into equal rows for all experts


class Values(TorchDispatchMode):
    """What depends on data, which fake tensors do not know: every number is 1."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1.0 if args[0].dtype.is_floating_point else 1
        if func is torch.ops.aten.bincount.default:
            return args[0].new_empty((kwargs or {}).get("minlength") or args[2])
        return func(*args, **(kwargs or {}))


TO_EMPTY = torch.nn.Module.to_empty


def to_empty(model, *, device):
    """Fake parameters cannot change in place, so they are replaced; FSDP's are not fake yet."""
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return TO_EMPTY(model, device=device)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, device=device)
                module._parameters[name] = torch.nn.Parameter(empty)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype,
                                                    device=device)
    return model


def step_once(spec, sizes, rank):
    """Build `rank`'s part of `spec` and train a step; returns its parameters and the layout."""
    mesh = make_mesh(sizes, rank, torch.device("cpu"))
    if sizes["shard"] > 1:
        assert mesh.shard_meshes  # made before tensors are fake
    rows = LENGTH * spec.top_k

    def balanced(counts):
        return [rows // len(counts)] * len(counts)

    with (mock.patch.object(Mesh, "gather", lambda mesh, value: [value, LOSS]),
          mock.patch.object(torch.nn.Module, "to_empty", to_empty),
          mock.patch("fira.model.fast.SortedLinear", ONE_PRODUCT),
          mock.patch.object(FakeTensor, "tolist", balanced), FakeTensorMode(), Values()):
        layout = Layout(mesh, build_meta(spec), seed=0)
        layout.model.train()
        optimizer = make_optimizer(layout.model, OptimConfig())
        tokens_BT = torch.zeros(1, LENGTH, dtype=torch.long)
        cut = [Batch(tokens_BT, tokens_BT)] * sizes["pipeline"]
        loss, _ = layout.forward_backward(cut, next_token_loss)
        without = [name for name, p in layout.model.named_parameters() if p.grad is None]
        assert not without
        assert update(optimizer, loss, layout.gradient_norm())
        assert len(optimizer.state) == len(list(layout.model.parameters()))
        return {p.name: p.rows.numel() for p in layout.slices(layout.model.named_parameters())}


@pytest.fixture
def rank_of_64():
    dist.init_process_group("fake", rank=37, world_size=64, store=FakeStore())
    yield 37
    dist.destroy_process_group()


@pytest.mark.parametrize("preset,sizes", [
    ("fira2-7b", {"shard": 2, "expert": 32}),
    ("fira2-7b", {"pipeline": 8, "expert": 8}),
    ("fira2-30b", {"shard": 8, "expert": 8}),
    ("fira2-30b", {"pipeline": 4, "expert": 16}),
])
def test_a_rank_of_64_is_built_and_steps_without_the_whole_model(preset, sizes, rank_of_64):
    spec = configure(PRETRAIN, load_preset(preset), ()).model
    sizes = dict.fromkeys(AXES, 1) | sizes
    held = step_once(spec, sizes, rank_of_64)
    place = make_mesh(sizes, rank_of_64, torch.device("cpu")).place["pipeline"]
    planned = count_elements(spec, tuple(sizes[axis] for axis in AXES), place)
    assert sum(held.values()) == pytest.approx(planned["all"] / sizes["shard"], rel=0.01)
    assert sum(held.values()) < 0.06 * count_elements(spec, (1, 1, 1, 1), 0)["all"]
