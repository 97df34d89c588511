"""Exhaustive checks: an environment follows every line of play of a model that decodes greedily.

Only then its play is a function that can be checked to the end.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any

from rayrl.config import Config
from rayrl.config.mix import components, eval_cells
from rayrl.environment.environment import Environment
from rayrl.errors import EnvError, RayrlError, describe_error
from rayrl.rollout.agent import Agent, Player

__all__ = ["check_args", "check_prefixes", "run_checks"]


def check_prefixes(config: Config, environments: Mapping[str, Environment]) -> dict[str, str]:
    """How the metrics of each check begin, `eval/NAME/`, by the check's name; see `run_checks`."""
    return {
        label: "eval/" + re.sub(r"\s+", "_", label) + "/"
        for component, environment in environments.items()
        for label in _labels(config, environment, component)
    }


def _labels(config: Config, environment: Environment, component: str) -> dict[str, str]:
    """The checks to run, as they are called in results; of a mixture, after the environment."""
    greedy = config.eval.exhaustive and config.eval.temperature == 0
    if not greedy or len(environment.seats) > 1:
        return {}
    return {f"{component}/{name}" if component else name: name for name in environment.checks}


async def run_checks(
    config: Config,
    environments: Mapping[str, Environment],
    open_player: Callable[[str], AbstractAsyncContextManager[Player]],
) -> dict[str, Mapping[str, float]]:
    """Every exhaustive check; none of environments with several seats, or where play is sampled.

    Args:
        environments: by component of the mixture; without one, under an empty name.
        open_player: opens the one of a component's seat.

    Raises:
        EnvError: a check raised an exception.
    """
    found: dict[str, Mapping[str, float]] = {}
    for component, own in components(config).items():
        environment = environments[component]
        args = check_args(environment, eval_cells(own, component))
        for label, name in _labels(config, environment, component).items():
            async with open_player(component) as player:
                found[label] = await _run(environment, name, args, player)
    return found


async def _run(
    environment: Environment, name: str, args: Mapping[str, Any], player: Player
) -> Mapping[str, float]:
    made: list[Agent] = []

    def new_agent() -> Agent:
        made.append(Agent(player, seat=environment.seats[0], episode=f"check-{name}-{len(made)}"))
        return made[-1]

    try:
        found = await environment.checks[name](new_agent, args)
    except RayrlError:
        raise
    except Exception as error:
        what = f"check {name!r} of environment {environment.name!r} raised {describe_error(error)}"
        raise EnvError(what) from error
    for agent in made:
        agent.close()
    return found


def check_args(environment: Environment, cells: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Settings a check runs with: the environment's, and what all cells agree on."""
    args = dict(environment.args)
    rows = list(cells.values())
    for key in args:
        if rows and all(key in row for row in rows) and all(r[key] == rows[0][key] for r in rows):
            args[key] = rows[0][key]
    return args
