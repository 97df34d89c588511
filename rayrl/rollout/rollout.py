"""Play episodes and groups: the loop behind training, evaluation, synthesis and `rayrl play`."""

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
    describe_error,
    error_message,
    format_traceback,
    safe_repr,
)
from rayrl.rollout.agent import Agent, Player
from rayrl.rollout.conversation import Throttling
from rayrl.rollout.limits import (
    ConcurrencyLimit,
    DeadlinePassed,
    EpisodeCancelled,
    GroupCanceller,
    run_with_deadline,
)
from rayrl.rollout.players import PolicyPlayer
from rayrl.rollout.resume import EpisodeResume, PartialEpisode, ReplayMismatch
from rayrl.types import Episode, Failure, Group, Task, Turn, Usage, derive_seed, sum_usage

__all__ = ["GroupPlan", "play_episode", "play_group", "play_groups", "run_environment"]

# scores and rewards by seat; facts
_Results = tuple[dict[str, dict[str, float]], dict[str, float], Mapping[str, Any]]
_INFRA = (InfraError, OSError, TimeoutError)
_NOT_STARTED = PartialEpisode((), 0)


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """A group to play: `size` episodes of `task` with randomness derived from `seed`.

    Attributes:
        temperature: at which models sample, instead of their own; for evaluations while training.
        component: of a mixture, the name of the environment to play; or the cell of an evaluation
            that has an environment of its own.
    """

    id: str
    task: Task
    size: int
    seed: int
    temperature: float | None = None
    component: str = ""


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
    resume: EpisodeResume | None = None,
    cancelled: asyncio.Future[None] | None = None,
) -> Episode:
    """Play one task to its end.

    Args:
        env: environment to play.
        task: task to play.
        players: players by seat.
        id: id of the episode.
        index: position in its group.
        seed: for all the players' randomness and for the module-level generators (`random.random`,
            `np.random.rand`, ...) that the environment's code may draw from.
        deadline_s: wall time allowed, excluding time that players spent on rate limits; None is
            no limit.
        attempt: number of the attempt; keeps the sessions of a retry apart from earlier ones.
        resume: turns of an earlier attempt to resume from, and the callback for every turn.
        cancelled: once it is done, the episode ends with a failure of kind "stopped".

    Returns:
        The episode. Errors of the environment or of the infrastructure are in `failure`.

    Raises:
        ConfigError: a seat has no player, or another setting is wrong.
        ReplayMismatch: the environment did not repeat the turns recorded in `resume`.
        Exception: an error in the program itself (not in the environment or a process).
    """
    resume = resume or EpisodeResume()
    label = f"{id}~{attempt}" if attempt else id
    for seat in env.seats:
        if seat not in players:
            raise ConfigError(f"environment {env.name!r}: no player for seat {seat!r}")
        if not hasattr(players[seat], "answer"):
            raise ConfigError(
                f"environment {env.name!r}: seat {seat!r} has {players[seat]!r}, which is no "
                "player; of a function make rayrl.ScriptedPlayer(function)"
            )
    throttling = Throttling()
    common: dict[str, Any] = {"episode": label, "seed": seed, "resume": resume, "task": task}
    agents = [
        Agent(players[seat], seat=seat, throttling=throttling, **common) for seat in env.seats
    ]
    clock_time, began = time.time(), time.perf_counter()
    scores: dict[str, dict[str, float]] = {}
    rewards: dict[str, float] = {}
    facts: Mapping[str, Any] = {}
    failure = None
    try:
        # in its own task, so that code which swallows its cancellation cannot block the loop
        running = asyncio.create_task(run_environment(env, task, agents, seed), name=label)
        try:
            results = await run_with_deadline(running, deadline_s, agents, throttling, cancelled)
        except (AttributeError, TypeError, ValueError, EnvError) as error:
            if missing_await := _missing_await(agents, error):
                raise missing_await from error
            raise
        for agent in agents:  # even if the environment caught it, the episode lacks an answer
            if agent.activity.error is not None:
                raise agent.activity.error
        if missing_await := _missing_await(agents):
            raise missing_await
        if resume.remaining:
            raise resume.ended_early(None)
        scores, rewards, facts = results
    except (ConfigError, ReplayMismatch):
        raise
    except Exception as error:
        failure = _failure(error, env, task, agents, deadline_s)
        if resume.remaining and failure.kind == "env":  # it did not fail when it was recorded
            raise resume.ended_early(failure) from error
    finally:
        resume.close()
        for agent in agents:
            agent.close()
    if failure is None:
        for agent in agents:
            if agent.activity.used_tools:
                scores[agent.seat].setdefault("tool_calls", float(agent.tool_calls))
                scores[agent.seat].setdefault("tool_errors", float(agent.tool_errors))
    return Episode(
        id=id,
        env=env.name,
        task=task,
        index=index,
        turns=tuple(resume.turns),
        scores=scores,
        rewards=rewards,
        failure=failure,
        facts=facts,
        replayed=resume.replayed,
        began=clock_time,
        seconds=time.perf_counter() - began,
        seed=seed,
    )


async def run_environment(
    env: Environment, task: Task, agents: Sequence[Agent], seed: int
) -> _Results:
    """Run the environment's coroutine; return scores and rewards by seat, and facts.

    Raises:
        EnvError: its result is invalid, or its code called sys.exit.
    """
    try:
        with EpisodeRandom(seed, "environment"):
            scores, facts = env.result(await env.play(task, *agents))
        return scores, {seat: env.reward(of_seat) for seat, of_seat in scores.items()}, facts
    except SystemExit as error:  # would end the event loop and every other episode
        raise EnvError(f"called sys.exit({safe_repr(error.code)})") from error


def _missing_await(agents: Sequence[Agent], error: Exception | None = None) -> EnvError | None:
    """Return the error for an environment that makes a call without `await`, if it does.

    Args:
        error: an error the environment raised. For calls other than its agents', Python's message
            contains the word "coroutine".
    """
    for agent in agents:
        called, awaited = agent.activity.called, agent.activity.awaited
        if awaited < called:
            return EnvError(
                f"{agent.seat}(…) was called without `await`, {called - awaited} of {called} "
                f"times: write `reply = await {agent.seat}(…)`"
            )
    # the message of an EnvError is not Python's
    if error and not isinstance(error, EnvError) and "coroutine" in error_message(error):
        return EnvError(
            f"{describe_error(error)}. A call of an `async def` function was not awaited: write "
            "`await` before it"
        )
    return None


def _failure(
    error: Exception,
    env: Environment,
    task: Task,
    agents: Sequence[Agent],
    deadline_s: float | None,
) -> Failure:
    """Convert an episode's exception to a failure; re-raise errors of the program itself."""
    where = f"environment {env.name!r} on task {safe_repr(task)}"
    if isinstance(error, EpisodeCancelled):
        return Failure("stopped", f"{where}: the episode was cancelled")
    if isinstance(error, DeadlinePassed):
        if error.on_player:
            return Failure("infra", f"{where}: the player did not answer within {deadline_s} s")
        return Failure(
            "env", f"{where} did not end within {deadline_s:g} s, and was not waiting for an answer"
        )
    players_errors = [agent.activity.error for agent in agents if agent.activity.error is not None]
    cause = players_errors[0] if players_errors else error
    text = f"{where}\n{format_traceback(cause)}"
    own = isinstance(cause, EnvError | InfraError | Refused)  # whose type adds nothing
    message = f"{where}: {error_message(cause) if own else describe_error(cause)}"
    if not players_errors:
        return Failure("infra" if isinstance(error, InfraError) else "env", message, text)
    if isinstance(cause, EnvError):
        return Failure("env", message, text)
    if isinstance(cause, Refused):
        return Failure("refused", message, text)
    if isinstance(cause, _INFRA):
        return Failure("infra", describe_error(cause), text)
    agent = next(agent for agent in agents if agent.activity.error is cause)
    player = type(agent.player).__name__
    cause.add_note(f"Raised by {player} itself, for seat {agent.seat!r}, and not by {where}.")
    raise cause


async def _play_with_retries(
    env: Environment,
    plan: GroupPlan,
    index: int,
    players: Mapping[str, Player],
    options: _Options,
) -> Episode:
    """Play an episode; after an infrastructure failure, resume it from the turns it has.

    If its environment is not deterministic, it starts over with the same task and seed.
    """
    name = f"{plan.id}/{index}"
    recorded = options.recorded.get(name, _NOT_STARTED)
    turns, attempt = recorded.turns, recorded.attempt
    canceller, on_turn = options.canceller, options.on_turn
    cancelled = canceller.cancelled(plan.id) if canceller is not None else None
    failures = mismatches = 0
    retried_usage: Usage | None = None
    if plan.temperature is not None:
        players = {
            seat: player.at_temperature(plan.temperature)
            if isinstance(player, PolicyPlayer)
            else player
            for seat, player in players.items()
        }
    while True:
        resume = EpisodeResume(turns, on_turn and functools.partial(on_turn, name, attempt))
        try:
            episode = await play_episode(
                env,
                plan.task,
                players,
                id=name,
                index=index,
                seed=derive_seed(plan.seed, index),
                deadline_s=options.deadline_s,
                attempt=attempt,
                resume=resume,
                cancelled=cancelled,
            )
        except ReplayMismatch:
            mismatches += 1
            retried_usage, turns = sum_usage([retried_usage, resume.usage]), ()
        else:
            failed = episode.failure is not None and episode.failure.kind == "infra"
            if not failed or failures >= options.retries:
                usage = sum_usage([retried_usage, *(turn.usage for turn in resume.remaining)])
                if usage or mismatches:
                    return replace(episode, retried_usage=usage, replay_mismatches=mismatches)
                return episode
            if mismatches:
                retried_usage = sum_usage([retried_usage, resume.usage])
            else:
                turns = (*resume.turns, *resume.remaining)
            await asyncio.sleep(min(options.backoff_s * 2**failures, 5.0))
            failures += 1
        attempt += 1


@dataclass(frozen=True, slots=True)
class _Options:
    retries: int
    deadline_s: float | None
    backoff_s: float
    recorded: Mapping[str, PartialEpisode] = field(default_factory=dict)
    on_turn: Callable[[str, int, Turn], None] | None = None
    canceller: GroupCanceller | None = None


def _trainable_seats(
    env: Environment, players: Mapping[str, Player], trainable: Sequence[str] | None
) -> tuple[str, ...]:
    if trainable is None:
        return tuple(s for s in env.seats if getattr(players.get(s), "trainable", False))
    for seat in trainable:
        if seat not in env.seats:
            raise ConfigError(
                f"environment {env.name!r} has no seat {seat!r}.{suggestion(seat, env.seats)}"
            )
    return tuple(trainable)


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
    """Play `size` episodes of one task concurrently and compute the group rewards.

    Args:
        env: environment to play.
        task: task of every episode.
        players: players by seat.
        id: id of the group; its episodes are `{id}/0`, `{id}/1`, ...
        size: number of episodes.
        seed: episode k gets `derive_seed(seed, k)`.
        retries: maximum retries of an episode after infrastructure failures.
        deadline_s: wall time per episode; None is no limit.
        trainable: seats to train on; by default those whose player is `trainable`.
        backoff_s: delay before the first retry; doubled for each further one, up to 5 s.
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
    raise AssertionError("every plan yields a group")


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
    canceller: GroupCanceller | None = None,
    recorded: Mapping[str, PartialEpisode] | None = None,
    on_turn: Callable[[str, int, Turn], None] | None = None,
    on_end: Callable[[], None] = lambda: None,
) -> AsyncIterator[Group]:
    """Play groups with at most `concurrency` live episodes; yield each when its last one ends.

    Plans are consumed one by one as slots become free, so they may be an endless iterator. Groups
    are yielded in the order they end; their content depends only on plan, players and seeds.
    Leaving the loop early (use `contextlib.aclosing`) cancels the live episodes.

    Args:
        concurrency: a number, or a `ConcurrencyLimit` shared with other calls.
        canceller: can cancel the live episodes of a group, which is then yielded with the turns
            played so far.
        recorded: partial episodes to resume, by id.
        on_turn: called with episode id, number of the attempt and turn for every new or replayed
            turn. The turns of a higher attempt replace those of lower ones, because an attempt
            repeats every turn it resumes from; `rayrl.rollout.resume.TurnLog` is such a log.
        on_end: called as each episode ends.

    Other arguments: see `play_group`.
    """
    if isinstance(concurrency, ConcurrencyLimit):
        limit = concurrency
    elif concurrency < 1:
        raise ConfigError(f"cluster.concurrency={concurrency}: at least one episode must be live")
    else:
        limit = ConcurrencyLimit(concurrency if env.slots is None else min(concurrency, env.slots))
    options = _Options(retries, deadline_s, backoff_s, recorded or {}, on_turn, canceller)
    seats = _trainable_seats(env, players, trainable)
    pending = _episodes_of(plans)
    live: set[asyncio.Task[None]] = set()
    failed: list[asyncio.Task[None]] = []
    ended: asyncio.Queue[_LiveGroup | None] = asyncio.Queue()  # None only wakes the loop
    wake = functools.partial(ended.put_nowait, None)

    async def play(group: _LiveGroup, index: int) -> None:
        group.episodes[index] = await _play_with_retries(env, group.plan, index, players, options)

    def on_done(group: _LiveGroup, task: asyncio.Task[None]) -> None:
        live.discard(task)
        limit.release()
        on_end()
        if not task.cancelled() and task.exception() is not None:
            wake()
            failed.append(task)
            return
        group.left -= 1
        ended.put_nowait(None if group.left else group)

    exhausted = False
    try:
        while True:
            while not exhausted and limit.try_acquire(wake):
                following = next(pending, None)
                if following is None or following[1] < 0:
                    limit.release()
                if following is None:
                    exhausted = True
                    break
                group, index = following
                if index < 0:  # a group without episodes
                    yield Group(group.plan.id, group.plan.task, (), seats)
                    continue
                task = asyncio.create_task(play(group, index))
                live.add(task)
                task.add_done_callback(functools.partial(on_done, group))
            if exhausted and not live and ended.empty():
                return
            done = await ended.get()
            if failed:
                failed[0].result()
            if done is not None:
                if canceller is not None:
                    canceller.remove(done.plan.id)
                played = [episode for episode in done.episodes if episode is not None]
                episodes = with_group_rewards(env, played)
                yield Group(done.plan.id, done.plan.task, tuple(episodes), seats)
    finally:
        limit.remove_waiter(wake)
        for task in list(live):
            task.cancel()
        if live:
            await asyncio.gather(*live, return_exceptions=True)


class _LiveGroup:
    """A group being played."""

    def __init__(self, plan: GroupPlan) -> None:
        self.plan = plan
        self.left = plan.size
        self.episodes: list[Episode | None] = [None] * plan.size


def _episodes_of(plans: Iterable[GroupPlan]) -> Iterator[tuple[_LiveGroup, int]]:
    """Yield every episode's group and index; index -1 stands for a group without episodes."""
    for plan in plans:
        group = _LiveGroup(plan)
        if not plan.size:
            yield group, -1
        for index in range(plan.size):
            yield group, index
