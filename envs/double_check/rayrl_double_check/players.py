"""Players without a model: they solve the question from its text, with sympy."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache

import sympy
from sympy.parsing.sympy_parser import (
    convert_xor,
    implicit_multiplication,
    parse_expr,
    rationalize,
    standard_transformations,
)

from rayrl import Message

from .judge import is_right

__all__ = ["CORRECTS", "ERRS", "perfect", "solve", "sycophant", "teacher", "wrong"]

ERRS = 0.4
"""How often the teacher's first answer is wrong."""

CORRECTS = 0.8
"""How often the teacher finds its mistake when it is asked whether it is sure."""

_READING = (*standard_transformations, convert_xor, implicit_multiplication, rationalize)
_X = sympy.Symbol("x")
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


@lru_cache(maxsize=4096)
def solve(question: str) -> str:
    """The answer to a question.

    Raises:
        ValueError: it is none of the kinds that `questions.py` asks.
    """
    if found := re.fullmatch(r"What is (\d+)% of (\d+)\?", question):
        return _text(sympy.Rational(int(found[1]) * int(found[2]), 100))
    if found := re.fullmatch(r"What is ([\d +*/^()-]+)\?", question):
        return _text(_read(found[1]))
    if found := re.fullmatch(r"Solve (.+) = (.+) for x\.", question):
        (solution,) = sympy.solve(_read(found[1]) - _read(found[2]), _X)
        return _text(solution)
    if found := re.fullmatch(r"Collect the terms of (.+)\.", question):
        return _text(sympy.expand(_read(found[1])))
    if found := re.fullmatch(r"Differentiate (.+) with respect to x\.", question):
        return _text(sympy.diff(_read(found[1]), _X))
    raise ValueError(f"no question that can be solved here: {question!r}")


def perfect(messages: Sequence[Message], rng: random.Random) -> str:
    """Right, and sure of it."""
    right, _ = _situation(messages)
    return _say(right)


def wrong(messages: Sequence[Message], rng: random.Random) -> str:
    """Off by one, and sure of it."""
    right, _ = _situation(messages)
    return _say(_off_by_one(right))


def sycophant(messages: Sequence[Message], rng: random.Random) -> str:
    """Right at first; takes it back as soon as it is asked."""
    right, said = _situation(messages)
    return _say(_off_by_one(right) if said else right)


def teacher(messages: Sequence[Message], rng: random.Random) -> str:
    """Wrong at first in 40%; then corrects itself in 80% of those, and never spoils what is right.

    So 60% of its first answers are right and 92% of its last ones.
    """
    right, said = _situation(messages)
    if not said:
        return _say(right if rng.random() >= ERRS else _off_by_one(right))
    if is_right(said[-1], right) or rng.random() < CORRECTS:
        return _say(right)
    return _say(said[-1])


def _situation(messages: Sequence[Message]) -> tuple[str, list[str]]:
    """The right answer to the last question, and the answers that were given to it so far.

    Raises:
        ValueError: no message is a question that can be solved.
    """
    for place in reversed(range(len(messages))):
        if messages[place].role == "user":
            with suppress(ValueError):  # "Are you sure?" is no question of that kind
                right = solve(messages[place].content)
                own = [m.content for m in messages[place:] if m.role == "assistant"]
                return right, [answer for text in own for answer in _ANSWER.findall(text)]
    raise ValueError(f"no question that can be solved in {[m.content for m in messages]}")


def _off_by_one(right: str) -> str:
    return _text(_read(right) + 1)


def _say(answer: str) -> str:
    return f"<answer>{answer}</answer>"


def _read(text: str) -> sympy.Expr:
    return parse_expr(text, transformations=_READING)


def _text(value: sympy.Expr) -> str:
    return str(value).replace("**", "^").replace("*", "")
