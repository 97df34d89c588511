"""What is wrong with an environment that its author would want to know before a run."""

from __future__ import annotations

import asyncio
import dataclasses
import pickle
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rayrl.durable import Course, Diverged
from rayrl.env import Environment
from rayrl.errors import RayrlError
from rayrl.players import ScriptedPlayer
from rayrl.rollout import play_episode
from rayrl.tasks import misread
from rayrl.types import Episode, Message, Task

__all__ = ["check_env", "find_problems", "task_problems"]

DEADLINE_S = 10.0  # for an episode in which nobody thinks
_TASKS = 8
_REMEDY = (
    "use task.rng(state). Until then its episodes start over, instead of going on, when a process "
    "dies around them"
)
_REPLIES = ("", "0", "yes", "<answer>1</answer>", "I do not know.")


def check_env(
    env: Environment, args: Mapping[str, Any] | None = None, deadline_s: float = DEADLINE_S
) -> list[str]:
    """Problems of an environment, in words; an empty list if none was found.

    Tasks are drawn twice, and each is played twice with a player whose replies are fixed, and once
    with each scripted player of the environment; what that played is then played again by its
    recorded replies, as it is when a process died. Nothing is sent to a model.

    Args:
        env: what to check.
        args: keywords of its task source.
        deadline_s: wall time for one episode.
    """
    return asyncio.run(find_problems(env, args or {}, deadline_s))


async def find_problems(
    env: Environment, args: Mapping[str, Any], deadline_s: float = DEADLINE_S
) -> list[str]:
    """`check_env` for those who are in an event loop already."""
    try:
        env = env.configure(args)
        tasks = env.tasks(seed=0, n=_TASKS)
        again = env.tasks(seed=0, n=_TASKS)
    except RayrlError as error:
        return [str(error)]
    problems = _task_problems(env, tasks, again)
    group_weights = [group.weight for group in env.group_rewards.values()]
    if not any((*env.rewards.values(), *group_weights)):
        problems.append("every reward has weight 0: there is nothing to learn from")
    for task in tasks:
        found = await _play_problems(env, task, deadline_s)
        if found:
            problems += found
            break
    for name, function in sorted(env.players.items()):
        player = ScriptedPlayer(function)
        for task in tasks:
            problem = await _player_problem(env, task, player, deadline_s)
            if problem:
                problems.append(f"with player {name!r}: {problem}")
                break
    return problems


def _task_problems(env: Environment, tasks: Sequence[Task], again: Sequence[Task]) -> list[str]:
    problems = []
    kind = type(tasks[0])
    frozen = dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    if not frozen or (kind is not Task and "__dataclass_fields__" not in vars(kind)):
        problems.append(f"{kind.__name__} must be a frozen dataclass: @dataclass(frozen=True)")
    elif tasks != again:
        first = next(k for k in range(_TASKS) if tasks[k] != again[k])
        problems.append(
            f"the task source is not deterministic: the same seed and u gave {tasks[first]!r} and "
            f"{again[first]!r}; draw everything from random.Random(seed)"
        )
    if callable(env.source) and len({task.seed for task in tasks}) == 1:
        problems.append(
            "every task has the same seed: the source must pass its `seed` on to the task, or "
            "task.rng() gives the same luck everywhere"
        )
    problems += task_problems(tasks)
    try:
        same = pickle.loads(pickle.dumps(tasks[0])) == tasks[0]
    except Exception as error:
        problems.append(f"{kind.__name__} cannot be sent to another process: {error}")
    else:
        if not same:
            problems.append(f"{kind.__name__} is not equal to itself after pickling")
    return problems


def task_problems(tasks: Iterable[Task]) -> list[str]:
    """What is wrong with the first task that a file would not give back as it is, if one is."""
    for task in tasks:
        try:
            problem = misread(task)
        except TypeError as error:
            problem = str(error)
        if problem:
            name = type(task).__name__
            return [
                f"{name} cannot be written to the episode log as JSON and read again: {problem}"
            ]
    return []


async def _play_problems(env: Environment, task: Task, deadline_s: float) -> list[str]:
    first = await _play(env, task, ScriptedPlayer(_fixed), deadline_s)
    if first.failure is not None:
        return [first.failure.message]
    problems = []
    if not first.turns:
        problems.append(f"no model was asked anything on task {task!r}")
    second = await _play(env, task, ScriptedPlayer(_fixed), deadline_s)
    for k, (one, other) in enumerate(zip(first.turns, second.turns, strict=False)):
        if one.prompt != other.prompt:
            problems.append(
                "not deterministic: the same task and replies led to different messages at turn "
                f"{k} ({_shown(one.prompt)} and {_shown(other.prompt)}); {_REMEDY}"
            )
            return problems
    if len(first.turns) != len(second.turns) or first.scores != second.scores:
        problems.append(f"not deterministic: {_scored(first, second)}; {_REMEDY}")
    return problems


async def _player_problem(
    env: Environment, task: Task, player: ScriptedPlayer, deadline_s: float
) -> str:
    """What goes wrong with a scripted player, which may get further than fixed replies do."""
    first = await _play(env, task, player, deadline_s)
    if first.failure is not None:
        return first.failure.message
    try:
        again = await _play(env, task, player, deadline_s, Course(first.turns))
    except Diverged as error:
        return f"not deterministic: with the same replies, {error}; {_REMEDY}"
    if again.scores != first.scores:
        return f"not deterministic: {_scored(first, again)}; {_REMEDY}"
    return ""


def _scored(first: Episode, second: Episode) -> str:
    return f"the same task and replies were scored {dict(first.scores)} and {dict(second.scores)}"


async def _play(
    env: Environment,
    task: Task,
    player: ScriptedPlayer,
    deadline_s: float,
    course: Course | None = None,
) -> Episode:
    players = dict.fromkeys(env.seats, player)
    return await play_episode(env, task, players, id="check", deadline_s=deadline_s, course=course)


def _fixed(messages: Sequence[Message], rng: random.Random) -> str:
    return rng.choice(_REPLIES)


def _shown(prompt: Sequence[Message]) -> str:
    return repr(" | ".join(message.content for message in prompt)[-120:])
