"""Memory that ranks share: the same sums as through sockets, and nothing left of it."""
import contextlib
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from fira.parallel import memory
from fira.parallel.memory import FOLDER
from fira.parallel.replicate import GradientSum
from fira.parallel.team import Team
from tests.parallel.ranks import on_ranks

SHAPES = [torch.Size(shape) for shape in ((1, 3, 4), (5, 2, 3), (1, 4, 4), (2, 3, 4), (1, 2, 2))]
WAYS = ["memory", "machines", "no room"] if FOLDER.is_dir() else ["machines"]


def no_room(*_):
    raise OSError(28, "No space left on device")


def by(way, rank):
    """Nothing, or as if every rank were on a machine of its own, or had too small a /dev/shm."""
    return {"memory": contextlib.nullcontext(),
            "machines": mock.patch.object(memory, "FOLDER", Path(f"/nowhere-{rank}")),
            "no room": mock.patch("os.posix_fallocate", no_room)}[way]


def summed(rank, way):
    """Two sums of gradients one after the other, and whether they went through memory."""
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((3, 2), (4,))]
    group, results = dist.new_group([0, 1]), []
    with by(way, rank), warnings.catch_warnings(record=True) as said:
        gradients = GradientSum([(parameter, group) for parameter in parameters])
    for step in range(2):
        parameters[0].grad = torch.full((3, 2), 10.0 ** rank + step)  # the other one has none
        gradients.finish()
        results.append([parameter.grad.unique().tolist() for parameter in parameters])
        dist.barrier()
    mapped, left = gradients.buckets[0].memory is not None, list(FOLDER.glob("fira-*"))
    return results, mapped, [str(one.message) for one in said], left


@pytest.mark.parametrize("way", WAYS)
def test_gradients_sum_the_same_whichever_way_they_go(way):
    for rank, (results, mapped, said, left) in enumerate(on_ranks(2, summed, way)):
        assert results == [[[11.0], [0.0]], [[13.0], [0.0]]]
        assert mapped == (way == "memory") and not left
        assert len(said) == (way == "no room" and rank == 0)
        assert all("use sockets" in words and "No space left" in words for words in said)


def divided(rank, way):
    """Stacks through a team, twice; how many matrices this rank worked on."""
    seen = []

    def function(stack):
        seen.append(len(stack))
        return stack * 2 + 1

    with by(way, rank):
        team = Team(dist.group.WORLD, SHAPES, torch.device("cpu"))
    for step in range(2):
        stacks = [torch.arange(shape.numel()).view(shape) + float(step) for shape in SHAPES]
        for stack, result in zip(stacks, team.each(function, stacks), strict=True):
            assert torch.equal(result, stack * 2 + 1)
        dist.barrier()
    return sum(seen) // 2


@pytest.mark.parametrize("way", WAYS[:2])
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_team_divides_matrices_and_everyone_has_all_results(ranks, way):
    worked = on_ranks(ranks, divided, way)
    assert sum(worked) == sum(shape[0] for shape in SHAPES)
    assert min(worked) > 0
