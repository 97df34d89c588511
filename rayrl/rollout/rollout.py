"""The one loop that plays episodes: for training, evaluation, data synthesis and people."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rayrl.environment.environment import Environment
from rayrl.environment.randomness import EpisodeRandom
from rayrl.environment.scoring import with_group_rewards
from rayrl.environment.signature import suggestion
from rayrl.errors import (
    ConfigError,
    EnvError,
    InfraError,
    Refused,
    described,
    message_of,
    shown,
    traceback_of,
)
from rayrl.rollout.agent import Agent, Player
from rayrl.rollout.concurrency import ConcurrencyLimit, GroupCanceller
from rayrl.rollout.deadline import Late, Stopped, within
from rayrl.rollout.resume import Diverged, EpisodeResume, PartialEpisode
from rayrl.types import Episode, Failure, Group, Task, Turn, Usage, derive_seed, sum_usage

__all__ = ["GroupPlan", "play_episode", "play_group", "play_groups"]

_Played = tuple[dict[str, dict[str, float]], dict[str, float]]
_INFRA = (InfraError, OSError, TimeoutError)
_NEW = PartialEpisode((), 0)


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
    course: EpisodeResume | None = None,
    stop: asyncio.Future[None] | None = None,
) -> Episode:
    """Play one task to its end.

    Args:
        env: what to play.
        task: what to start from.
        players: who answers, by seat.
        id: of the episode.
        index: its place in its group.
        seed: of all the players' randomness, and of the module-level generators (`random.random`,
            `np.random.rand`, ...) that the environment's code may draw from.
        deadline_s: wall time allowed, without what a player held its own requests back; None is
            no limit.
        attempt: of this episode; keeps the sessions of a repeated one apart from the first's.
        course: turns of an earlier attempt to go on from, and who is told of every turn.
        stop: once it is done, the episode ends where it is, with a failure of kind "stopped".

    Returns:
        The episode. What its code or its surroundings did wrong is in `failure`.

    Raises:
        ConfigError: a seat has no player, or whatever else is set up wrongly.
        Diverged: the environment did not do again what `course` has recorded.
        Exception: an error of the program itself (not of the environment or of a process).
    """
    course = course or EpisodeResume()
    label = f"{id}~{attempt}" if attempt else id
    agents = [
        Agent(_player(players, seat, env), seat=seat, episode=label, seed=seed, course=course)
        for seat in env.seats
    ]
    clock_time, began = time.time(), time.perf_counter()
    scores: dict[str, dict[str, float]] = {}
    rewards: dict[str, float] = {}
    failure = None
    try:
        # a task of its own, so that code which swallows its cancellation cannot hold the loop
        running = asyncio.create_task(_played(env, task, agents, seed), name=label)
        try:
            played = await within(running, deadline_s, agents, stop)
        except (AttributeError, TypeError, ValueError, EnvError) as error:
            if forgotten := _forgotten(agents, error):
                raise forgotten from error
            raise
        _raise_players_error(agents)
        if forgotten := _forgotten(agents):
            raise forgotten
        if course.left:
            raise course.cut_short(None)
        scores, rewards = played
    except (ConfigError, Diverged):
        raise
    except Exception as error:
        failure = _failure(error, env, task, agents, deadline_s)
        if course.left and failure.kind == "env":  # it did not then
            raise course.cut_short(failure) from error
    finally:
        course.close()
        for agent in agents:
            agent.close()
    if failure is None:
        _count_tools(agents, scores)
    return Episode(
        id=id,
        env=env.name,
        task=task,
        index=index,
        turns=tuple(course.turns),
        scores=scores,
        rewards=rewards,
        failure=failure,
        replayed=course.replayed,
        began=clock_time,
        seconds=time.perf_counter() - began,
        seed=seed,
    )


async def _played(env: Environment, task: Task, agents: Sequence[Agent], seed: int) -> _Played:
    try:
        with EpisodeRandom(seed, "environment"):
            scores = env.scores(await env.play(task, *agents))
        return scores, {seat: env.reward(of_seat) for seat, of_seat in scores.items()}
    except SystemExit as error:  # would end the event loop and every other episode
        raise EnvError(f"called sys.exit({shown(error.code)})") from error


def _player(players: Mapping[str, Player], seat: str, env: Environment) -> Player:
    if seat not in players:
        raise ConfigError(f"environment {env.name!r}: no player for seat {seat!r}")
    return players[seat]


def _forgotten(agents: Sequence[Agent], error: Exception | None = None) -> EnvError | None:
    """The error of an environment that calls without `await`, if that is what it does.

    Args:
        error: what came of it; its agents' calls aside, Python's messages name the coroutine.
    """
    for agent in agents:
        if agent.awaited < agent.called:
            return EnvError(
                f"{agent.seat}(…) was called without `await`, {agent.called - agent.awaited} of "
                f"{agent.called} times: write `reply = await {agent.seat}(…)`"
            )
    # an EnvError is in words of ours, or of the environment's author
    if error and not isinstance(error, EnvError) and "coroutine" in message_of(error):
        return EnvError(
            f"{described(error)}. A call of an `async def` function was not awaited: write "
            "`await` before it"
        )
    return None


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
    where = f"environment {env.name!r} on task {shown(task)}"
    if isinstance(error, Stopped):
        return Failure("stopped", f"{where}: it was stopped")
    if isinstance(error, Late):
        if error.on_player:
            return Failure("infra", f"{where}: the player did not answer within {deadline_s} s")
        return Failure(
            "env", f"{where} did not end within {deadline_s:g} s, and was not waiting for an answer"
        )
    players_errors = [agent.error for agent in agents if agent.error is not None]
    cause = players_errors[0] if players_errors else error
    text = f"{where}\n{traceback_of(cause)}"
    own = isinstance(cause, EnvError | InfraError | Refused)  # its type says nothing new
    said = f"{where}: {message_of(cause) if own else described(cause)}"
    if not players_errors:
        return Failure("infra" if isinstance(error, InfraError) else "env", said, text)
    if isinstance(cause, EnvError):
        return Failure("env", said, text)
    if isinstance(cause, Refused):
        return Failure("refused", said, text)
    if isinstance(cause, _INFRA):
        return Failure("infra", described(cause), text)
    asked = next(agent for agent in agents if agent.error is cause)
    player = type(asked.player).__name__
    cause.add_note(f"It is {player}'s own error, for seat {asked.seat!r}, and not that of {where}.")
    raise cause


def _count_tools(agents: Sequence[Agent], scores: dict[str, dict[str, float]]) -> None:
    for agent in agents:
        if agent.used_tools:
            scores[agent.seat].setdefault("tool_calls", float(agent.tool_calls))
            scores[agent.seat].setdefault("tool_errors", float(agent.tool_errors))


async def _play_with_retries(
    env: Environment, plan: GroupPlan, index: int, players: Mapping[str, Player], rules: _Rules
) -> Episode:
    """Play an episode; after failures of infrastructure go on from the turns it has.

    Where its environment is not deterministic it starts over, with the same task and seed.
    """
    name = f"{plan.id}/{index}"
    begun = rules.recorded.get(name, _NEW)
    turns, attempt = begun.turns, begun.attempt
    stop = rules.stops.of(plan.id) if rules.stops is not None else None
    failures = diverged = 0
    wasted: Usage | None = None
    while True:
        course = EpisodeResume(turns, rules.listener(name, attempt))
        try:
            episode = await play_episode(
                env,
                plan.task,
                players,
                id=name,
                index=index,
                seed=derive_seed(plan.seed, index),
                deadline_s=rules.deadline_s,
                attempt=attempt,
                course=course,
                stop=stop,
            )
        except Diverged:
            diverged += 1
            wasted, turns = sum_usage([wasted, course.usage]), ()
        else:
            failed = episode.failure is not None and episode.failure.kind == "infra"
            if not failed or failures >= rules.retries:
                wasted = sum_usage([wasted, *(turn.usage for turn in course.left)])
                lost = wasted or diverged
                return replace(episode, wasted=wasted, diverged=diverged) if lost else episode
            if diverged:
                wasted = sum_usage([wasted, course.usage])
            else:
                turns = (*course.turns, *course.left)
            await asyncio.sleep(min(rules.backoff_s * 2**failures, 5.0))
            failures += 1
        attempt += 1


@dataclass(frozen=True, slots=True)
class _Rules:
    retries: int
    deadline_s: float | None
    trainable: tuple[str, ...] | None
    backoff_s: float
    recorded: Mapping[str, PartialEpisode] = field(default_factory=dict)
    on_turn: Callable[[str, int, Turn], None] | None = None
    stops: GroupCanceller | None = None

    def listener(self, episode: str, attempt: int) -> Callable[[Turn], None] | None:
        return self.on_turn and functools.partial(self.on_turn, episode, attempt)

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
    concurrency: int | ConcurrencyLimit,
    retries: int = 2,
    deadline_s: float | None = None,
    trainable: Sequence[str] | None = None,
    backoff_s: float = 0.1,
    stops: GroupCanceller | None = None,
    recorded: Mapping[str, PartialEpisode] | None = None,
    on_turn: Callable[[str, int, Turn], None] | None = None,
    on_end: Callable[[], None] = lambda: None,
) -> AsyncIterator[Group]:
    """Play groups with at most `concurrency` live episodes; yields each when its last one ends.

    Plans are taken one after the other as room appears, so they may be an endless iterator. Groups
    come out in the order they end; what is in them depends only on plan, players and seeds. Leaving
    the loop early (use `contextlib.aclosing`) cancels what is live.

    Args:
        concurrency: a number, or a `ConcurrencyLimit` that is shared with other calls.
        stops: can end what is live of a plan; its group then comes with what was played of it.
        recorded: episodes to go on with, by id: begun where they could not end.
        on_turn: told episode, number of the attempt and turn whenever a turn is made or played
            again. The turns of a higher attempt replace those of the lower ones, all of which it
            tells again or does not go on from: `rayrl.rollout.resume.TurnLog` keeps such a log.
        on_end: called as each episode ends.

    Other arguments: see `play_group`.
    """
    room = concurrency if isinstance(concurrency, ConcurrencyLimit) else _room(concurrency, env)
    named = None if trainable is None else tuple(trainable)
    rules = _Rules(retries, deadline_s, named, backoff_s, recorded or {}, on_turn, stops)
    seats = rules.seats(env, players)
    waiting = _openings(plans)
    live: set[asyncio.Task[None]] = set()
    ended: asyncio.Queue[_Opening | None] = asyncio.Queue()
    wake = functools.partial(ended.put_nowait, None)

    async def run(opening: _Opening, index: int) -> None:
        episode = await _play_with_retries(env, opening.plan, index, players, rules)
        opening.episodes[index] = episode

    def after(opening: _Opening, task: asyncio.Task[None]) -> None:
        live.discard(task)
        room.give()
        on_end()
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
            while not exhausted and room.take(wake):
                following = next(waiting, None)
                if following is None or following[1] < 0:
                    room.give()
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
                if stops is not None:
                    stops.forget(done.plan.id)
                yield _closed(env, done, seats)
    finally:
        room.forget(wake)
        for task in list(live):
            task.cancel()
        if live:
            await asyncio.gather(*live, return_exceptions=True)


def _room(concurrency: int, env: Environment) -> ConcurrencyLimit:
    if concurrency < 1:
        raise ConfigError(f"cluster.concurrency={concurrency}: at least one episode must be live")
    return ConcurrencyLimit(concurrency if env.slots is None else min(concurrency, env.slots))


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
