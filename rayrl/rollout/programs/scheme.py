"""A program as an environment, `env.name=program:agent.py`: it is run, and its output is scored."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rayrl.config.registry import Registry, local_copy
from rayrl.environment.environment import Environment
from rayrl.errors import ConfigError, EnvError, safe_repr
from rayrl.types import Scores, Task

__all__ = ["Given", "load"]

Score = Callable[..., float]


@dataclass(frozen=True, kw_only=True)
class Given(Task):
    """What a program reads, as JSON: `seed`, and `u`, evenly spread over [0, 1).

    Attributes:
        score: function of its output, and of this as a dict if it takes two arguments.
        timeout_s: for its run; 0: the episode's deadline.
        own_limits, own_temperature: see `Agent.endpoint`.
        preload: see `rayrl.program`.
    """

    u: float
    score: str
    timeout_s: float
    own_limits: bool
    own_temperature: bool
    preload: tuple[str, ...]


def load(name: str) -> Environment:
    """The environment of a program: a Python file, or one that can be executed.

    Its scores are `score`, and `failed`, 1 for an exit status other than 0, which has a score too.

    Raises:
        ConfigError: there is no such file.
    """
    path = local_copy(name)
    if not path.is_file():
        raise ConfigError(f"env.name=program:{name}: there is no file {path}")
    words = [sys.executable, str(path)] if path.suffix == ".py" else [str(path)]

    def tasks(
        seed: int,
        u: float,
        *,
        score: str,
        timeout_s: float = 0.0,
        own_limits: bool = False,
        own_temperature: bool = False,
        preload: tuple[str, ...] = (),
    ) -> Given:
        _function(score)
        return Given(
            seed=seed,
            u=u,
            score=score,
            timeout_s=timeout_s,
            own_limits=own_limits,
            own_temperature=own_temperature,
            preload=preload,
        )

    async def play(task: Given, agent: Any) -> Scores:
        given = {"seed": task.seed, "u": task.u}
        done = await agent.program(
            words,
            own_limits=task.own_limits,
            own_temperature=task.own_temperature,
            preload=task.preload,
            stdin=json.dumps(given),
            timeout_s=task.timeout_s or None,
            check=False,
        )
        function = _function(task.score)
        takes = len(inspect.signature(function).parameters)
        value = function(*(done.stdout, given)[:takes])
        if inspect.isawaitable(value):
            value = await value
        if not isinstance(value, int | float):
            raise EnvError(f"env.args.score={task.score}: returned {safe_repr(value)}, no number")
        return {"score": float(value), "failed": float(done.code != 0)}

    rewards = {"score": 1.0, "failed": 0.0}
    return Environment(play, name=path.stem, source=tasks, rewards=rewards)


def _function(score: str) -> Score:
    functions: Registry[Score] = Registry("env.args.score")
    return functions.resolve(score)
