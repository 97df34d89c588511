"""Procedural datasets of reasoning-gym, `env.name=reasoning_gym:NAME`: a question and one reply.

The library makes each question from the task's seed and scores the reply by its own rules. Some of
these evaluate the answer as Python, directly or through sympy. A model could run any code in that
way, or keep the scorer busy forever with `9**9**9`; such datasets are given only answers that are
harmless (`_is_harmless`). A formula can still be one that sympy simplifies for minutes, which only
`env.isolated` ends.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import functools
import inspect
import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

from reasoning_gym.factory import CURRICULA, DATASETS, create_dataset
from reasoning_gym.utils import SYSTEM_PROMPTS, extract_answer

from rayrl.environment.environment import Environment
from rayrl.environment.randomness import EpisodeRandom
from rayrl.environment.signature import declare_keywords, fit, plain_default, suggestion
from rayrl.errors import ConfigError
from rayrl.types import Message, Scores, Task, system, user

__all__ = ["Question", "load"]

_GIVEN = ("seed", "size")  # of each config: by the task, and 1

_EVALUATED = re.compile(r"\b(eval|(?:float|int)\(parse_expr|parse_expr)\(answer")
_LONGEST = 2_000  # characters of an answer that is evaluated
_LARGEST_EXPONENT = 10_000  # or rather the product of the numbers in one
_FUNCTIONS = {
    *("sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "sinh", "cosh", "tanh"),
    *("exp", "log", "ln", "sqrt", "Abs"),
}


@dataclass(frozen=True, kw_only=True)
class Question(Task):
    """What a question is made from.

    Attributes:
        dataset: its name in reasoning-gym.
        config: fields of the dataset's config that are not its defaults, as plain data.
        prompt: name of the system message.
        level: of the dataset's curriculum, from 0; None without one.
    """

    dataset: str
    config: Mapping[str, Any]
    prompt: str
    level: int | None = None


def load(name: str) -> Environment:
    """The environment of a dataset.

    Its settings are the fields of the dataset's config, and two more: `prompt`, the library's name
    of a system message, and `curriculum`: whether `u` chooses the level of the dataset's own
    curriculum, from the easiest to the hardest, of those that the dataset accepts. Its player
    `gold` replies with the library's answer, where there is a single one.

    Raises:
        ConfigError: the library has no such dataset.
    """
    if name not in DATASETS:
        near = suggestion(name, sorted(DATASETS))
        raise ConfigError(
            f"env.name=reasoning_gym:{name}: reasoning-gym has no such dataset.{near}"
        )
    defaults = {key: value for key, value in _defaults(name).items() if key not in _GIVEN}

    def questions(seed: int, u: float, **settings: Any) -> Question:
        prompt, curriculum = settings.pop("prompt"), settings.pop("curriculum")
        config = {
            key: plain_default(value) for key, value in settings.items() if value != defaults[key]
        }
        level: int | None = None
        if curriculum:
            levels = [(k, {**at_level, **config}) for k, at_level in enumerate(_levels(name))]
            accepted = [one for one in levels if not _problem(name, one[1])] or levels
            level, config = accepted[int(u * len(accepted))]
        if problem := _problem(name, config):
            raise ConfigError(f"env.args of reasoning_gym:{name}, {config}: {problem}")
        return Question(seed=seed, dataset=name, config=config, prompt=prompt, level=level)

    hints = _hints(name)
    keywords = {key: (hints[key], value) for key, value in defaults.items()}
    keywords["prompt"] = Literal[tuple(SYSTEM_PROMPTS)], "default"
    keywords["curriculum"] = bool, False
    declare_keywords(questions, keywords)
    rewards = {"score": 1.0, "format": 0.0, "scorer_failed": 0.0}
    environment = Environment(_play, name=name, source=questions, rewards=rewards)
    environment.player("gold")(_gold)
    return environment


async def _play(task: Question, agent: Any) -> Scores:
    data, entry = _entry(task)
    reply = await agent([system(SYSTEM_PROMPTS[task.prompt]), user(entry["question"])])
    answer = extract_answer(str(reply))
    scores = {"format": float(answer is not None)}
    evaluator = _evaluator(entry["metadata"]["source_dataset"])
    if answer is not None and not _is_harmless(answer, evaluator):
        return scores | {"score": 0.0, "scorer_failed": 1.0}
    try:
        # of a copy, because other episodes of the group are scored by the same entry
        score = float(data.score_answer(answer, copy.deepcopy(entry)))
    except Exception:  # the library could not read what the model wrote
        return scores | {"score": 0.0, "scorer_failed": 1.0}
    return scores | {"score": score, "scorer_failed": 0.0}


@functools.cache
def _evaluator(name: str) -> str:
    """With what the scorer of a dataset evaluates the answer, by its source; empty: it does not."""
    found = _EVALUATED.search(inspect.getsource(DATASETS[name][0]))
    return found[1] if found else ""


def _is_harmless(answer: str, evaluator: str) -> bool:
    """Whether an answer can be evaluated: nothing in it is run, and no number in it is huge."""
    if not evaluator or answer.isalnum():
        return True
    if len(answer) > _LONGEST:
        return False
    try:
        if evaluator == "eval":
            ast.literal_eval(answer.strip())
            return True
        formula = ast.parse(answer.strip(), mode="eval").body
        return _is_arithmetic(formula, symbols=evaluator == "parse_expr")
    except SyntaxError:  # the library cannot evaluate it either; sympy reads ! as a function
        return re.search("[(!]", answer) is None
    except (ValueError, TypeError, RecursionError, MemoryError):
        return False


def _is_arithmetic(node: ast.AST, symbols: bool, in_power: bool = False) -> bool:
    """Whether it has only numbers, powers that are not nested and, with symbols, functions of them.

    Not strings: sympy evaluates them too.
    """
    match node:
        case ast.Constant(value=value):
            return type(value) in (int, float)
        case ast.Name(id=name):
            return symbols and "__" not in name
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand):
            return _is_arithmetic(operand, symbols, in_power)
        case ast.BinOp(left, ast.Add() | ast.Sub() | ast.Mult() | ast.Div(), right):
            return all(_is_arithmetic(part, symbols, in_power) for part in (left, right))
        case ast.BinOp(base, ast.Pow() | ast.BitXor(), exponent):
            numbers = [abs(part.value) for part in _parts(exponent, ast.Constant) if part.value]
            return (
                not in_power
                and all(_is_arithmetic(part, symbols, True) for part in (base, exponent))
                and math.prod(max(number, 1 / number) for number in numbers) <= _LARGEST_EXPONENT
            )
        case ast.Call(ast.Name(id=name), [argument], []):
            # of a symbol it is not computed
            of_symbol = any(part.id not in _FUNCTIONS for part in _parts(argument, ast.Name))
            plain = not _parts(argument, ast.Call) and not _parts(argument, ast.Pow)
            known = symbols and name in _FUNCTIONS and (of_symbol or plain)
            return known and _is_arithmetic(argument, symbols, in_power and not of_symbol)
    return False


def _parts(node: ast.AST, kind: type[ast.AST]) -> list[Any]:
    return [part for part in ast.walk(node) if isinstance(part, kind)]


def _gold(messages: Sequence[Message], rng: random.Random, task: Question) -> str:
    _, entry = _entry(task)
    return f"<answer>{entry['answer']}</answer>"


def _entry(task: Question) -> tuple[Any, dict[str, Any]]:
    """The dataset that scores, and the entry."""
    return _made(task.dataset, json.dumps(task.config), task.seed)


@functools.lru_cache(1024)  # the episodes of a group have the same
def _made(name: str, config: str, seed: int) -> tuple[Any, dict[str, Any]]:
    with EpisodeRandom("reasoning_gym", seed):  # a few datasets draw from the global generators
        data = create_dataset(name, seed=seed % 2**31, size=1, **_fields(name, json.loads(config)))
        return data, data[0]


@functools.cache
def _hints(name: str) -> dict[str, Any]:
    return get_type_hints(DATASETS[name][1])


def _fields(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Plain data as what the dataset's config takes."""
    hints = _hints(name)
    return {key: fit(value, hints[key]) for key, value in config.items()}


def _defaults(name: str) -> dict[str, Any]:
    return {
        field.name: field.default
        if field.default_factory is dataclasses.MISSING
        else field.default_factory()
        for field in dataclasses.fields(DATASETS[name][1])
    }


def _problem(name: str, config: Mapping[str, Any]) -> str:
    """Why the dataset refuses these fields of its config; empty if it does not."""
    try:
        made = DATASETS[name][1](**_fields(name, config))
        if hasattr(made, "validate"):
            made.validate()
    except (AssertionError, TypeError, ValueError) as error:
        return str(error) or type(error).__name__
    return ""


@functools.cache
def _levels(name: str) -> list[dict[str, Any]]:
    """Fields of the dataset's config at each level of its curriculum, where not its defaults."""
    if name not in CURRICULA:
        raise ConfigError(
            f"env.args.curriculum=true: reasoning-gym has no curriculum of {name}; set the fields "
            "of its config instead."
        )
    curriculum, defaults, levels = CURRICULA[name](), _defaults(name), []
    attributes = curriculum.attributes
    for level in range(max(len(attribute.levels) for attribute in attributes.values())):
        for key, attribute in attributes.items():
            curriculum.set_attr_level(key, min(level, len(attribute.levels) - 1))
        made = curriculum.generate_configuration()
        fields = {key: getattr(made, key) for key in defaults if key not in _GIVEN}
        changed = {key: value for key, value in fields.items() if value != defaults[key]}
        levels.append({key: plain_default(value) for key, value in changed.items()})
    return levels
