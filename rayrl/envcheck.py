"""`rayrl env check NAME`: play an environment with scripts before a model does.

What training relies on and code cannot show: that the same seed gives the same task and the same
episode, that tasks can travel between processes, and that nonsense from a model is data, no crash.
"""

from __future__ import annotations

import asyncio
import json
import pickle
import random
from collections.abc import Sequence

from rayrl.config import Config
from rayrl.env import Environment
from rayrl.errors import EnvError, RayrlError
from rayrl.players import ScriptedFunction, ScriptedPlayer
from rayrl.registry import installed_envs, load_env
from rayrl.rollout import play_episode
from rayrl.types import Episode, Message, Task

__all__ = ["check_environment", "run"]

_TASKS = 16


def run(config: Config) -> None:
    """Check `config.env` and print what was found.

    Raises:
        EnvError: something is wrong with the environment; every finding is named.
    """
    environment = load_env(config.env.name).configure(config.env.args, config.env.rewards)
    print(f"installed: {', '.join(installed_envs()) or 'none'}")
    print(
        f"{environment.name}: seats {', '.join(environment.seats)}; rewards {environment.rewards}"
    )
    lines, findings = asyncio.run(
        check_environment(environment, seed=config.run.seed, deadline_s=config.env.deadline_s)
    )
    print("\n".join(lines))
    if findings:
        raise EnvError(
            f"{environment.name} is not ready to train on:\n"
            + "\n".join(f"  - {finding}" for finding in findings)
        )
    print("ready to train on")


async def check_environment(
    environment: Environment, *, seed: int = 0, deadline_s: float = 120.0
) -> tuple[list[str], list[str]]:
    """Play `environment` with its own scripts and with nonsense.

    Args:
        environment: configured as it will be trained on.
        seed: of the tasks.
        deadline_s: for one episode.

    Returns:
        Lines for people (a player's mean reward and turns), and what is wrong; empty when nothing.
    """
    try:
        tasks = environment.tasks(seed, _TASKS)
        again = environment.tasks(seed, _TASKS)
    except RayrlError as error:
        return [], [str(error)]
    findings = _about_tasks(tasks, again)
    lines = []
    scripts: dict[str, ScriptedFunction] = {"(nonsense)": _nonsense, "(silence)": _silence}
    for name, function in {**environment.players, **scripts}.items():
        first = [await _play(environment, task, function, deadline_s) for task in tasks]
        second = [await _play(environment, task, function, deadline_s) for task in tasks]
        lines.append(_in_words(name, first))
        findings += _about_episodes(name, first, second)
    return lines, findings


def _nonsense(messages: Sequence[Message], rng: random.Random) -> str:
    return "".join(rng.choice("abc <>/0189{}\n\u00e9") for _ in range(40))


def _silence(messages: Sequence[Message], rng: random.Random) -> str:
    return ""


async def _play(
    environment: Environment, task: Task, function: ScriptedFunction, deadline_s: float
) -> Episode:
    players = {seat: ScriptedPlayer(function) for seat in environment.seats}
    name = f"check/{task.seed}"
    return await play_episode(environment, task, players, id=name, deadline_s=deadline_s)


def _about_tasks(tasks: Sequence[Task], again: Sequence[Task]) -> list[str]:
    findings = []
    for task, other in zip(tasks, again, strict=True):
        if task != other:
            findings.append(f"the same seed gave two tasks, {task} and {other}: use only `seed`")
            break
    if all(task == tasks[0] for task in tasks):
        findings.append("every task is the same one: use `seed` and `u` in the task source")
    try:
        same = [pickle.loads(pickle.dumps(task)) == task for task in tasks]
        if not all(same):
            findings.append("a task is not equal to its pickled copy: use plain fields")
    except Exception as error:
        findings.append(f"a task cannot be pickled ({error}): use plain fields at module level")
    try:
        json.dumps([task.to_dict() for task in tasks])
    except (TypeError, ValueError) as error:
        findings.append(f"a task cannot be written as JSON ({error}): use plain fields")
    return findings


def _about_episodes(name: str, first: Sequence[Episode], second: Sequence[Episode]) -> list[str]:
    findings = []
    for one, two in zip(first, second, strict=True):
        if one.failure is not None:
            findings.append(f"player {name}, {one.task}: {one.failure.message}")
            break
        if one.turns != two.turns or one.scores != two.scores:
            findings.append(
                f"player {name}, {one.task}: the same task was played twice and differed; draw "
                "randomness from task.rng(state)"
            )
            break
        if not one.turns:
            findings.append(f"player {name}, {one.task}: the agent was never asked anything")
            break
    return findings


def _in_words(name: str, episodes: Sequence[Episode]) -> str:
    played = [episode for episode in episodes if episode.failure is None]
    if not played:
        return f"  {name:12} no episode was played to its end"
    rewards = [sum(one.rewards.values()) / len(one.rewards) for one in played]
    turns = sum(len(one.turns) for one in played) / len(played)
    return (
        f"  {name:12} reward {sum(rewards) / len(rewards):.3f} "
        f"({min(rewards):.2f} to {max(rewards):.2f}), {turns:.1f} turns"
    )
