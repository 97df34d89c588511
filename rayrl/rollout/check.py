"""Check an environment for problems that its author should fix before a run."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import pickle
import random
import signal
import threading
import time
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from types import FrameType
from typing import Any

from rayrl.environment.environment import Environment
from rayrl.environment.tasks import roundtrip_problem
from rayrl.errors import EnvError, RayrlError, safe_repr
from rayrl.rollout.agent import Options, Player
from rayrl.rollout.conversation import Conversation
from rayrl.rollout.players import ScriptedPlayer
from rayrl.rollout.resume import EpisodeResume, ReplayMismatch
from rayrl.rollout.rollout import play_episode
from rayrl.types import Episode, Message, Task, Turn

__all__ = ["check_env", "find_problems", "log_problems"]

DEADLINE_S = 30.0  # for an episode without a model
MARGIN_S = 5.0  # beyond it, for one that awaits something
_TASKS = 8
_REMEDY = (
    "use task.rng(state). Until then, episodes start over instead of resuming when their process "
    "dies"
)
_REPLIES = ("", "0", "yes", "<answer>1</answer>", "I do not know.")


def check_env(
    env: Environment, args: Mapping[str, Any] | None = None, deadline_s: float = DEADLINE_S
) -> list[str]:
    """Return descriptions of an environment's problems; an empty list if there are none.

    Tasks are drawn twice. Each is played twice with fixed replies and once with every scripted
    player of the environment, followed by a replay of its recorded turns, as after the death of a
    process. Finally all tasks are played concurrently, as in a run. No model is called.

    Args:
        env: environment to check.
        args: keywords of its task source.
        deadline_s: wall time per episode.
    """
    return asyncio.run(find_problems(env, args or {}, deadline_s))


async def find_problems(
    env: Environment, args: Mapping[str, Any], deadline_s: float = DEADLINE_S
) -> list[str]:
    """`check_env` for callers inside an event loop."""
    try:
        env = env.configure(args)
        tasks = env.tasks(seed=0, n=_TASKS)
        again = env.tasks(seed=0, n=_TASKS)
    except RayrlError as error:
        return [str(error)]
    async with _interrupts_blocking(deadline_s + MARGIN_S):
        return await _problems(env, tasks, again, deadline_s)


async def _problems(
    env: Environment, tasks: Sequence[Task], again: Sequence[Task], deadline_s: float
) -> list[str]:
    problems = _task_problems(env, tasks, again)
    group_weights = [group.weight for group in env.group_rewards.values()]
    for name in sorted({"model", "endpoint"} & set(env.players)):
        problems.append(f"player {name!r} cannot be chosen: eval.player={name} is reserved")
    if not any((*env.rewards.values(), *group_weights)):
        problems.append("every reward has weight 0: there is nothing to learn from")
    for task in tasks:
        if found := await _play_problems(env, task, deadline_s):
            problems += found
            break
    for name, function in sorted(env.players.items()):
        player = ScriptedPlayer(function)
        for task in tasks:
            problem = await _player_problem(env, task, player, deadline_s)
            if problem:
                problems.append(f"with player {name!r}: {problem}")
                break
    if not problems and env.numeric is not None:
        player = ScriptedPlayer(env.numeric.any_action)
        for task in tasks:
            if problem := await _player_problem(env, task, player, deadline_s):
                problems.append(f"with random actions of its numeric view: {problem}")
                break
    return problems or await _concurrency_problems(env, tasks, deadline_s)


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
            "task.rng() gives the same draws everywhere"
        )
    problems += log_problems(tasks)
    try:
        same = pickle.loads(pickle.dumps(tasks[0])) == tasks[0]
    except Exception as error:
        problems.append(f"{kind.__name__} cannot be sent to another process: {error}")
    else:
        if not same:
            problems.append(f"{kind.__name__} is not equal to itself after pickling")
    return problems


def log_problems(tasks: Iterable[Task]) -> list[str]:
    """Describe the problem of the first task that the episode log would not preserve, if any."""
    for task in tasks:
        try:
            problem = roundtrip_problem(task)
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
        problems.append(f"no model was called on task {task!r}")
    second = await _play(env, task, ScriptedPlayer(_fixed), deadline_s)
    if second.failure is not None:
        return [f"it failed when it was played again: {second.failure.message}"]
    for k, (turn, repeated) in enumerate(zip(first.turns, second.turns, strict=False)):
        if turn.prompt != repeated.prompt:
            problems.append(
                "not deterministic: the same task and replies led to different messages at turn "
                f"{k} ({_excerpt(turn.prompt)} and {_excerpt(repeated.prompt)}); {_REMEDY}"
            )
            return problems
    if difference := _end_difference(first, second):
        problems.append(f"not deterministic: {difference}; {_REMEDY}")
    return problems


async def _player_problem(
    env: Environment, task: Task, player: ScriptedPlayer, deadline_s: float
) -> str:
    """Describe a problem with a scripted player, which may get further than fixed replies."""
    first = await _play(env, task, player, deadline_s)
    if first.failure is not None:
        return first.failure.message
    try:
        replayed = await _play(env, task, player, deadline_s, EpisodeResume(first.turns))
    except ReplayMismatch as error:
        return f"not deterministic: with the same replies, {error}; {_REMEDY}"
    if difference := _end_difference(first, replayed):
        return f"not deterministic: {difference}; {_REMEDY}"
    return ""


async def _concurrency_problems(
    env: Environment, tasks: Sequence[Task], deadline_s: float
) -> list[str]:
    """Describe how episodes change while others, including those of their group, are live."""
    problems = []
    players = {name: ScriptedPlayer(function) for name, function in sorted(env.players.items())}
    for name, player in {"": ScriptedPlayer(_fixed), **players}.items():
        scripts = [_RepeatablePlayer(player) for _ in tasks]
        alone = [
            await _play(env, task, script, deadline_s)
            for task, script in zip(tasks, scripts, strict=True)
        ]
        live = [*zip(tasks, scripts, strict=True)] * 2
        limit = asyncio.Semaphore(env.slots or len(live))
        concurrent = await asyncio.gather(
            *[
                _play_within(limit, env, task, script.repeat(1 + k % 3), deadline_s * len(live))
                for k, (task, script) in enumerate(live)
            ]
        )
        for expected, actual in zip([*alone, *alone], concurrent, strict=True):
            if difference := _difference(expected, actual, env.seats):
                prefix = f"with player {name!r}: " if name else ""
                problems.append(
                    f"{prefix}an episode changes when others are live: on task {expected.task!r}, "
                    f"{difference}. Episodes share state, such as a module or class variable; "
                    "create it inside the coroutine"
                )
                break
    return problems


class _RepeatablePlayer:
    """A player of one episode that can repeat its replies while other episodes are live.

    It yields to the event loop the same number of times before every reply, so that seats called
    concurrently answer in the order in which they were called.
    """

    trainable = False

    def __init__(self, player: ScriptedPlayer, yields: int = 0) -> None:
        self.player, self.yields = player, yields
        self.given: dict[tuple[str, int], Turn] = {}

    def repeat(self, yields: int) -> _RepeatablePlayer:
        """Create a player that gives the same replies; new calls go to the scripted player."""
        new = _RepeatablePlayer(self.player, yields)
        new.given = dict(self.given)
        return new

    async def answer(
        self, conversation: Conversation, new: Sequence[Message], options: Options
    ) -> Turn:
        for _ in range(self.yields):
            await asyncio.sleep(0)
        key = (conversation.session, len(conversation.messages))
        if key not in self.given:
            self.given[key] = await self.player.answer(conversation, new, options)
        return dataclasses.replace(self.given[key], prompt=tuple(new), state=options.state)


def _difference(expected: Episode, actual: Episode, seats: Sequence[str]) -> str:
    """Describe how two episodes of one task, seed and player differ; empty if they do not."""
    if actual.failure is not None:
        return f"it failed: {actual.failure.message}"
    for seat in seats:
        pairs = itertools.zip_longest(expected.turns_of(seat), actual.turns_of(seat))
        for k, (wanted, turn) in enumerate(pairs):
            if wanted is None or turn is None:
                return f"it has {'fewer' if turn is None else 'more'} turns"
            if wanted.prompt != turn.prompt:
                return (
                    f"it sends {_excerpt(turn.prompt)} instead of {_excerpt(wanted.prompt)} at "
                    f"turn {k} of {seat!r}"
                )
    return _end_difference(expected, actual)


def _end_difference(first: Episode, second: Episode) -> str:
    """What two episodes of the same messages differ in; empty if they are equal."""
    if first.scores != second.scores:
        then, now = dict(first.scores), dict(second.scores)
        return f"the same task and replies were scored {then} and {now}"
    if len(first.turns) != len(second.turns):
        return f"the same task and replies took {len(first.turns)} and {len(second.turns)} turns"
    if first.facts != second.facts:
        facts = f"{safe_repr(dict(first.facts))} and {safe_repr(dict(second.facts))}"
        return f"the same task and replies had the facts {facts}"
    return ""


@contextlib.asynccontextmanager
async def _interrupts_blocking(patience_s: float) -> AsyncGenerator[None]:
    """Within, raise EnvError in code that blocks the event loop for longer than this.

    An episode's deadline cannot end a loop, or a call, that never awaits.
    """
    if threading.current_thread() is not threading.main_thread():  # only it gets signals
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        code = frame.f_code if frame else None
        where = f" {code.co_filename}:{frame.f_lineno}, in {code.co_name}" if frame and code else ""
        raise EnvError(
            f"it has not awaited anything for {patience_s:g} s, and is at{where}: in a run, "
            "nothing else of its process would go on meanwhile"
        )

    async def beat() -> None:
        while True:
            signal.setitimer(signal.ITIMER_REAL, patience_s, 1.0)  # again, if somebody catches it
            await asyncio.sleep(patience_s / 4)

    began, handler = time.monotonic(), signal.signal(signal.SIGALRM, interrupt)
    left, interval = signal.getitimer(signal.ITIMER_REAL)
    beating = asyncio.create_task(beat())
    try:
        yield
    finally:
        beating.cancel()
        left = max(left - (time.monotonic() - began), 0.001) if left else 0.0
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, left, interval)


async def _play(
    env: Environment,
    task: Task,
    player: Player,
    deadline_s: float,
    resume: EpisodeResume | None = None,
) -> Episode:
    players = dict.fromkeys(env.seats, player)
    return await play_episode(env, task, players, id="check", deadline_s=deadline_s, resume=resume)


async def _play_within(
    limit: asyncio.Semaphore, env: Environment, task: Task, player: Player, deadline_s: float
) -> Episode:
    async with limit:
        return await _play(env, task, player, deadline_s)


def _fixed(messages: Sequence[Message], rng: random.Random) -> str:
    return rng.choice(_REPLIES)


def _excerpt(prompt: Sequence[Message]) -> str:
    return repr(" | ".join(message.content for message in prompt)[-120:])
