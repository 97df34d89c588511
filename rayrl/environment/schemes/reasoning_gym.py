"""Procedural datasets of reasoning-gym, `env.name=reasoning_gym:NAME`: a question and one reply.

The library makes each question from the task's seed and scores the reply by its own rules. Some of
these evaluate the answer as Python, directly or through sympy. A model could run any code in that
way, or keep the scorer busy forever with `9**9**9`; such datasets are given only answers that are
harmless (`_is_harmless`).
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import functools
import inspect
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

from reasoning_gym.composite import CompositeDataset
from reasoning_gym.factory import CURRICULA, DATASETS, create_dataset
from reasoning_gym.utils import SYSTEM_PROMPTS, extract_answer

from rayrl.environment.environment import Environment
from rayrl.environment.randomness import EpisodeRandom
from rayrl.environment.signature import declare_keywords, fit, plain_default, suggestion
from rayrl.errors import ConfigError
from rayrl.types import Message, Scores, Task, system, user

__all__ = ["Question", "load"]

_GIVEN = ("seed", "size")  # of each config: by the task, and 1

_EVALUATES = re.compile(r"(?<!\w)(?:eval|parse_expr|sympify)\((?:user_)?answer\b")
_LONGEST = 2_000  # characters of an answer that is evaluated
_LARGEST_EXPONENT = 100
_FUNCTIONS = {
    *("sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "sinh", "cosh", "tanh"),
    *("exp", "log", "ln", "sqrt", "Abs", "Rational"),
}
_NODES: tuple[type[ast.AST], ...] = (ast.Expression, ast.Constant, ast.Name, ast.expr_context)
_NODES += (ast.Call, ast.List, ast.Tuple, ast.UnaryOp, ast.USub, ast.UAdd)
_NODES += (ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow)


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
    if answer is not None and _evaluates(task.dataset) and not _is_harmless(answer):
        return scores | {"score": 0.0, "scorer_failed": 1.0}
    try:
        # of a copy, because other episodes of the group are scored by the same entry
        score = float(data.score_answer(answer, copy.deepcopy(entry)))
    except Exception:  # the library could not read what the model wrote
        return scores | {"score": 0.0, "scorer_failed": 1.0}
    return scores | {"score": score, "scorer_failed": 0.0}


@functools.cache
def _evaluates(name: str) -> bool:
    """Whether the scorer of a dataset evaluates the answer, by its source; a composite may."""
    dataset, _ = DATASETS[name]
    source = inspect.getsource(dataset)
    return dataset is CompositeDataset or _EVALUATES.search(source) is not None


def _is_harmless(answer: str) -> bool:
    """Whether an answer calls nothing but functions of mathematics and is soon evaluated.

    It is either an expression of numbers, names and lists, without attributes and with no power of
    a power; or no expression at all, without what a call or a power would need.
    """
    if len(answer) > _LONGEST or "__" in answer:
        return False
    try:
        # sympy reads ^ as a power
        nodes = list(ast.walk(ast.parse(answer.strip().replace("^", "**"), mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return re.search(r"[().!^{}\\]|\*\*", answer) is None
    for node in nodes:
        if not isinstance(node, _NODES):
            return False
        if isinstance(node, ast.Call):
            named = isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS
            if not named or node.keywords:
                return False
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
            inner = [*ast.walk(node.left), *ast.walk(node.right)]
            if any(isinstance(part, ast.Pow) for part in inner):
                return False
            numbers = [p.value for p in ast.walk(node.right) if isinstance(p, ast.Constant)]
            if not all(isinstance(n, int | float) and abs(n) <= _LARGEST_EXPONENT for n in numbers):
                return False
            if (
                any(isinstance(part, ast.Mult) for part in ast.walk(node.right))
                and len(numbers) > 1
            ):
                return False
    return True


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
