"""A rank dies, is silent or fails: the others stop with one line, and a restart ends in the same
run."""
import datetime
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from fira import checkpoint
from fira.checkpoint import Checkpoints
from fira.config import ConfigError
from fira.model.spec import FIRA2Spec
from fira.parallel.mesh import Mesh, ParallelConfig, check_fit, resolve_sizes
from fira.runlog import read_rows
from fira.runtime import launch
from fira.stages.pretrain import pretrain
from fira.train.loop import Loop
from tests.parallel.ranks import free_port, mesh_of, on_ranks


def train(rank, preset, data, run, *settings):
    pretrain(str(preset), [f"data.folder={data}", *settings], run, "cpu", False,
             Console(quiet=True))


def losses(run):
    return [row["loss"] for row in read_rows(run) if row["kind"] == "step"]


def start_hosts(preset, data, run, *settings, rendezvous, restarts=0):
    """Two launchers of one rank each, with an address of their own, as on two machines."""
    port, hosts = free_port(), []
    for host in range(2):
        words = {"static": ["--node-rank", str(host), "--master-addr", "127.0.0.1",
                            "--master-port", str(port)],
                 "c10d": ["--rdzv-backend", "c10d", "--rdzv-id", "7", "--rdzv-endpoint",
                          f"127.0.0.1:{port}", "--local-addr", f"127.0.0.{host + 1}"]}[rendezvous]
        hosts.append(subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node",
             "1", "--max-restarts", str(restarts), *words, "-m", "fira", "train", str(preset),
             f"data.folder={data}", *settings, "--run-folder", str(run), "--device", "cpu"],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True))
    return hosts


def finish(hosts):
    """What the launchers wrote; all must end well."""
    said = [host.communicate(timeout=120)[1] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], said
    return said


def test_a_killed_rank_does_not_end_the_run(preset, data_folder, tmp_path):
    """Rank 1 is killed at a random moment; both hosts start their rank again."""
    settings = "train.micro_batch=2", "train.steps=48", "train.save_every=6", "parallel.expert=2"
    calm, run = tmp_path / "calm", tmp_path / "run"
    on_ranks(2, train, preset, data_folder, calm, *settings, join=False)
    hosts = start_hosts(preset, data_folder, run, *settings, "parallel.timeout=30",
                        rendezvous="static", restarts=1)
    while not (run / "step-000006").exists():
        assert hosts[0].poll() is None, hosts[0].stderr.read()
        time.sleep(0.01)
    time.sleep(random.Random(0).uniform(0, 0.1))
    with open(f"/proc/{hosts[1].pid}/task/{hosts[1].pid}/children") as file:
        os.kill(int(file.read()), signal.SIGKILL)
    assert "another rank is gone" in finish(hosts)[0]
    assert losses(run) == losses(calm)
    ours, theirs = (load_file(folder / "step-000048" / "model.safetensors")
                    for folder in (run, calm))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_two_hosts_find_each_other_without_a_first_one(preset, data_folder, tmp_path):
    settings = "train.steps=2", "train.micro_batch=1", "parallel.data=2"
    said = finish(start_hosts(preset, data_folder, tmp_path / "run", *settings, rendezvous="c10d"))
    assert sorted("2 cpu ranks (data 2)" in words for words in said) == [False, True]
    assert len(losses(tmp_path / "run")) == 2


def silent(rank, preset, data, run, moment):
    """From `moment` on rank 1 does nothing until rank 0 has ended; what each rank is told."""
    step, write = Loop._step, checkpoint.write_rows

    def wait():
        while rank == 1 and not (run / "ended").exists():
            time.sleep(0.01)

    def silent_step(loop, line):
        if moment == "training" and loop.state.step == 3:
            wait()
        step(loop, line)

    def silent_write(path, rows):
        if moment == "saving":
            wait()
        write(path, rows)

    Loop._step, checkpoint.write_rows = silent_step, silent_write
    with pytest.raises(ValueError) as error:
        train(rank, preset, data, run, "train.micro_batch=2", "parallel.timeout=4")
    (run / "ended").touch()
    return str(error.value)


@pytest.mark.parametrize("moment", ["training", "saving"])
def test_a_silent_rank_is_waited_for_no_longer_than_the_timeout(moment, preset, data_folder,
                                                                tmp_path):
    """Its connections stay open. Saving has a process group of its own."""
    line, _ = on_ranks(2, silent, preset, data_folder, tmp_path / "run", moment, join=False)
    assert "rank 0: another rank is gone, or was silent for 4 s" in line
    assert "--resume" in line and "\n" not in line


def limits(rank, folder):
    """Seconds that each kind of group waits for a silent rank."""
    groups, limit = [], datetime.timedelta(seconds=7)
    for axis in ("data", "expert", "pipeline", "shard"):
        mesh = mesh_of(rank, {axis: 2}, timeout=limit)
        groups += [*filter(None, mesh.groups.values()), Checkpoints(folder, folder, mesh).group]
    groups += [group for one in mesh.shard_meshes for group in one.get_all_groups()]
    return [group._get_backend(torch.device("cpu")).options._timeout.seconds for group in groups]


def test_every_group_has_the_timeout(tmp_path):
    for found in on_ranks(2, limits, tmp_path):
        assert len(found) > 8 and set(found) == {7}


SAVED = "train.micro_batch=1", "train.steps=10", "model.balance=loss"  # a quantile's estimate
# depends on how the batch is cut


def slow_and_full_disk(rank, preset, data, run):
    """The first save waits for two more steps; at the second the disk of rank 1 is full. Steps done
    when the first was written, and what this rank is told."""
    step, write, done, seen = Loop._step, checkpoint.write_rows, [0], []

    def counted(loop, line):
        step(loop, line)
        done.append(loop.state.step)

    def late(path, rows):
        if rank == 1 and "step-000010" in str(path):
            raise OSError(28, "No space left on device")
        limit = time.monotonic() + 60
        while done[-1] < 7 and time.monotonic() < limit:
            time.sleep(0.01)
        seen.append(done[-1])
        write(path, rows)

    Loop._step, checkpoint.write_rows = counted, late
    with pytest.raises(ValueError, match="cannot save .*step-000010") as error:
        train(rank, preset, data, run, *SAVED)
    return min(seen), str(error.value)


def test_training_goes_on_while_a_save_is_written_and_a_full_disk_stops_all_ranks(
        preset, data_folder, tmp_path):
    run, calm = tmp_path / "run", tmp_path / "calm"
    for steps, line in on_ranks(2, slow_and_full_disk, preset, data_folder, run, join=False):
        assert steps >= 7
        assert "No space left" in line and "step-000005 is whole" in line and "--resume" in line
    assert [path.name for path in run.glob("*step*")] == ["step-000005"]
    train(0, preset, data_folder, calm, *SAVED)
    for name in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (folder / "step-000005" / name for folder in (run, calm))
        size = 8 + int.from_bytes(ours.read_bytes()[:8], "little")
        assert ours.read_bytes()[:size] == theirs.read_bytes()[:size]  # the format's header
        torch.testing.assert_close(load_file(ours), load_file(theirs), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("names", [("RANK", "WORLD_SIZE", "LOCAL_RANK"), (
    "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")])
def test_torchrun_and_open_mpi_name_the_ranks(names, monkeypatch):
    for name, value in zip(names, ("3", "8", "1"), strict=True):
        monkeypatch.setenv(name, value)
    assert launch()[:3] == (3, 8, 1)


def test_one_rank_sends_nothing():
    assert Mesh().agree(1.0, 2) == [1.0, 2]


@pytest.mark.parametrize("sizes,rows,words", [
    ({"expert": 4}, 16, "parallel.expert=4 must divide model.num_experts=6; try parallel.expert=3"),
    ({"pipeline": 4}, 16, "parallel.pipeline=4 is more than model.num_layers=3; try "),
    ({"shard": 2, "pipeline": 2}, 16, "shard=2 cannot be combined with parallel.pipeline=2"),
    ({"data": 4}, 12, "train.batch_tokens=192 are 12 sequences.*try train.batch_tokens=256"),
    ({"data": 3}, 12, "parallel pipeline=1 x data=3 x expert=1 x shard=1 needs 3 ranks, but 4"),
])
def test_what_does_not_fit_is_one_line(sizes, rows, words):
    spec = FIRA2Spec(d_model=16, n_head=2, n_kv_head=1, num_layers=3, num_experts=6)
    with pytest.raises(ConfigError, match=words) as refused:
        check_fit(resolve_sizes(ParallelConfig(**sizes), 4), spec, rows, 2, 16)
    assert "\n" not in str(refused.value)
