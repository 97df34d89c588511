"""Judge answers: the form must be that of a finished answer, and math-verify must find it equal.

Model output is not passed to a computer algebra system unchecked. `9^9^9^9` would block the event
loop, and with it hundreds of episodes. The library's own time limits are signals, which do not work
in threads and would make scores depend on the load of the machine. Besides, `12 * 7` equals 84, so
repeating the question would count as its answer. An answer must therefore be *finished*: a number
or a sum of terms in x, with no more terms and no more fractions than the right answer. Anything of
that form is small, and is compared in hundredths of a second.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify

__all__ = ["LONGEST", "finished", "is_right", "normal"]

LONGEST = 80
"""Maximum length of an answer in characters."""

_INTEGER = r"(?:\d{1,3}(?:,\d{3}){1,3}|\d{1,12})"
_DECIMAL = rf"{_INTEGER}(?:\.\d{{1,12}})?"
_FRACTION = rf"(?:\\frac\{{[+-]?{_INTEGER}\}}\{{{_INTEGER}\}}|{_DECIMAL}\s?/\s?{_INTEGER})"
_POWER = r"x(?:\^(?:\d{1,2}|\{\d{1,2}\}))?"
_NUMBER = rf"(?:{_FRACTION}|{_DECIMAL})"
_TIMES = r"\s?(?:\*|\\cdot|\\times)?\s?"
_TERM = rf"(?:{_NUMBER}(?:{_TIMES}{_POWER})?|{_POWER}(?:\s?/\s?{_INTEGER})?)"
_FINISHED = re.compile(rf"(?:x\s?=\s?)?[+-]?\s?{_TERM}(?:\s?[+-]\s?{_TERM})*", re.ASCII)
_TERMS = re.compile(_TERM, re.ASCII)
_SPACES = re.compile(r"\s+")

# math-verify warns that its time limits are off; checking the form first makes them unnecessary.
for _name in ("math_verify.parser", "math_verify.grader"):
    logging.getLogger(_name).addFilter(lambda record: "Timeout is disabled" not in str(record.msg))


def normal(answer: str) -> str:
    """Normalize an answer: no dollar signs, single spaces, `^` for `**`, x in lower case."""
    text = _SPACES.sub(" ", answer).strip().removeprefix("$").removesuffix("$").strip()
    text = text.replace("−", "-").replace("×", "*").replace("**", "^").replace("X", "x")
    return text.replace("\\dfrac", "\\frac")


def finished(answer: str, expected: str) -> bool:
    """Whether a normalized answer is finished rather than arithmetic left to do.

    A finished answer is an integer, a decimal, a fraction (`3/4`, `\\frac{3}{4}`) or a sum of such
    multiples of powers of x, optionally after `x =`, with no more terms and no more fractions than
    `expected`.
    """
    return (
        len(answer) <= LONGEST
        and _FINISHED.fullmatch(answer) is not None
        and _size(answer) <= _size(expected)
        and _fractions(answer) <= _fractions(expected)
    )


@lru_cache(maxsize=4096)
def is_right(answer: str, expected: str) -> bool:
    """Whether an answer is finished and equals the expected one.

    Decimals are compared to six places, everything else exactly.
    """
    text = normal(answer)
    if not finished(text, expected):
        return False
    return bool(verify(_parsed(expected), _parsed(text), timeout_seconds=None))


def _parsed(text: str) -> Any:
    return parse(
        f"${text}$",
        [LatexExtractionConfig()],
        fallback_mode="no_fallback",
        parsing_timeout=None,
    )


def _size(text: str) -> int:
    return len(_TERMS.findall(text.split("=")[-1]))


def _fractions(text: str) -> int:
    return text.count("/") + text.count("\\frac")
