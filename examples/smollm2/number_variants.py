"""The same word problem with other numbers: more to practise on than a small data set holds.

A problem qualifies where exactly one operation on exactly two numbers of its text gives its answer,
each number stands there once, and the text holds no other. What the words say is then true of other
numbers as well.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable

NUMBER = re.compile(r"(?<![\w.,:/$-])\d{1,4}(?![\d:/%]|[.,]\d|\w)")
ANY_DIGIT = re.compile(r"\d+")
ATTEMPTS = 20
"""Draws of a pair of numbers before a problem is given up."""
Pair = tuple[int, int]
OPERATIONS: dict[str, Callable[[int, int], int | None]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b if a > b else None,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a // b if b > 1 and a % b == 0 and a > b else None,
}
"""Results of two numbers; None where the operation does not give a positive whole number."""


def operation_of(problem: str, answer: int) -> tuple[str, bool] | None:
    """The operation that gives the answer, and whether the second number comes first in it.

    None for a problem that does not qualify.
    """
    found = [int(text) for text in NUMBER.findall(problem)]
    if len(found) != 2 or len(ANY_DIGIT.findall(problem)) != 2 or found[0] == found[1]:
        return None
    right = {
        (sign, swapped)
        for sign, apply in OPERATIONS.items()
        for swapped in ((False, True) if sign in "-/" else (False,))
        if apply(*(found[::-1] if swapped else found)) == answer
    }
    return right.pop() if len(right) == 1 else None


def variants(problem: str, answer: int, n: int, draw: random.Random) -> list[tuple[str, int]]:
    """Up to `n` other problems with their answers; each number keeps its size within a factor of 2.

    Empty for a problem that does not qualify.
    """
    operation = operation_of(problem, answer)
    if operation is None:
        return []
    sign, swapped = operation
    first, second = (int(text) for text in NUMBER.findall(problem))
    made: dict[str, int] = {}
    for _ in range(n * ATTEMPTS):
        if len(made) == n:
            break
        pair = _drawn((second, first) if swapped else (first, second), sign, draw)
        result = OPERATIONS[sign](*pair)
        if result is None or pair[0] == pair[1]:
            continue
        numbers = iter(pair[::-1] if swapped else pair)
        text = NUMBER.sub(lambda _, numbers=numbers: str(next(numbers)), problem)
        if text != problem:
            made[text] = result
    return list(made.items())


def _drawn(pair: Pair, sign: str, draw: random.Random) -> Pair:
    """Two numbers of like size, in the order of the operation."""
    a, b = (draw.randint(max(2, x // 2), max(3, 2 * x)) for x in pair)
    if sign == "/":  # the quotient is drawn, since few pairs have one
        quotient = pair[0] // pair[1]
        a = b * draw.randint(max(2, quotient // 2), max(3, 2 * quotient))
    return a, b
