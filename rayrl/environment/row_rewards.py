"""Rewards for a reply to a row that has a right answer, by name.

Each has two parts. `read` turns the row's answer into what a reply is compared with, and raises
ValueError for an answer that cannot be right; it is called for every row before anything is played.
`score` gives 0 to 1. What a model writes is judged in bounded time without a clock: a limit that
depends on the load of the machine would make rewards depend on it too.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from rayrl.config.registry import Registry
from rayrl.errors import ConfigError

__all__ = ["REWARDS", "AnswerOptions", "AnswerReward", "answer_text"]


@dataclass(frozen=True)
class AnswerOptions:
    """Settings that say what an answer is.

    Attributes:
        choices: for `choice`: what can be chosen.
        schema: for `json`: the schema of every reply; empty: each row's answer is its schema.
    """

    choices: tuple[str, ...] = ()
    schema: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class AnswerReward:
    """A named reward.

    Attributes:
        read: row's answer and options -> what replies are compared with; ValueError: no answer.
        score: reply and that -> 0 to 1.
        has_reply: whether the answer itself is a right reply, and a list of answers means that any
            of them is right.
        check: raises ConfigError where the reward cannot work.
    """

    read: Callable[[Any, AnswerOptions], Any]
    score: Callable[[str, Any], float]
    has_reply: bool = True
    check: Callable[[], None] = lambda: None

    def __call__(self, reply: str, answer: Any, options: AnswerOptions) -> float:
        """Score a reply; where any of several answers is right, by the best."""
        return max(self.score(reply, one) for one in self.answers(answer, options))

    def answers(self, answer: Any, options: AnswerOptions) -> Sequence[Any]:
        """What a reply is compared with.

        Raises:
            ValueError: the answer cannot be right.
        """
        if not (self.has_reply and isinstance(answer, list)):
            return [self.read(answer, options)]
        if not answer:
            raise ValueError("the list of answers is empty")
        return [self.read(one, options) for one in answer]


REWARDS: Registry[Callable[..., Any]] = Registry("env.args.reward")


def answer_text(answer: Any) -> str:
    """An answer as a model would write it: text as it is, other data as JSON.

    A number is written without an exponent, as people do.
    """
    if isinstance(answer, float) and math.isfinite(answer):
        return format(Decimal(repr(answer)), "f")
    return answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)


# --- exact ---------------------------------------------------------------------------------------


def _words(text: str) -> str:
    return " ".join(text.split())


def _read_exact(answer: Any, options: AnswerOptions) -> str:
    if not (text := _words(answer_text(answer))):
        raise ValueError("it is empty")
    return text


def _same_words(reply: str, answer: str) -> float:
    return float(_words(reply) == answer)


# --- number --------------------------------------------------------------------------------------

_NUMBER = re.compile(
    r"(?<![\w.])[-+−]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+−]?\d{1,3}(?!\w))?"
)


def _last_number(text: str) -> Decimal | None:
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "").replace("−", "-")) if found else None


def _read_number(answer: Any, options: AnswerOptions) -> Decimal:
    if isinstance(answer, bool) or (number := _last_number(answer_text(answer))) is None:
        raise ValueError("there is no number in it")
    return number


def _same_number(reply: str, answer: Decimal) -> float:
    return float(_last_number(reply) == answer)


# --- choice --------------------------------------------------------------------------------------


def _read_choice(answer: Any, options: AnswerOptions) -> tuple[str, re.Pattern[str]]:
    text = answer_text(answer).strip()
    known = {_folded(choice): choice for choice in options.choices}
    if _folded(text) not in known:
        raise ValueError(f"it is none of env.args.choices ({', '.join(options.choices)})")
    return known[_folded(text)], _choice_pattern(options.choices)


def _folded(choice: str) -> str:
    """Letters count as they are written, so that the article "a" is not the choice A."""
    return choice if len(choice) == 1 else choice.casefold()


@functools.lru_cache(maxsize=64)
def _choice_pattern(choices: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = sorted(choices, key=len, reverse=True)
    words = [re.escape(one) if len(one) == 1 else f"(?i:{re.escape(one)})" for one in longest_first]
    return re.compile(rf"(?<!\w)(?:{'|'.join(words)})(?!\w)")


def _same_choice(reply: str, answer: tuple[str, re.Pattern[str]]) -> float:
    choice, pattern = answer
    named = pattern.findall(reply)
    return float(bool(named) and _folded(named[-1]) == _folded(choice))


# --- regex ---------------------------------------------------------------------------------------


def _read_regex(answer: Any, options: AnswerOptions) -> re.Pattern[str]:
    if not isinstance(answer, str) or not answer:
        raise ValueError("it is not a regular expression")
    try:
        return re.compile(answer)
    except re.error as error:
        raise ValueError(f"it is not a regular expression: {error}") from None


def _matches(reply: str, answer: re.Pattern[str]) -> float:
    return float(answer.search(reply) is not None)


# --- json ----------------------------------------------------------------------------------------

_FENCE = re.compile(r"\s*```(?:json)?[ \t]*\n(.*)\n\s*```\s*", re.DOTALL)


def _read_schema(answer: Any, options: AnswerOptions) -> Any:
    schema = answer if options.schema is None else options.schema
    try:
        return _validator(schema if isinstance(schema, str) else json.dumps(schema))
    except ValueError as error:
        raise ValueError(f"it is not a JSON schema: {error}") from None


@functools.lru_cache(maxsize=1024)
def _validator(text: str) -> Any:
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import validator_for
    from referencing.exceptions import Unresolvable

    schema = json.loads(text)
    if not isinstance(schema, dict | bool):
        raise ValueError("expected an object")
    kind = validator_for(schema)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise ValueError(error.message) from None
    validator = kind(schema)
    for reference in _references(schema):
        try:
            validator.evolve(schema={"$ref": reference}).is_valid(None)
        except (Unresolvable, RecursionError):
            raise ValueError(f"its $ref {reference!r} leads nowhere") from None
    return validator


_VALUES = ("const", "default", "enum", "examples")  # keys of a schema whose values are no schemas


def _references(schema: Any) -> Iterator[str]:
    """What a schema refers to; not inside of values, or of parts with an `$id` of their own."""
    if isinstance(schema, dict):
        if isinstance(reference := schema.get("$ref"), str):
            yield reference
        parts = {key: part for key, part in schema.items() if key not in _VALUES}
        schema = [p for p in parts.values() if not (isinstance(p, dict) and "$id" in p)]
    if isinstance(schema, list):
        for part in schema:
            yield from _references(part)


def _fits_schema(reply: str, validator: Any) -> float:
    fenced = _FENCE.fullmatch(reply)
    try:
        data = json.loads(fenced[1] if fenced else reply, parse_constant=_refuse)
        return float(validator.is_valid(data))
    except (ValueError, RecursionError, OverflowError):  # also of what a validator computes with it
        return 0.0


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


# --- math ----------------------------------------------------------------------------------------

_LONGEST = 200  # characters of an answer that is passed to a computer algebra system
_SMALL = r"(?:-?\d{1,2}|-?[a-z]|-?\d/\d|-?\\d?frac\{\d\}\{\d\})"
_POWER = re.compile(rf"(?<=\w)\s?\^\s?(?:\{{{_SMALL}\}}|-?\d{{1,2}}(?!\d)|[a-z])(?!\s?\^)")
_POWER_OF_SUM = re.compile(r"(?<=[)}\]])\s?\^\s?(?:[2-4](?!\d)|\{[2-4]\})(?!\s?\^)")
_UNFINISHED = re.compile(r"\^|\*\*|!|\\(?:int|sum|prod|lim|binom|choose)|\d{40}")
_WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{3,}|\\text")  # so that this is no bare expression
_DOLLARS = re.compile(r"\$\$?([^$]+)\$\$?")


def _check_math() -> None:
    if importlib.util.find_spec("math_verify") is None:
        raise ConfigError(
            "env.args.reward=math needs math-verify: pip install 'rayrl[math]', or compare numbers "
            "with env.args.reward=number."
        )


def _read_math(answer: Any, options: AnswerOptions) -> Any:
    text = answer_text(answer)
    if not (parsed := _parsed(_final(text))):
        raise ValueError("it cannot be read as mathematics that can be compared")
    return parsed


def _same_math(reply: str, answer: Any) -> float:
    parsed = _parsed(_final(reply))
    if not parsed:
        return 0.0
    _, verify = _math_verify()
    return float(bool(verify(list(answer), list(parsed), timeout_seconds=None)))


@functools.cache
def _math_verify() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The library's functions, without its warning that time limits are off: `_parsed` bounds."""
    from math_verify import parse, verify

    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).addFilter(lambda record: "Timeout is disabled" not in record.msg)
    return parse, verify


def _final(text: str) -> str:
    """The last boxed expression, else the last one in dollars, else the last line."""
    if (start := text.rfind("\\boxed{")) >= 0:
        depth, begin = 0, start + len("\\boxed{")
        for place in range(begin - 1, len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if not depth:
                return f"${text[begin:place]}$"
    if dollars := _DOLLARS.findall(text):
        return f"${dollars[-1]}$"
    *_, line = ["", *text.strip().splitlines()]
    return line if not line or _WORD.search(line) else f"${line}$"


@functools.lru_cache(maxsize=4096)
def _parsed(final: str) -> tuple[Any, ...]:
    """What math-verify reads; nothing of an expression that could take long to compare.

    `9^9^9^9` would block the event loop, and with it hundreds of episodes.
    """
    simple, sums = _POWER_OF_SUM.subn("", _POWER.sub("", final))
    if len(final) > _LONGEST or sums > 2 or _UNFINISHED.search(simple):
        return ()
    parse, _ = _math_verify()
    return tuple(parse(final, parsing_timeout=None))


for _name, _reward in {
    "exact": AnswerReward(_read_exact, _same_words),
    "number": AnswerReward(_read_number, _same_number),
    "math": AnswerReward(_read_math, _same_math, check=_check_math),
    "choice": AnswerReward(_read_choice, _same_choice),
    "regex": AnswerReward(_read_regex, _matches, has_reply=False),
    "json": AnswerReward(_read_schema, _fits_schema, has_reply=False),
}.items():
    REWARDS.register(_name)(_reward)
