"""What is wrong with an environment that its author would want to know before a run."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import pickle
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rayrl.environment.environment import Environment
from rayrl.environment.tasks import misread
from rayrl.errors import RayrlError
from rayrl.rollout.agent import Conversation, Options, Player
from rayrl.rollout.players import ScriptedPlayer
from rayrl.rollout.resume import EpisodeResume, ReplayMismatch
from rayrl.rollout.rollout import play_episode
from rayrl.types import Episode, Message, Task, Turn

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
    recorded replies, as it is when a process died. Then all tasks are played at once, as in a run.
    Nothing is sent to a model.

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
    for name in sorted({"model", "endpoint"} & set(env.players)):
        problems.append(f"player {name!r} cannot be chosen: eval.player={name} is another's name")
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
    return problems or await _at_once_problems(env, tasks, deadline_s)


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
    hidden = sorted({"rng", "to_dict"} & {field.name for field in dataclasses.fields(tasks[0])})
    if hidden:
        problems.append(f"{kind.__name__} has a field {hidden[0]!r}, which hides Task.{hidden[0]}")
        return problems
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
        again = await _play(env, task, player, deadline_s, EpisodeResume(first.turns))
    except ReplayMismatch as error:
        return f"not deterministic: with the same replies, {error}; {_REMEDY}"
    if again.scores != first.scores:
        return f"not deterministic: {_scored(first, again)}; {_REMEDY}"
    return ""


async def _at_once_problems(
    env: Environment, tasks: Sequence[Task], deadline_s: float
) -> list[str]:
    """What is different where other episodes, siblings among them, are live as well."""
    problems = []
    players = {name: ScriptedPlayer(function) for name, function in sorted(env.players.items())}
    for name, player in {"": ScriptedPlayer(_fixed), **players}.items():
        scripts = [_Script(player) for _ in tasks]
        alone = [
            await _play(env, task, script, deadline_s)
            for task, script in zip(tasks, scripts, strict=True)
        ]
        live = [*zip(tasks, scripts, strict=True)] * 2
        at_once = await asyncio.gather(
            *[
                _play(env, task, script.again(1 + k % 3), deadline_s * len(live))
                for k, (task, script) in enumerate(live)
            ]
        )
        for one, other in zip([*alone, *alone], at_once, strict=True):
            if found := _difference(one, other, env.seats):
                who = f"with player {name!r}: " if name else ""
                problems.append(
                    f"{who}an episode is another one when others are live: on task {one.task!r}, "
                    f"{found}. Episodes share something that belongs to one of them, such as a "
                    "variable of the module or of a class; make it anew in the coroutine"
                )
                break
    return problems


class _Script:
    """A player of one episode that can give its replies again, while other episodes go on.

    It waits for the same number of rounds of the event loop before every reply, so that seats that
    are asked at once answer in the order in which they were asked.
    """

    trainable = False

    def __init__(self, player: ScriptedPlayer, rounds: int = 0) -> None:
        self.player, self.rounds = player, rounds
        self.given: dict[tuple[str, int], Turn] = {}

    def again(self, rounds: int) -> _Script:
        """A player with the same replies; what it was not asked before, the player is asked."""
        new = _Script(self.player, rounds)
        new.given = dict(self.given)
        return new

    async def answer(
        self, conversation: Conversation, new: Sequence[Message], options: Options
    ) -> Turn:
        for _ in range(self.rounds):
            await asyncio.sleep(0)
        place = (conversation.session, len(conversation.messages))
        if place not in self.given:
            self.given[place] = await self.player.answer(conversation, new, options)
        return dataclasses.replace(self.given[place], prompt=tuple(new), state=options.state)


def _difference(alone: Episode, at_once: Episode, seats: Sequence[str]) -> str:
    """What is not the same in two episodes of one task, seed and player; empty if nothing."""
    if at_once.failure is not None:
        return f"it failed: {at_once.failure.message}"
    for seat in seats:
        pairs = itertools.zip_longest(alone.turns_of(seat), at_once.turns_of(seat))
        for k, (one, other) in enumerate(pairs):
            if one is None or other is None:
                return f"it has {'fewer' if other is None else 'more'} turns"
            if one.prompt != other.prompt:
                return (
                    f"it says {_shown(other.prompt)} instead of {_shown(one.prompt)} at turn {k} "
                    f"of {seat!r}"
                )
    return _scored(alone, at_once) if alone.scores != at_once.scores else ""


def _scored(first: Episode, second: Episode) -> str:
    return f"the same task and replies were scored {dict(first.scores)} and {dict(second.scores)}"


async def _play(
    env: Environment,
    task: Task,
    player: Player,
    deadline_s: float,
    resume: EpisodeResume | None = None,
) -> Episode:
    players = dict.fromkeys(env.seats, player)
    return await play_episode(env, task, players, id="check", deadline_s=deadline_s, resume=resume)


def _fixed(messages: Sequence[Message], rng: random.Random) -> str:
    return rng.choice(_REPLIES)


def _shown(prompt: Sequence[Message]) -> str:
    return repr(" | ".join(message.content for message in prompt)[-120:])
