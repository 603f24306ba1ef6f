"""A rank dies: the others stop with one line, torchrun starts again, the run is the undisturbed."""
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

from fira.checkpoint import Checkpoints
from fira.parallel.files import Writer
from fira.parallel.mesh import AXES, Mesh, make_mesh
from fira.runlog import read_rows
from fira.runtime import launch
from fira.stages.pretrain import pretrain
from fira.train.loop import Loop
from tests.parallel.ranks import free_port, on_ranks
from tests.parallel.test_parity import SPECS, batch, cut

SETTINGS = ["train.micro_batch=2", "train.steps=150", "train.save_every=6",
            "parallel.timeout=30"]


def torchrun(world, *words, restarts=0):
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world),
            "--max-restarts", str(restarts), *words]


def children(process):
    """Process ids of the ranks below a torchrun, by rank."""
    path = f"/proc/{process.pid}/task/{process.pid}/children"
    with open(path) as file:
        return [int(word) for word in file.read().split()]


def undisturbed(rank, preset, data, run):
    pretrain(str(preset), [f"data.folder={data}", *SETTINGS, "parallel.expert=2"], run, "cpu",
             False, Console(quiet=True))


def last_weights(run):
    return load_file(Checkpoints(run, run).steps()[-1] / "model.safetensors")


def losses(run):
    return [row["loss"] for row in read_rows(run) if row["kind"] == "step"]


def test_a_killed_rank_does_not_end_the_run(preset, data_folder, tmp_path):
    """Rank 1 at a random moment (benchmarks/kill_ranks.py kills two dozen)."""
    calm, run = tmp_path / "calm", tmp_path / "run"
    on_ranks(2, undisturbed, preset, data_folder, calm, join=False)
    kills = 1
    command = torchrun(2, "-m", "fira", "train", str(preset), f"data.folder={data_folder}",
                       *SETTINGS, "parallel.expert=2", "--run-folder", str(run), "--device", "cpu",
                       restarts=kills)
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"},
                               stderr=subprocess.PIPE, text=True)
    draw = random.Random(0)
    for number in range(kills):
        wanted = 6 * (number + 1)
        while not list(run.glob(f"step-{wanted:06d}")):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.1))
        os.kill(children(process)[1], signal.SIGKILL)
    _, words = process.communicate(timeout=120)
    assert process.returncode == 0, words
    assert "another rank is gone" in words
    assert losses(run) == losses(calm)
    ours, theirs = last_weights(run), last_weights(calm)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_two_hosts_meet_at_an_address(rendezvous, preset, data_folder, tmp_path):
    """Two launchers, each with an address of its own."""
    port, run, hosts = free_port(), tmp_path / "run", []
    for host in range(2):
        words = ["--node-rank", str(host), "--master-addr", "127.0.0.1", "--master-port", str(port)]
        if rendezvous == "c10d":
            words = ["--rdzv-backend", "c10d", "--rdzv-id", "7", "--rdzv-endpoint",
                     f"127.0.0.1:{port}", "--local-addr", f"127.0.0.{host + 1}"]
        hosts.append(subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node",
             "1", *words, "-m", "fira", "train", str(preset), f"data.folder={data_folder}",
             "train.steps=4", "train.micro_batch=1", "parallel.data=2", "--run-folder", str(run),
             "--device", "cpu"],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True))
    said = [host.communicate(timeout=120)[1] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], said
    assert sorted("2 cpu ranks (data 2)" in words for words in said) == [False, True]
    assert len(losses(run)) == 4


@pytest.mark.parametrize("moment", ["step-*", ".step-*"], ids=["training", "saving"])
def test_a_silent_rank_is_waited_for_no_longer_than_the_timeout(moment, preset, data_folder,
                                                                tmp_path):
    """Rank 1 is stopped, not killed: its connections stay open. Every group has the timeout."""
    run, port, ranks = tmp_path / "run", free_port(), []
    for rank in range(2):
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank),
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        ranks.append(subprocess.Popen(
            [sys.executable, "-m", "fira", "train", str(preset), f"data.folder={data_folder}",
             "train.micro_batch=2", "train.steps=5000", "train.save_every=1",
             "parallel.timeout=12", "--run", str(run), "--device", "cpu"],
            env=os.environ | place, stderr=subprocess.PIPE, text=True))
    try:
        while not list(run.glob(moment)):
            assert ranks[0].poll() is None, ranks[0].stderr.read()
            time.sleep(0.001)
        ranks[1].send_signal(signal.SIGSTOP)
        _, words = ranks[0].communicate(timeout=90)
    finally:
        for rank in ranks:
            rank.kill()
    assert ranks[0].returncode == 1
    line = words.splitlines()[-1]
    assert "rank 0: another rank is gone, or was silent for 12 s" in line and "--resume" in line
    assert "Traceback" not in words


def limits(rank):
    """Seconds that each kind of group waits for a silent rank."""
    groups, limit = [], datetime.timedelta(seconds=7)
    for axis in ("data", "expert", "pipeline", "shard"):
        mesh = make_mesh(dict.fromkeys(AXES, 1) | {axis: 2}, rank, torch.device("cpu"), limit)
        groups += [*filter(None, mesh.groups.values()), Writer(mesh).group]
    groups += [group for one in mesh.shard_meshes for group in one.get_all_groups()]
    return [group._get_backend(torch.device("cpu")).options._timeout.seconds for group in groups]


def test_every_group_has_the_timeout():
    for found in on_ranks(2, limits):
        assert len(found) > 8 and set(found) == {7}


EVEN_CUTS = "model.balance=loss"  # a quantile's votes depend on how a batch is cut


def slow_disk(rank, preset, data, run):
    """The first save is not written before two more steps are done; the steps done by then."""
    from fira import checkpoint

    step, write, done, seen = Loop._step, checkpoint.write_rows, [0], []

    def counted(loop, line):
        step(loop, line)
        done.append(loop.state.step)

    def late(path, content):
        if "step-000005" in str(path):
            limit = time.monotonic() + 60
            while done[-1] < 7 and time.monotonic() < limit:
                time.sleep(0.01)
            seen.append(done[-1])
        write(path, content)

    Loop._step, checkpoint.write_rows = counted, late
    pretrain(str(preset), [f"data.folder={data}", EVEN_CUTS, "train.micro_batch=1"], run, "cpu",
             False, Console(quiet=True))
    return min(seen)


def test_training_goes_on_while_a_save_is_written(preset, data_folder, tmp_path):
    run = tmp_path / "run"
    assert min(on_ranks(2, slow_disk, preset, data_folder, run, join=False)) >= 7
    calm = tmp_path / "calm"
    pretrain(str(preset), [f"data.folder={data_folder}", EVEN_CUTS], calm, "cpu", False,
             Console(quiet=True))
    names = [{path.name for path in folder.glob("step-*")} for folder in (run, calm)]
    assert names[0] == names[1]
    ours, theirs = last_weights(run), last_weights(calm)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-4, rtol=1e-3)


def poisoned(rank):
    """The last rank's gradient is not finite in step 1; who updated, and the weights then."""

    from fira.loss.next_token import next_token_loss
    from fira.model.files import build_meta
    from fira.parallel.layout import Layout
    from fira.train.optim import OptimConfig, make_optimizer, update

    result = []
    for sizes in ({"data": 2}, {"expert": 2}, {"shard": 2}, {"pipeline": 2}):
        mesh = make_mesh(dict.fromkeys(AXES, 1) | sizes, rank, torch.device("cpu"))
        layout = Layout(mesh, build_meta(SPECS["fira2"]), 5)
        optimizer = make_optimizer(layout.model, OptimConfig())
        updates = []
        for step in range(2):
            loss, _ = layout.forward_backward(cut(batch(step), layout.rows(8)), next_token_loss)
            if step == 0 and rank == 1:
                grad = next(p.grad for n, p in layout.model.named_parameters() if "experts" in n)
                getattr(grad, "_local_tensor", grad).fill_(float("nan"))
            updates.append(update(optimizer, loss, layout.gradient_norm()))
        result.append(updates)
    return result


def test_one_rank_s_non_finite_gradient_makes_all_skip():
    assert on_ranks(2, poisoned) == [[[False, True]] * 4] * 2


def stopping(rank, preset, data, run):
    """Rank 1 alone hears SIGTERM in step 4; the step at which this rank stopped."""
    step = Loop._step

    def hear(loop, line):
        if loop.state.step == 3 and rank == 1:
            loop.stop_signal = signal.SIGTERM
        step(loop, line)

    Loop._step = hear
    with pytest.raises(Exception, match="SIGTERM"):
        pretrain(str(preset), [f"data.folder={data}", "train.micro_batch=1"], run, "cpu", False,
                 Console(quiet=True))
    return Checkpoints(run, run).steps()[-1].name


def test_a_signal_to_one_rank_saves_and_stops_all(preset, data_folder, tmp_path):
    names = on_ranks(2, stopping, preset, data_folder, tmp_path / "run", join=False)
    assert names[0] == names[1] != "step-000005"


def full_disk(rank, preset, data, run):
    """The disk of rank 1 is full at the second save; what every rank hears."""
    from fira import checkpoint

    write, calls = checkpoint.write_rows, []

    def refuse(path, content):
        calls.append(path)
        if rank == 1 and "step-000010" in str(path):
            raise OSError(28, "No space left on device")
        write(path, content)

    checkpoint.write_rows = refuse
    with pytest.raises(ValueError, match="cannot save .*step-000010") as refused:
        pretrain(str(preset), [f"data.folder={data}", "train.micro_batch=1"], run, "cpu", False,
                 Console(quiet=True))
    return str(refused.value), len(calls)


def test_a_full_disk_of_one_rank_stops_all_with_the_last_step_whole(preset, data_folder, tmp_path):
    run = tmp_path / "run"
    for words, _ in on_ranks(2, full_disk, preset, data_folder, run, join=False):
        assert "No space left" in words and "step-000005 is whole" in words and "--resume" in words
    assert [path.name for path in run.glob("*step*")] == ["step-000005"]


@pytest.mark.parametrize("names", [("RANK", "WORLD_SIZE", "LOCAL_RANK"), (
    "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")])
def test_torchrun_and_open_mpi_name_the_ranks(names, monkeypatch):
    for name, value in zip(names, ("3", "8", "1"), strict=True):
        monkeypatch.setenv(name, value)
    assert launch()[:3] == (3, 8, 1)


def test_alone_nothing_is_sent():
    assert Mesh().agree(1.0, 2) == [1.0, 2]
