"""`rayrl env check NAME`: play an environment with scripts before a model does."""

from __future__ import annotations

import asyncio
import statistics
import textwrap

from rayrl.cluster.open import make_environment
from rayrl.config import Config, validate
from rayrl.config.mix import components, named_keys
from rayrl.environment.environment import Environment
from rayrl.environment.registry import installed_envs
from rayrl.errors import EnvError
from rayrl.rollout.check import DEADLINE_S, check_env, log_problems
from rayrl.rollout.players import ScriptedPlayer
from rayrl.rollout.rollout import play_episode

__all__ = ["run"]

_TASKS = 16


def run(config: Config) -> None:
    """Print what `config.env` is, how its scripted players do, and what is wrong with it.

    Raises:
        EnvError: something is wrong with the environment; every problem is named.
    """
    validate(config)
    for component, own in components(config).items():
        with named_keys(component):
            _check(own, make_environment(own, component))


def _check(config: Config, environment: Environment) -> None:
    of_groups = {name: group.weight for name, group in environment.group_rewards.items()}
    rewards = environment.rewards | of_groups
    print(f"{environment.name}: seats {', '.join(environment.seats)}; rewards {rewards}")
    for key, value in environment.args.items():
        print(f"  env.args.{key}: {textwrap.shorten(repr(value), 80)}")
    print(f"  installed besides: {', '.join(_others(config.env.name)) or 'none'}")
    problems = check_env(environment)
    if not problems:
        for name, args in config.eval.cells.items():
            tasks = environment.configure(args).tasks(config.run.seed, _TASKS)
            problems += [f"eval.cells.{name}: {what}" for what in log_problems(tasks)]
    for name in sorted(environment.players) if not problems else ():
        row, failed = asyncio.run(_row(environment, name, config.run.seed))
        print(row)
        problems += failed
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise EnvError(f"{environment.name} is not ready to train on:\n{listed}")
    print("ready to train on")


def _others(name: str) -> list[str]:
    return [other for other in installed_envs() if other != name]


async def _row(environment: Environment, name: str, seed: int) -> tuple[str, list[str]]:
    """How a scripted player of the environment does in every seat, and the first failure."""
    failures: list[str] = []
    rewards: list[float] = []
    turns: list[int] = []
    for number, task in enumerate(environment.tasks(seed, _TASKS)):
        player = ScriptedPlayer(environment.players[name])
        episode = await play_episode(
            environment,
            task,
            dict.fromkeys(environment.seats, player),
            id=f"check/{name}/{number}",
            seed=task.seed,
            deadline_s=DEADLINE_S,
        )
        if episode.failure is not None:
            failures.append(f"with player {name!r}: {episode.failure.message}")
            continue
        rewards += episode.rewards.values()
        turns.append(len(episode.turns))
    row = f"  player {name}:"
    if rewards:
        row += (
            f" reward {statistics.fmean(rewards):.2f} ({min(rewards):.2f} to {max(rewards):.2f}), "
            f"{statistics.fmean(turns):.1f} turns"
        )
    if failures:
        row += f"{',' if rewards else ''} {len(failures)} of {_TASKS} episodes failed"
    return row, failures[:1]
