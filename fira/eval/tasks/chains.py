"""Tasks of one long chain: each step takes the result of the step before it."""
from __future__ import annotations

import random
from itertools import accumulate, permutations

from fira.eval.tasks.instance import Instance, labels, names

PRIME = 7
CUPS = "12345"


def runsum(rng: random.Random, depth: int) -> Instance:
    """The sum mod 10 of a number and `depth` others, one after the other."""
    digits = [rng.randrange(10) for _ in range(depth + 1)]
    given = [f"{label}{digit}" for label, digit in zip(labels(rng, depth + 1), digits, strict=True)]
    sums = [total % 10 for total in accumulate(digits)]
    steps = [f"{one[0]}{before}+{one[1]}={total}" for one, before, total in
             zip(given[1:], sums[:-1], sums[1:], strict=True)]
    return Instance("\n".join(["Sum mod 10:", *given]), steps, str(sums[-1]), str(digits),
                    str(digits[-1]))


def swap(rng: random.Random, depth: int) -> Instance:
    """Under which of five cups a ball is after `depth` swaps of two cups."""
    begin = at = rng.choice(CUPS)
    lines, steps = [], []
    for label in labels(rng, depth):
        pair = rng.sample(CUPS, 2)
        lines.append(label + "".join(pair))
        new = pair[1 - pair.index(at)] if at in pair else at
        steps.append(f"{label}{at}:{''.join(pair)}={new}")
        at = new
    renamings = ({begin: 0} | dict(zip(others, range(1, 5), strict=True))
                 for others in permutations(CUPS.replace(begin, "")))
    canonical = min([sorted(map(new.__getitem__, line[1:])) for line in lines] for new in renamings)
    return Instance("\n".join([f"Ball at {begin}, swaps:", *lines]), steps, at, str(canonical),
                    begin)


def modchain(rng: random.Random, depth: int) -> Instance:
    """The value mod 7 of a variable that is `depth` assignments away from a number,
    among assignments that do not matter, in any order."""
    numbers = [rng.randrange(PRIME) for _ in range(depth + 1)]
    letters = names(rng, depth + 1 + (depth + 1) // 2)
    chain, others = letters[:depth + 1], letters[depth + 1:]
    given = {chain[0]: str(numbers[0])} | {
        new: f"{old}+{number}"
        for old, new, number in zip(chain[:-1], chain[1:], numbers[1:], strict=True)}
    for name in others:
        given[name] = f"{rng.choice([*given])}+{rng.randrange(PRIME)}"
    lines = [f"{name}={value}" for name, value in given.items()]
    rng.shuffle(lines)
    sums = [total % PRIME for total in accumulate(numbers[::-1])]
    links = [f"{name}={given[name]}" for name in reversed(chain)]
    steps = [links[0], *(f"{link}:{before}+{link[-1]}={total}" for link, before, total in
                         zip(links[1:], sums[:-1], sums[1:], strict=True))]
    return Instance("\n".join([f"Mod {PRIME}:", *lines, f"{chain[-1]}?"]), steps, str(sums[-1]),
                    str(numbers), str(numbers[-1]))


def deduce(rng: random.Random, depth: int) -> Instance:
    """Whether yes or no follows from a letter by `depth` rules, where a chain of as
    many rules leads to the opposite, and as many rules that never apply lead into both."""
    answer, opposite = rng.sample(["yes", "no"], 2)
    letters = names(rng, 3 * depth)
    chain, other, unused = (letters[at:at + depth] for at in (0, depth, 2 * depth))
    into = sorted(rng.randrange(2 * depth) for _ in unused)
    steps = [f"{old}>{new}" for old, new in zip(chain, [*chain[1:], answer], strict=True)]
    rules = [*steps, *(f"{old}>{new}" for old, new in zip(other, [*other[1:], opposite],
                                                          strict=True)),
             *(f"{name}>{letters[place]}" for name, place in zip(unused, into, strict=True))]
    rng.shuffle(rules)
    last = next(rule for rule in reversed(rules) if rule.endswith((">yes", ">no")))
    return Instance("\n".join(["Rules:", *rules, f"From {chain[0]}, yes or no?"]), steps, answer,
                    str(into), last[2:])
