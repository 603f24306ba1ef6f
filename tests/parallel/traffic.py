"""Counts what a rank sends, as torch's dispatcher sees it: whoever calls, by whichever name."""
from collections import Counter

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode


class Traffic(TorchDispatchMode):
    """`sent`: bytes by operation; sums as in a ring, gathering as from each to each."""

    def __init__(self):
        super().__init__()
        self.sent = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        space, _, name = func._schema.name.partition("::")
        if space == "c10d":
            self.sent[name] += COST[name](*args)
        return func(*args, **(kwargs or {}))


def ranks_of(group):
    return dist.ProcessGroup.unbox(group).size()


def all_reduce(tensors, group, *_):
    tensors = [t for t in tensors if t.dtype == torch.float32]  # without sums of counts, float64
    return sum(t.nbytes for t in tensors) * 2 * (ranks_of(group) - 1) / ranks_of(group)


def all_to_all(_, tensor, group, receive, send, *rest):
    if not send:
        return tensor.nbytes * (ranks_of(group) - 1) / ranks_of(group)
    own = send[dist.ProcessGroup.unbox(group).rank()]
    return (sum(send) - own) * tensor[:1].nbytes


COST = {"allreduce_": all_reduce, "alltoall_base_": all_to_all,
        "_allgather_base_": lambda _, tensor, group, *rest: tensor.nbytes * (ranks_of(group) - 1),
        "_reduce_scatter_base_": lambda part, _, group, *rest: part.nbytes * (ranks_of(group) - 1),
        "send": lambda tensors, *rest: sum(t.nbytes for t in tensors),
        "recv_": lambda *rest: 0,
        "allgather_": lambda *rest: 0}  # the loss and metrics by name, a few hundred bytes
