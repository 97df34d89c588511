"""What `v0.py` makes of a rubric's functions, stop conditions and states."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import functools
import inspect
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import verifiers as vf
from verifiers.types import State
from verifiers.utils.message_utils import normalize_messages

from rayrl.errors import describe_error
from rayrl.types import Episode

__all__ = [
    "StopConditions",
    "awaited",
    "failed_functions",
    "leaves",
    "left_out",
    "noting_failures",
    "score_name",
    "state_facts",
    "state_of",
]

_logger = logging.getLogger("verifiers")
# of a state: handles, clocks and what rayrl has itself
_NOT_FACTS = {
    *("client", "input", "model", "sampling_args", "task", "timing", "tool_defs", "trajectory"),
    *("trajectory_id", "usage", "usage_tracker"),
}
failed_functions: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar(
    "failed", default=None
)
"""Names of the functions of a rubric that raised while the running code scored."""


def leaves(rubric: Any) -> Iterator[Any]:
    """The rubrics of a group of rubrics, in order; of another one, itself."""
    if isinstance(rubric, vf.RubricGroup):
        for part in rubric.rubrics:
            yield from leaves(part)
    else:
        yield rubric


def score_name(function: str) -> str:
    """The name of a function's score, a word."""
    return re.sub(r"\W", "_", function)


def noting_failures(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with a score of 0 where it raises, as in verifiers, but counted.

    The first error is logged; verifiers would log each of them.
    """
    said = False

    @functools.wraps(function)
    async def call(*args: Any, **keywords: Any) -> Any:
        nonlocal said
        try:
            value = function(*args, **keywords)
            return float(await value if inspect.isawaitable(value) else value)
        except Exception as error:
            failed = failed_functions.get()
            if failed is not None:
                failed.append(function.__name__)
            if not said:
                said = True
                what = "%s of the rubric raised %s; the score failed_functions counts these"
                _logger.warning(what, function.__name__, describe_error(error))
            return 0.0

    found: Callable[..., Any] = _with_signature(call)
    return found


def _with_signature(function: Any) -> Any:
    """The same function with its signature at hand.

    verifiers inspects functions at each call, which takes half the time of its rollouts.
    """

    def call(*args: Any, **keywords: Any) -> Any:
        return function(*args, **keywords)

    call.__name__ = function.__name__
    call.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return call


def awaited(value: Any) -> Any:
    """The value of a coroutine, in a loop of its own: group rewards are no coroutines."""
    if not inspect.isawaitable(value):
        return value

    async def wait() -> Any:
        return await value

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(contextvars.copy_context().run, asyncio.run, wait()).result()


class StopConditions:
    """The stop conditions of an environment as one, in their order, whose name is the one met.

    verifiers inspects the signature of each at each turn, which takes half the time of a rollout.
    """

    def __init__(self, conditions: Sequence[Callable[..., Any]]) -> None:
        self.__name__ = ""
        self.__signature__ = inspect.signature(self.__call__)
        self._conditions = []
        for condition in conditions:
            parameters = inspect.signature(condition).parameters.values()
            names = {one.name for one in parameters}
            every = any(one.kind is one.VAR_KEYWORD for one in parameters)
            self._conditions.append((condition, names, every))

    async def __call__(self, **given: Any) -> bool:
        """Whether one of them is met."""
        for condition, names, every in self._conditions:
            met = condition(**(given if every else {k: v for k, v in given.items() if k in names}))
            if inspect.isawaitable(met):
                met = await met
            if met:
                self.__name__ = condition.__name__  # read before any other code runs
                return True
        return False


def _plain(value: Any) -> Any:
    """A value of a state as JSON data.

    Raises:
        TypeError: it is none.
    """
    if hasattr(value, "model_dump"):
        return _plain(value.model_dump(mode="json", exclude_none=True))
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError("keys that are not strings")
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if hasattr(value, "item") and not getattr(value, "shape", None):  # a scalar of NumPy or torch
        value = value.item()
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise TypeError(type(value).__name__)


def state_facts(state: Any) -> dict[str, Any]:
    """What of a state is plain data, and the names of the rest."""
    known: dict[str, Any] = {}
    left_out = []
    for key, value in {**state, **state["input"]}.items():
        if key in _NOT_FACTS:
            continue
        try:
            known[key] = _plain(value)
        except TypeError:
            left_out.append(key)
    steps = [{"completion": _plain(step["completion"])} for step in state["trajectory"]]
    return {"known": known, "left_out": left_out, "steps": steps}


def left_out(episode: Episode) -> list[str]:
    """What of an episode's state is no plain data."""
    return list(episode.facts["state"]["left_out"])


def state_of(episode: Episode) -> Any:
    """The state of an episode as functions over a group get it.

    The steps of its trajectory have their completions only.
    """
    facts = copy.deepcopy(episode.facts["state"])
    known, task = facts["known"], episode.task
    row = dict(getattr(task, "row", {}))
    state = State(input={key: known.pop(key, value) for key, value in row.items()})
    state["task"] = state["input"]
    for key, value in known.items():
        state[key] = value
    for key in ("prompt", "completion"):
        if isinstance(state.get(key), str | list):
            state[key] = normalize_messages(state[key])
    state["trajectory"] = [
        {**step, "completion": normalize_messages(step["completion"])} for step in facts["steps"]
    ]
    return state
