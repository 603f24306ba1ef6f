"""Runs a function on N processes of this machine that form a gloo group, within a time limit."""
import datetime
import os
import tempfile
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _enter(rank, world, folder, work, arguments):
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank,
                                world_size=world, timeout=datetime.timedelta(seconds=60))
        torch.save(work(rank, *arguments), Path(folder) / f"result-{rank}.pt")
        dist.destroy_process_group()
    except BaseException:
        (Path(folder) / f"error-{rank}").write_text(traceback.format_exc())
        os._exit(1)


def on_ranks(world, work, *arguments, seconds=120):
    """[work(rank, *arguments) for every rank], each in its own process."""
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("fork")
        processes = [context.Process(target=_enter, args=(rank, world, folder, work, arguments))
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
