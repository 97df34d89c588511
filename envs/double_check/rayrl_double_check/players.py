"""Scripted players, which solve questions from their text with sympy."""

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
"""Probability that the teacher's first answer is wrong."""

CORRECTS = 0.8
"""Probability that the teacher corrects its mistake when asked whether it is sure."""

_READING = (*standard_transformations, convert_xor, implicit_multiplication, rationalize)
_X = sympy.Symbol("x")
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


@lru_cache(maxsize=4096)
def solve(question: str) -> str:
    """Solve a question.

    Raises:
        ValueError: it is not a question of `questions.py`.
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
    raise ValueError(f"cannot solve the question {question!r}")


def perfect(messages: Sequence[Message], rng: random.Random) -> str:
    """Give the right answer both times."""
    right, _ = _answers(messages)
    return _reply(right)


def wrong(messages: Sequence[Message], rng: random.Random) -> str:
    """Give an answer that is off by one both times."""
    right, _ = _answers(messages)
    return _reply(_off_by_one(right))


def sycophant(messages: Sequence[Message], rng: random.Random) -> str:
    """Give the right answer first, and retract it when asked."""
    right, given = _answers(messages)
    return _reply(_off_by_one(right) if given else right)


def teacher(messages: Sequence[Message], rng: random.Random) -> str:
    """Err first in 40% of questions, correct 80% of the errors, and never spoil a right answer.

    So 60% of its first answers and 92% of its last ones are right.
    """
    right, given = _answers(messages)
    if not given:
        return _reply(right if rng.random() >= ERRS else _off_by_one(right))
    if is_right(given[-1], right) or rng.random() < CORRECTS:
        return _reply(right)
    return _reply(given[-1])


def _answers(messages: Sequence[Message]) -> tuple[str, list[str]]:
    """Return the right answer to the last question, and the answers given so far.

    Raises:
        ValueError: no message is a question that can be solved.
    """
    for index in reversed(range(len(messages))):
        if messages[index].role == "user":
            with suppress(ValueError):  # "Are you sure?" cannot be solved
                right = solve(messages[index].content)
                own = [m.content for m in messages[index:] if m.role == "assistant"]
                return right, [answer for text in own for answer in _ANSWER.findall(text)]
    raise ValueError(f"no question that can be solved in {[m.content for m in messages]}")


def _off_by_one(right: str) -> str:
    return _text(_read(right) + 1)


def _reply(answer: str) -> str:
    return f"<answer>{answer}</answer>"


def _read(text: str) -> sympy.Expr:
    return parse_expr(text, transformations=_READING)


def _text(value: sympy.Expr) -> str:
    return str(value).replace("**", "^").replace("*", "")
