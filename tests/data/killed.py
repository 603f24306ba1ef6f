"""Prepare a folder in child processes that are killed at random moments, until one finishes.

    python killed.py FOLDER TOKENIZER SOURCE SEED LEAST_KILLS
"""
import os
import random
import signal
import sys

from fira.data import prepare as module
from fira.data.tokenizer import Tokenizer

folder, tokenizer_folder, source, seed, least = sys.argv[1:]
module.COMMIT_SECONDS, module.BATCH_CHARS = 0.0, 2000
tokenizer = Tokenizer.load(tokenizer_folder)
assert tokenizer.slow_reason == ""
random.seed(int(seed))
kills = 0
while True:
    seconds = random.uniform(0.001, 0.03 if kills < int(least) else 60.0)
    child = os.fork()
    if not child:
        signal.setitimer(signal.ITIMER_REAL, seconds)  # SIGALRM ends the process at once
        module.prepare([source], folder, tokenizer, shard_tokens=5000, workers=1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0
        break
    assert os.WTERMSIG(status) == signal.SIGALRM
    kills += 1
print(kills)
