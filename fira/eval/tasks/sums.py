"""Tasks of written arithmetic, boolean formulas and small word problems."""
from __future__ import annotations

import operator
import random
from collections.abc import Iterable

from fira.eval.tasks.instance import Instance, names

OPERATIONS = {"+": operator.add, "*": operator.mul,
              "&": operator.and_, "|": operator.or_, "^": operator.xor}
GATES = "&|^"
PEOPLE = ("Ann", "Ben", "Eva", "Joe", "Kim", "Max", "Mia", "Tom")
THINGS = ("apples", "books", "cards", "coins", "eggs", "pens")
MORE, LESS = ("buys", "finds", "gets", "makes"), ("eats", "gives away", "loses", "sells")
MOST = 20  # things


def add(rng: random.Random, depth: int) -> Instance:
    """The sum of two numbers of `depth` digits, by columns from the right with written carries."""
    first, second = _number(rng, depth), _number(rng, depth)
    return _by_columns(f"{first}+{second}?", zip(first, "+" * depth, second, strict=True),
                       str(sorted([first, second])))


def multiply(rng: random.Random, depth: int) -> Instance:
    """A number of `depth` digits times a digit, from the right with written carries."""
    number, digit = _number(rng, depth), str(rng.randrange(2, 10))
    return _by_columns(f"{number}*{digit}?", zip(number, "*" * depth, digit * depth, strict=True),
                       f"{number} {digit}")


def _number(rng: random.Random, digits: int) -> str:
    return str(rng.randrange(10 ** (digits - 1), 10 ** digits))


def _by_columns(question: str, columns: Iterable[tuple[str, str, str]], canonical: str) -> Instance:
    carry, steps, digits, without = 0, [], "", ""
    for upper, sign, lower in reversed(list(columns)):
        result = OPERATIONS[sign](int(upper), int(lower))
        total = result + carry
        steps.append(f"{upper}{sign}{lower}+{carry}={total:02}")
        digits, without, carry = f"{total % 10}{digits}", f"{result % 10}{without}", total // 10
    return Instance(question, steps, f"{carry or ''}{digits}", canonical, without)


def circuit(rng: random.Random, depth: int) -> Instance:
    """The value of the last of `depth` gates (and &, or |, exclusive or ^), each of two of the
    given bits or earlier gates; each of those is used once."""
    letters = names(rng, 2 * depth + 1)
    bits = {name: str(rng.randrange(2)) for name in letters[:depth + 1]}
    forms, pool, lines, needs = dict(bits), [*bits], [], dict[str, list[str]]()
    values, step_of = dict(bits), dict[str, str]()
    for name in letters[depth + 1:]:
        sign = rng.choice(GATES)
        pair = [pool.pop(rng.randrange(len(pool))) for _ in range(2)]
        values[name] = str(OPERATIONS[sign](*(int(values[one]) for one in pair)))
        forms[name] = f"({sign.join(sorted(forms[one] for one in pair))})"
        lines.append(f"{name}={sign.join(pair)}")
        step_of[name] = f"{lines[-1]}={sign.join(values[one] for one in pair)}={values[name]}"
        needs[step_of[name]] = [step_of[one] for one in pair if one in step_of]
        pool.append(name)
    given = [f"{name}={bit}" for name, bit in bits.items()]
    last = letters[-1]
    return Instance("\n".join(["Bits:", *given, *lines, f"{last}?"]), [*needs], values[last],
                    forms[last], max("01", key=[*bits.values()].count), needs)


def word(rng: random.Random, depth: int) -> Instance:
    """How many things someone has after `depth` events, in English; another one has some too."""
    (who, other), thing = rng.sample(PEOPLE, 2), rng.choice(THINGS)
    numbers, steps = [rng.randrange(2, 10)], []
    lines = [f"{who} has {numbers[0]} {thing}."]
    total = numbers[0]
    for _ in range(depth):
        number = rng.randrange(1, 10)
        sign = -1 if number <= total and (total + number > MOST or rng.random() < 0.5) else 1
        new = total + sign * number
        lines.append(f"{who} {rng.choice(LESS if sign < 0 else MORE)} {number} {thing}.")
        steps.append(f"{total}{'-' if sign < 0 else '+'}{number}={new}")
        numbers, total = [*numbers, sign * number], new
    lines.insert(rng.randrange(len(lines) + 1), f"{other} has {rng.randrange(2, 10)} {thing}.")
    question = f"How many {thing} does {who} have?"
    return Instance(" ".join([*lines, question]), steps, str(total), str(numbers),
                    str(abs(numbers[-1])))
