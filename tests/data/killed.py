"""Prepare a folder in children that are killed at random moments, until one finishes.

    python killed.py FOLDER TOKENIZER SOURCE SEED LEAST_KILLS
"""
import os
import random
import signal
import sys
import time

from fira.data import prepare as module
from fira.data.tokenizer import Tokenizer


def main() -> None:
    folder, tokenizer_folder, source, seed, least = sys.argv[1:]
    module.COMMIT_SECONDS, module.BATCH_CHARS = 0.0, 2000
    tokenizer = Tokenizer.load(tokenizer_folder)
    assert tokenizer.fast_reason == ""
    chance, kills, started = random.Random(int(seed)), 0, time.monotonic()
    while True:
        assert time.monotonic() - started < 60
        child = os.fork()
        if not child:
            longest = 0.03 if kills < int(least) else 60.0
            signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.001, longest))  # ends it at once
            module.prepare([source], folder, tokenizer, shard_tokens=5000, workers=1)
            os._exit(0)
        chance.random()
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        assert os.WTERMSIG(status) == signal.SIGALRM
        kills += 1
    print(kills)


if __name__ == "__main__":
    main()
