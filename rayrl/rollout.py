"""The one loop that plays episodes: for training, evaluation, data synthesis and people."""

from __future__ import annotations

import asyncio
import functools
import time
import traceback
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rayrl.agent import Agent, Player
from rayrl.env import Environment
from rayrl.errors import ConfigError, EnvError, InfraError
from rayrl.groups import with_group_rewards
from rayrl.hints import suggestion
from rayrl.types import Episode, Failure, Group, Scores, Task, Turn, Usage, derive_seed, sum_usage

__all__ = ["GroupPlan", "play_episode", "play_group", "play_groups"]

_GRACE_S = 1.0  # for a cancelled environment to clean up after itself
_INFRA = (InfraError, OSError, TimeoutError)


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """A group to be played: `size` episodes of `task`, their randomness from `seed`."""

    id: str
    task: Task
    size: int
    seed: int


async def play_episode(
    env: Environment,
    task: Task,
    players: Mapping[str, Player],
    *,
    id: str,  # noqa: A002
    index: int = 0,
    seed: int = 0,
    deadline_s: float | None = None,
    attempt: int = 0,
) -> Episode:
    """Play one task to its end.

    Args:
        env: what to play.
        task: what to start from.
        players: who answers, by seat.
        id: of the episode.
        index: its place in its group.
        seed: of all the players' randomness.
        deadline_s: wall time allowed, without what a player held its own requests back; None is
            no limit.
        attempt: of this episode; keeps the sessions of a repeated one apart from the first's.

    Returns:
        The episode. What its code or its surroundings did wrong is in `failure`.

    Raises:
        ConfigError: a seat has no player, or whatever else is set up wrongly.
        Exception: an error of the program itself (not of the environment or of a process).
    """
    record: list[Turn] = []
    label = f"{id}~{attempt}" if attempt else id
    agents = [
        Agent(_player(players, seat, env), seat=seat, episode=label, seed=seed, record=record)
        for seat in env.seats
    ]
    began = time.perf_counter()
    scores: dict[str, dict[str, float]] = {}
    failure = None
    try:
        # a task of its own, so that code which swallows its cancellation cannot hold the loop
        running = asyncio.create_task(_played(env, task, agents))
        returned = await _within(running, deadline_s, agents)
        _raise_players_error(agents)
        scores = env.scores(returned)
    except ConfigError:
        raise
    except Exception as error:
        failure = _failure(error, env, task, agents, deadline_s)
    finally:
        for agent in agents:
            agent.close()
    if failure is None:
        _count_tools(agents, scores)
    return Episode(
        id=id,
        env=env.name,
        task=task,
        index=index,
        turns=tuple(record),
        scores=scores,
        rewards={seat: env.reward(of_seat) for seat, of_seat in scores.items()},
        failure=failure,
        seconds=time.perf_counter() - began,
    )


async def _played(env: Environment, task: Task, agents: Sequence[Agent]) -> Scores:
    try:
        return await env.play(task, *agents)
    except SystemExit as error:  # would end the event loop and every other episode
        raise EnvError(f"called sys.exit({error.code!r})") from error


def _player(players: Mapping[str, Player], seat: str, env: Environment) -> Player:
    if seat not in players:
        raise ConfigError(f"environment {env.name!r}: no player for seat {seat!r}")
    return players[seat]


class _Late(Exception):
    """The deadline passed; `on_player` says who was being waited for."""

    def __init__(self, on_player: bool) -> None:
        super().__init__()
        self.on_player = on_player


async def _within(
    running: asyncio.Future[Scores], deadline_s: float | None, agents: Sequence[Agent]
) -> Scores:
    began = time.monotonic()
    left = deadline_s
    try:
        while not running.done() and (left is None or left > 0):
            await asyncio.wait((running,), timeout=left)
            if deadline_s is not None:
                held = sum(agent.held_s for agent in agents)
                left = began + deadline_s + held - time.monotonic()
    except asyncio.CancelledError:
        await _stop(running, agents)
        raise
    if running.done():
        if running.cancelled():  # nobody here did: its own code did
            raise EnvError("the environment cancelled itself")
        return running.result()
    on_player = any(agent.waiting for agent in agents)
    await _stop(running, agents)
    raise _Late(on_player)


async def _stop(running: asyncio.Future[Scores], agents: Sequence[Agent]) -> None:
    for agent in agents:
        agent.closed = True
    for _ in range(3):
        running.cancel()
        await asyncio.wait((running,), timeout=_GRACE_S)
        if running.done():
            break
    if running.done() and not running.cancelled():
        running.exception()  # looked at, so that it is not reported as lost


def _raise_players_error(agents: Sequence[Agent]) -> None:
    """An answer that never came spoils the episode even if the environment caught the error."""
    for agent in agents:
        if agent.error is not None:
            raise agent.error


def _failure(
    error: Exception,
    env: Environment,
    task: Task,
    agents: Sequence[Agent],
    deadline_s: float | None,
) -> Failure:
    """What an exception out of an episode means; raises it again if it is the program's own."""
    where = f"environment {env.name!r} on task {task!r}"
    if isinstance(error, _Late):
        if error.on_player:
            return Failure("infra", f"{where}: the player did not answer within {deadline_s} s")
        return Failure(
            "env", f"{where} did not end within {deadline_s} s, and was not waiting for an answer"
        )
    players_errors = [agent.error for agent in agents if agent.error is not None]
    cause = players_errors[0] if players_errors else error
    text = "".join(traceback.format_exception(cause))
    text = f"{where}\n{text}"
    if players_errors:
        if isinstance(cause, EnvError):
            return Failure("env", f"{where}: {cause}", text)
        if isinstance(cause, _INFRA):
            return Failure("infra", f"{type(cause).__name__}: {cause}", text)
        raise cause
    if isinstance(error, InfraError):
        return Failure("infra", f"{where}: {error}", text)
    said = str(error) if isinstance(error, EnvError) else f"{type(error).__name__}: {error}"
    return Failure("env", f"{where}: {said}", text)


def _count_tools(agents: Sequence[Agent], scores: dict[str, dict[str, float]]) -> None:
    for agent in agents:
        if agent.used_tools:
            scores[agent.seat].setdefault("tool_calls", float(agent.tool_calls))
            scores[agent.seat].setdefault("tool_errors", float(agent.tool_errors))


async def _play_with_retries(
    env: Environment, plan: GroupPlan, index: int, players: Mapping[str, Player], rules: _Rules
) -> Episode:
    """Infrastructure failures are played again with the same task and seed."""
    attempt = 0
    wasted: Usage | None = None
    while True:
        episode = await play_episode(
            env,
            plan.task,
            players,
            id=f"{plan.id}/{index}",
            index=index,
            seed=derive_seed(plan.seed, index),
            deadline_s=rules.deadline_s,
            attempt=attempt,
        )
        failed = episode.failure is not None and episode.failure.kind == "infra"
        if not failed or attempt >= rules.retries:
            return replace(episode, wasted=wasted) if wasted else episode
        wasted = sum_usage([wasted, episode.usage])
        await asyncio.sleep(min(rules.backoff_s * 2**attempt, 5.0))
        attempt += 1


@dataclass(frozen=True, slots=True)
class _Rules:
    retries: int
    deadline_s: float | None
    trainable: tuple[str, ...] | None
    backoff_s: float

    def seats(self, env: Environment, players: Mapping[str, Player]) -> tuple[str, ...]:
        if self.trainable is None:
            return tuple(s for s in env.seats if getattr(players.get(s), "trainable", False))
        for seat in self.trainable:
            if seat not in env.seats:
                raise ConfigError(
                    f"environment {env.name!r} has no seat {seat!r}.{suggestion(seat, env.seats)}"
                )
        return self.trainable


async def play_group(
    env: Environment,
    task: Task,
    players: Mapping[str, Player],
    *,
    id: str,  # noqa: A002
    size: int,
    seed: int = 0,
    retries: int = 2,
    deadline_s: float | None = None,
    trainable: Sequence[str] | None = None,
    backoff_s: float = 0.1,
) -> Group:
    """Play `size` episodes of one task at once, then the rewards over the group.

    Args:
        env: what to play.
        task: what every episode starts from.
        players: who answers, by seat.
        id: of the group; its episodes are `{id}/0`, `{id}/1`, ...
        size: number of episodes.
        seed: episode k gets `derive_seed(seed, k)`.
        retries: times an episode is played again after an infrastructure failure.
        deadline_s: wall time for one episode.
        trainable: seats that are trained on; by default those whose player says so.
        backoff_s: wait before the first repetition; doubled each time.
    """
    plan = GroupPlan(id, task, size, seed)
    options: dict[str, Any] = {
        "retries": retries,
        "deadline_s": deadline_s,
        "trainable": trainable,
        "backoff_s": backoff_s,
    }
    async for group in play_groups(env, [plan], players, concurrency=max(size, 1), **options):
        return group
    raise AssertionError("a plan gives a group")


async def play_groups(
    env: Environment,
    plans: Iterable[GroupPlan],
    players: Mapping[str, Player],
    *,
    concurrency: int,
    retries: int = 2,
    deadline_s: float | None = None,
    trainable: Sequence[str] | None = None,
    backoff_s: float = 0.1,
) -> AsyncIterator[Group]:
    """Play groups with at most `concurrency` live episodes; yields each when its last one ends.

    Plans are taken one after the other as room appears, so they may be an endless iterator. Groups
    come out in the order they end; what is in them depends only on plan, players and seeds. Leaving
    the loop early (use `contextlib.aclosing`) cancels what is live. Other arguments: see
    `play_group`.
    """
    if concurrency < 1:
        raise ConfigError(f"cluster.concurrency={concurrency}: at least one episode must be live")
    most = concurrency if env.slots is None else min(concurrency, env.slots)
    named = None if trainable is None else tuple(trainable)
    rules = _Rules(retries, deadline_s, named, backoff_s)
    seats = rules.seats(env, players)
    waiting = _openings(plans)
    live: set[asyncio.Task[None]] = set()
    ended: asyncio.Queue[_Opening | None] = asyncio.Queue()

    async def run(opening: _Opening, index: int) -> None:
        episode = await _play_with_retries(env, opening.plan, index, players, rules)
        opening.episodes[index] = episode

    def after(opening: _Opening, task: asyncio.Task[None]) -> None:
        live.discard(task)
        if not task.cancelled() and task.exception() is not None:
            ended.put_nowait(None)
            broken.append(task)
            return
        opening.left -= 1
        ended.put_nowait(None if opening.left else opening)

    broken: list[asyncio.Task[None]] = []
    exhausted = False
    try:
        while True:
            while not exhausted and len(live) < most:
                following = next(waiting, None)
                if following is None:
                    exhausted = True
                    break
                opening, index = following
                if index < 0:  # a group of no episodes
                    yield Group(opening.plan.id, opening.plan.task, (), seats)
                    continue
                task = asyncio.create_task(run(opening, index))
                live.add(task)
                task.add_done_callback(functools.partial(after, opening))
            if exhausted and not live and ended.empty():
                return
            done = await ended.get()
            if broken:
                broken[0].result()
            if done is not None:
                yield _closed(env, done, seats)
    finally:
        for task in list(live):
            task.cancel()
        if live:
            await asyncio.gather(*live, return_exceptions=True)


class _Opening:
    """A group being played."""

    def __init__(self, plan: GroupPlan) -> None:
        self.plan = plan
        self.left = plan.size
        self.episodes: list[Episode | None] = [None] * plan.size


def _openings(plans: Iterable[GroupPlan]) -> Iterator[tuple[_Opening, int]]:
    for plan in plans:
        opening = _Opening(plan)
        if not plan.size:
            yield opening, -1
        for index in range(plan.size):
            yield opening, index


def _closed(env: Environment, opening: _Opening, seats: tuple[str, ...]) -> Group:
    episodes = [episode for episode in opening.episodes if episode is not None]
    episodes = with_group_rewards(env, episodes)
    return Group(opening.plan.id, opening.plan.task, tuple(episodes), seats)
