"""Fresh processes of this machine that form a gloo group, one thread each."""
from __future__ import annotations

import os
import queue as queues
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fira.runtime import keep_large_blocks


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _enter(rank: int, world: int, port: int, queue: Any, work: Callable[..., Any],
           arguments: tuple[Any, ...]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    keep_large_blocks()
    if world > 1:
        dist.init_process_group("gloo", rank=rank, world_size=world)
    queue.put((rank, work(rank, *arguments)))
    if world > 1:
        dist.destroy_process_group()


def on_ranks(world: int, work: Callable[..., Any], *arguments: Any,
             seconds: float = 600) -> list[Any]:
    """[work(rank, *arguments) for every rank], each in its own process; blocks of memory kept."""
    context, port = mp.get_context("spawn"), free_port()
    queue = context.Queue()
    processes = [context.Process(target=_enter, args=(rank, world, port, queue, work, arguments))
                 for rank in range(world)]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    try:
        while len(found) < world:
            rank, result = queue.get(timeout=seconds)
            found[rank] = result
    except queues.Empty:
        codes = [process.exitcode for process in processes]
        raise RuntimeError(f"no answer from {world - len(found)} of {world} ranks within "
                           f"{seconds:g} s; exit codes {codes}") from None
    finally:
        for process in processes:
            process.join(30)
            process.kill()
    return [found[rank] for rank in range(world)]
