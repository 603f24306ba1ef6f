"""Where am I running: device, precision, seeds, allocator. Alone reads the environment."""
from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

LOCK = ".lock"  # in a folder that a process has claimed
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is CUDA, else MPS, else CPU; others as given. Raises ValueError if it is not there."""
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
                 "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    kind = name.partition(":")[0]
    if kind not in available:
        raise ValueError(f"device {name!r} is unknown; choose auto, cpu, cuda, cuda:N or mps")
    if not available[kind]:
        raise ValueError(f"device {name!r} is not available on this machine; "
                         "use --device cpu, or auto to take the best there is")
    return torch.device(name)


def let_mps_fall_back() -> None:
    """Before torch is imported: the CPU computes what torch has not for Apple's GPU (kthvalue)."""
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")


def keep_large_blocks() -> bool:
    """Ask glibc to keep freed memory for reuse; True if it agreed, False where there is no glibc.

    By default glibc maps every large tensor anew and returns it when freed, so each training step
    faults its whole working set in again (benchmarks/train_step.py --group allocation).
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


class Launch(NamedTuple):
    """What a launcher told this process: which of how many it is, on its machine and in all."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    restarts: int = 0


def launch() -> Launch:
    """As torchrun, Open MPI or MPICH (PMI) say it; alone without one of them."""
    for names in (("RANK", "WORLD_SIZE", "LOCAL_RANK"),
                  ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
                  ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID")):
        if all(name in os.environ for name in names):
            rank, world, local_rank = (int(os.environ[name]) for name in names)
            restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
            return Launch(rank, world, local_rank, restarts)
    return Launch()


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Keep other processes from writing to `folder`; ends with this process at the latest.

    What is locked is a file in it, which names its holder: network file systems lock no folders.
    Raises ValueError, one line, if another process has it.
    """
    import fcntl

    with open(folder / LOCK, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(f"another process is writing to {folder} ({file.read()}); wait until "
                             "it has ended, or choose another folder") from None
        except OSError as error:  # a file system without locks
            raise OSError(error.errno, error.strerror, file.name) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        os.fsync(file.fileno())  # a reader on another machine sees it
        yield


def workers() -> int:
    """Processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Versions that a result depends on, for the run's record."""
    names = ("fira-moe", "torch", "numpy", "safetensors", "tokenizers", "tiktoken")
    found = {"python": platform.python_version(),
             "platform": f"{platform.system()} {platform.machine()}"}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def machine() -> str:
    """Processor, number of cores and GPU, in words."""
    path, torch = Path("/proc/cpuinfo"), sys.modules.get("torch")
    found = re.search(r"model name\s*: (.*)", path.read_text() if path.exists() else "")
    name = found[1] if found else platform.processor() or platform.machine()
    gpu = f", {torch.cuda.get_device_name()}" if torch and torch.cuda.is_available() else ""
    return f"{name}, {workers()} cores{gpu}"


def commit() -> str | None:
    """The git commit of this source tree, with '+' if changed locally; None outside a checkout."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        head = subprocess.run(["git", "describe", "--always", "--dirty=+", "--abbrev=10"], cwd=root,
                              capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None  # no git on this machine: the record says null
    return head.stdout.strip()
