"""Env workers: Ray actors that each play hundreds of episodes on one event loop."""

from __future__ import annotations

import asyncio
import copy
import logging
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import ray

from rayrl.chat.renderer import Chat
from rayrl.cluster import by_value
from rayrl.cluster.actors import on_failure, prepare_process
from rayrl.cluster.serving.inference_client import BatchingClient, ServeReplicas
from rayrl.cluster.serving.streams import PAUSE_S
from rayrl.cluster.workers.turn_log import TurnSender
from rayrl.config import Config
from rayrl.environment.environment import Environment, EnvSpec, PlayerFunction
from rayrl.environment.registry import environment_of
from rayrl.rollout.agent import Player
from rayrl.rollout.endpoint import EndpointPlayer, split_limits
from rayrl.rollout.limits import ConcurrencyLimit, GroupCanceller
from rayrl.rollout.players import PolicyPlayer, ScriptedPlayer, player_function
from rayrl.rollout.resume import PartialEpisode
from rayrl.rollout.rollout import GroupPlan, play_groups, run_environment
from rayrl.rollout.subprocess_env import SubprocessEnv
from rayrl.types import Group, Sampling

__all__ = [
    "POLICY",
    "EnvWorker",
    "PlayedEnv",
    "Running",
    "WorkerJob",
    "WorkerReport",
    "running_in",
    "start_worker",
    "trainable_seats",
]

POLICY = "policy"
WATCH = "watch"  # concurrency group of the method that answers while the event loop is blocked
FRAMES = 5  # the most of a stack that are shown
ISOLATED_SLOTS = 16  # child processes per worker, where env.isolated asks for them


@dataclass(frozen=True)
class PlayedEnv:
    """An environment, and who plays it.

    Attributes:
        env: how to make the environment.
        seats: who plays each seat: policy, endpoint, player:NAME, model:PATH, or a function from
            outside the environment.
        sampling: how models sample.
        passed: players that the program has passed as objects, by seat, from `by_value.dumps`.
    """

    env: EnvSpec
    seats: Mapping[str, str]
    sampling: Sampling
    passed: Mapping[str, str | bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class WorkerJob:
    """What a worker needs to play.

    Attributes:
        envs: by component of the mixture (without one, under an empty name), and by the cells of
            an evaluation that are played otherwise, see `SettingsEnvironment`.
        config: limits, retries and deadlines.
        models: directory of each model (its tokenizer), by its name in `PlayedEnv.seats`.
        apps: name of each model's Serve app, by the same name.
    """

    envs: Mapping[str, PlayedEnv]
    config: Config
    models: Mapping[str, str] = field(default_factory=dict)
    apps: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """What ended on a worker since its last report.

    Attributes:
        episodes: number of episodes, of whatever group.
        groups: those whose last episode has ended.
    """

    episodes: int
    groups: tuple[Group, ...]


@dataclass(frozen=True, slots=True)
class Running:
    """What an event loop is doing.

    Attributes:
        episode: id of the one whose code it runs; empty if that is not known.
        stack: formatted frames, the innermost call last; empty if it runs nothing.
    """

    episode: str = ""
    stack: str = ""


def running_in(loop: asyncio.AbstractEventLoop, thread: int) -> Running:
    """What the event loop of `thread` is running; for calls from another thread."""
    task, frame = asyncio.current_task(loop), sys._current_frames().get(thread)
    if task is None or frame is None:
        return Running()
    frames = list(traceback.extract_stack(frame))
    ours = [at for at, one in enumerate(frames) if one.name == run_environment.__name__]
    frames = frames[ours[-1] + 1 if ours else 0 :]
    stack = "".join(traceback.format_list(frames[-FRAMES:]))
    name = task.get_name()  # `play_episode` names an episode's task after it
    return Running(name.partition("~")[0] if "/" in name else "", stack)


def trainable_seats(seats: Mapping[str, str]) -> tuple[str, ...]:
    """Seats that the policy plays: their tokens are trained on."""
    return tuple(seat for seat, who in seats.items() if who == POLICY)


class EnvWorker:
    """Plays groups; its methods are thin, `rayrl.rollout.rollout` has the one loop.

    Args:
        job: what is played.
        recorder: the actor that gets every turn; needed by `begin` only.
    """

    def __init__(self, job: WorkerJob, recorder: Any = None) -> None:
        prepare_process(1)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        self._job = job
        self._turns = TurnSender(recorder)
        self._clients: dict[str, BatchingClient] = {}
        self._isolated: list[SubprocessEnv] = []
        self._canceller = GroupCanceller(self._version)
        self._unbegun: dict[str, GroupPlan] = {}
        self._playing: set[asyncio.Task[None]] = set()
        self._reports = _Reports()

    # Made in a method call, not in __init__: so an exception reaches the caller with its type.

    @cached_property
    def environments(self) -> Mapping[str, Environment]:
        """What is played, by component."""
        return {name: self._environment(one.env) for name, one in self._job.envs.items()}

    def _environment(self, spec: EnvSpec) -> Environment:
        environment, cluster = environment_of(spec), self._job.config.cluster
        if environment.slots is not None:  # each worker has a share of them
            share = max(1, environment.slots // cluster.most_env_workers)
            environment = environment.with_play(environment.play, share)
        if not self._job.config.env.isolated:
            return environment
        slots = min(ISOLATED_SLOTS, cluster.concurrency, environment.slots or ISOLATED_SLOTS)
        self._isolated.append(SubprocessEnv(environment, slots))
        return self._isolated[-1].environment

    @cached_property
    def players(self) -> Mapping[str, Mapping[str, Player]]:
        """The player of each seat, by component."""
        return {
            name: {seat: self._player(name, seat, who) for seat, who in one.seats.items()}
            for name, one in self._job.envs.items()
        }

    def _player(self, component: str, seat: str, who: str) -> Player:
        job, config, own = self._job, self._job.config, self._job.envs[component]
        if who == "endpoint":
            player = copy.copy(self._endpoint)  # one client, so that limits are those of all seats
            player.sampling = own.sampling
            return player
        if who not in job.models:
            return ScriptedPlayer(self._function(component, seat, who))
        if who not in self._clients:
            self._clients[who] = BatchingClient(
                ServeReplicas(job.apps[who]),
                count=config.cluster.replicas,
                deadline_s=config.cluster.request_deadline_s,
            )
        chat = Chat.load(job.models[who])
        return PolicyPlayer(
            chat,
            self._clients[who],
            own.sampling,
            trainable=who == POLICY,
            run_temperature=config.sampling.temperature if component else None,
        )

    async def close(self) -> None:
        """Stop asking models, where the worker is no process of its own."""
        for client in self._clients.values():
            await client.close()

    @cached_property
    def _endpoint(self) -> EndpointPlayer:
        config = self._job.config
        return EndpointPlayer(split_limits(config.endpoint, config.cluster.most_env_workers))

    def _function(self, component: str, seat: str, who: str) -> PlayerFunction:
        passed = self._job.envs[component].passed
        if seat in passed:
            function: PlayerFunction = by_value.loads(passed[seat])
            return function
        return player_function(self.environments[component], f"env.seats.{seat}", who)

    @cached_property
    def _limit(self) -> ConcurrencyLimit:
        """Live episodes; as few as an endpoint's limit, so that those that begin soon end."""
        job, config = self._job, self._job.config
        most = [config.cluster.concurrency]
        most += [env.slots for env in self.environments.values() if env.slots]
        if any("endpoint" in one.seats.values() for one in job.envs.values()):
            most.append(split_limits(config.endpoint, config.cluster.most_env_workers).concurrency)
        return ConcurrencyLimit(min(most))

    def _version(self) -> int:
        """The oldest weights that may answer the policy's requests now."""
        client = self._clients.get(POLICY)
        return client.min_version if client else 0

    async def ping(self) -> int:
        """Return how many episodes may be live here.

        Answers only while the event loop runs: this is how blocking env code is detected.
        """
        self._loop, self._thread = asyncio.get_running_loop(), threading.get_ident()
        assert self.environments  # loaded now: plans hold tasks of their classes
        assert self.players
        return self._limit.size

    @ray.method(concurrency_group=WATCH)  # type: ignore[untyped-decorator]
    async def running(self) -> Running:
        """What the event loop runs; answers from another thread, unless the GIL is held."""
        return running_in(self._loop, self._thread)

    def cancel(self, plans: Sequence[str], oldest: int) -> None:
        """Cancel those of these plans, by id, that began with weights older than `oldest`."""
        self._canceller.cancel(plans, oldest)

    async def begin(
        self,
        plans: Sequence[GroupPlan],
        min_version: int = 0,
        recorded: Mapping[str, PartialEpisode] | None = None,
        workers: int = 1,
    ) -> None:
        """Play groups within the concurrency limit, earlier ones first; `report` returns them.

        Args:
            min_version: weights older than this must not answer.
            recorded: episodes of these groups that began elsewhere and resume here, by id.
            workers: how many there are; the more, the longer each waits between two messages.
        """
        self._turns.pause_s = PAUSE_S * workers
        if POLICY in self._clients:
            client = self._clients[POLICY]
            client.min_version = max(client.min_version, min_version)
        self._unbegun |= {plan.id: plan for plan in plans}
        for component in dict.fromkeys(plan.component for plan in plans):
            ids = [plan.id for plan in plans if plan.component == component]
            task = asyncio.create_task(self._play(component, ids, recorded or {}))
            self._playing.add(task)
            task.add_done_callback(self._playing.discard)
            task.add_done_callback(on_failure(self._reports.fail))

    async def report(self) -> WorkerReport:
        """Wait until something has ended, and return what has since the last report.

        Raises:
            Exception: an error of the program itself.
        """
        return await self._reports.next(self._turns.pause_s)

    async def give_back(self) -> list[str]:
        """Give up the groups that have not begun; returns their ids."""
        ids = list(self._unbegun)
        self._unbegun.clear()
        return ids

    async def _play(
        self, component: str, ids: Sequence[str], recorded: Mapping[str, PartialEpisode]
    ) -> None:
        env = self._job.config.env
        async for group in play_groups(
            self.environments[component],
            (plan for name in ids if (plan := self._unbegun.pop(name, None)) is not None),
            self.players[component],
            concurrency=self._limit,
            retries=env.retries,
            deadline_s=env.deadline_s,
            canceller=self._canceller,
            recorded=recorded,
            on_turn=self._turns.add,
            on_end=self._reports.add_episode,
        ):
            self._turns.drop_ended(group)
            self._reports.add_group(group)


class _Reports:
    """Collects what ends on a worker, for the driver to fetch in few messages."""

    def __init__(self) -> None:
        self._episodes = 0
        self._groups: list[Group] = []
        self._error: BaseException | None = None
        self._changed = asyncio.Event()
        self._next_at = 0.0  # by the event loop's time

    def add_episode(self) -> None:
        self._episodes += 1
        self._changed.set()

    def add_group(self, group: Group) -> None:
        self._groups.append(group)
        self._changed.set()

    def fail(self, error: BaseException) -> None:
        self._error = error
        self._changed.set()

    async def next(self, pause_s: float) -> WorkerReport:
        """Wait until something has ended, and for `pause_s` after the last report."""
        loop = asyncio.get_running_loop()
        await self._changed.wait()
        await asyncio.sleep(self._next_at - loop.time())
        self._changed.clear()
        self._next_at = loop.time() + pause_s
        if self._error is not None:
            raise self._error
        report = WorkerReport(self._episodes, tuple(self._groups))
        self._episodes, self._groups = 0, []
        return report


def start_worker(job: WorkerJob, recorder: Any) -> Any:
    """Start a worker's actor, which sends every turn to the recorder."""
    actor = ray.remote(
        num_cpus=job.config.cluster.env_worker_cpus,
        resources=dict(job.config.cluster.env_worker_resources),
        max_concurrency=1000,
        concurrency_groups={WATCH: 1},
    )(EnvWorker)
    return actor.remote(job, recorder)
