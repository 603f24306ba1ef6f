"""Runs a function on N processes of this machine that form a gloo group, within a time limit."""
import datetime
import os
import socket
import tempfile
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fira.parallel.mesh import AXES, Mesh, make_mesh


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def mesh_of(rank, sizes, **options):
    """The mesh of a rank of `on_ranks`; without sizes, that of one process alone."""
    whole = dict.fromkeys(AXES, 1) | sizes
    return make_mesh(whole, rank, torch.device("cpu"), **options) if sizes else Mesh()


def _enter(rank, world, port, folder, work, arguments, join):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    try:
        if join:
            dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
        torch.save(work(rank, *arguments), Path(folder) / f"result-{rank}.pt")
        if join:
            dist.destroy_process_group()
    except BaseException:
        (Path(folder) / f"error-{rank}").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)


def on_ranks(world, work, *arguments, seconds=300, join=True):
    """[work(rank, *arguments) for every rank], each in its own process, as torchrun would."""
    with tempfile.TemporaryDirectory() as folder:
        context, port = mp.get_context("fork"), free_port()
        processes = [context.Process(target=_enter, args=(rank, world, port, folder, work,
                                                          arguments, join))
                     for rank in range(world)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(seconds)
        alive = [process for process in processes if process.is_alive()]
        for process in alive:
            process.kill()
        errors = [path.read_text() for path in sorted(Path(folder).glob("error-*"))]
        assert not errors and not alive, "\n".join(errors) or "a rank hangs"
        return [torch.load(Path(folder) / f"result-{rank}.pt") for rank in range(world)]
