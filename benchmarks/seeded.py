"""Run a foreign training program as it is, but from a given seed.

    python benchmarks/seeded.py SEED SCRIPT.py|MODULE ARGUMENTS...

Programs that fix their seed in the source could only repeat one run; here whatever they ask of
torch.manual_seed gives SEED instead. The working folder is the program's own.
"""
from __future__ import annotations

import runpy
import sys
from pathlib import Path

import torch


def main() -> None:
    seed, program = int(sys.argv[1]), sys.argv[2]
    seeding = torch.manual_seed
    torch.manual_seed = lambda _: seeding(seed)
    sys.argv = [program, *sys.argv[3:]]
    sys.path[0] = str(Path.cwd())
    if program.endswith(".py"):
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
