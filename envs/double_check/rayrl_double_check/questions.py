"""Math questions of seven levels with their answers.

Answers are computed with Python's integers and fractions only. The scripted players solve the
questions with sympy from their text, so the two check each other.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from fractions import Fraction

__all__ = ["LEVELS", "polynomial", "question"]

Polynomial = Mapping[int, int]
"""Coefficients by power of x."""


def question(level: int, rng: random.Random) -> tuple[str, str]:
    """Draw a question of a level, 1 to `len(LEVELS)`, and return it with its answer."""
    return LEVELS[level - 1](rng)


def polynomial(terms: Polynomial) -> str:
    """Format `{2: 3, 1: -1, 0: 5}` as "3x^2 - x + 5", highest power first."""
    text = ""
    for power, factor in sorted(terms.items(), reverse=True):
        if factor:
            size = "" if abs(factor) == 1 and power else str(abs(factor))
            sign = (" - " if factor < 0 else " + ") if text else ("-" if factor < 0 else "")
            text += sign + size + {0: "", 1: "x"}.get(power, f"x^{power}")
    return text or "0"


def _sum(rng: random.Random) -> tuple[str, str]:
    """7 + 5, 12 - 4: below 21, nothing negative."""
    a, b = rng.randint(1, 20), rng.randint(1, 20)
    if rng.random() < 0.5:
        return f"What is {a} + {b}?", str(a + b)
    a, b = max(a, b), min(a, b)
    return f"What is {a} - {b}?", str(a - b)


def _product(rng: random.Random) -> tuple[str, str]:
    """7 * 8, 56 / 8: the tables up to 12."""
    a, b = rng.randint(2, 12), rng.randint(2, 12)
    if rng.random() < 0.5:
        return f"What is {a} * {b}?", str(a * b)
    return f"What is {a * b} / {a}?", str(b)


def _order(rng: random.Random) -> tuple[str, str]:
    """3 + 4 * 5, (3 - 9) * 5: order of operations."""
    a, b, c = (rng.randint(2, 20) for _ in range(3))
    if rng.random() < 0.5:
        return rng.choice(
            [
                (f"What is {a} + {b} * {c}?", str(a + b * c)),
                (f"What is {a} - {b} * {c}?", str(a - b * c)),
            ]
        )
    return rng.choice(
        [
            (f"What is ({a} + {b}) * {c}?", str((a + b) * c)),
            (f"What is ({a} - {b}) * {c}?", str((a - b) * c)),
        ]
    )


def _share(rng: random.Random) -> tuple[str, str]:
    """15% of 80, 3^4."""
    if rng.random() < 0.5:
        percent, whole = 5 * rng.randint(1, 19), 20 * rng.randint(1, 20)
        return f"What is {percent}% of {whole}?", str(percent * whole // 100)
    base, exponent = rng.choice(
        [(b, e) for b in range(2, 21) for e in range(2, 8) if b**e <= 1000],
    )
    return f"What is {base}^{exponent}?", str(base**exponent)


def _fractions(rng: random.Random) -> tuple[str, str]:
    """1/2 + 2/3; the answer may be a whole number or negative."""
    a, b = (Fraction(rng.randint(1, d - 1), d) for d in rng.sample(range(2, 10), 2))
    if rng.random() < 0.5:
        return f"What is {a} + {b}?", str(a + b)
    return f"What is {a} - {b}?", str(a - b)


def _equation(rng: random.Random) -> tuple[str, str]:
    """3x + 4 = 19; at least half of the answers are integers."""
    factor, added = rng.randint(2, 9), rng.choice([n for n in range(-9, 10) if n])
    result = rng.randint(-30, 30)
    if rng.random() < 0.5:
        result = factor * rng.randint(-9, 9) + added
    answer = Fraction(result - added, factor)
    return f"Solve {polynomial({1: factor, 0: added})} = {result} for x.", str(answer)


def _algebra(rng: random.Random) -> tuple[str, str]:
    """Collect the terms of 3x + 5 - x + 2, or differentiate a cubic."""
    factors = [rng.choice([n for n in range(-9, 10) if n]) for _ in range(4)]
    if rng.random() < 0.5:
        a, b, c, d = factors
        parts = [polynomial({1: a}), *(polynomial(part) for part in ({0: b}, {1: c}, {0: d}))]
        text = " + ".join(parts).replace("+ -", "- ")
        return f"Collect the terms of {text}.", polynomial({1: a + c, 0: b + d})
    cubic = dict(zip((3, 2, 1, 0), factors, strict=True))
    del cubic[rng.choice([2, 1])]
    slope = {power - 1: power * factor for power, factor in cubic.items() if power}
    return f"Differentiate {polynomial(cubic)} with respect to x.", polynomial(slope)


LEVELS: tuple[Callable[[random.Random], tuple[str, str]], ...] = (
    _sum,
    _product,
    _order,
    _share,
    _fractions,
    _equation,
    _algebra,
)
"""Functions that draw a question and its answer, from easy to hard; level 1 is the first."""
