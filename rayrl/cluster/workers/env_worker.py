"""Env workers: Ray actors that each play hundreds of episodes on one event loop."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import ray

from rayrl.chat.renderer import Chat
from rayrl.cluster.serving.inference_client import BatchingClient, ServeReplicas
from rayrl.cluster.serving.streams import PAUSE_S
from rayrl.cluster.session import prepare_process
from rayrl.cluster.workers.turn_log import Telling
from rayrl.config import Config
from rayrl.environment.environment import Environment, EnvSpec
from rayrl.environment.registry import load_env
from rayrl.errors import ConfigError, did_you_mean
from rayrl.rollout.agent import Player
from rayrl.rollout.concurrency import ConcurrencyLimit, GroupCanceller
from rayrl.rollout.endpoint import EndpointPlayer, share
from rayrl.rollout.players import PolicyPlayer, ScriptedPlayer
from rayrl.rollout.resume import PartialEpisode
from rayrl.rollout.rollout import GroupPlan, play_groups
from rayrl.rollout.subprocess_env import SubprocessEnv
from rayrl.types import Group, Sampling

__all__ = [
    "POLICY",
    "EnvWorker",
    "News",
    "Running",
    "WorkerJob",
    "running_in",
    "start_worker",
    "trainable_seats",
]

POLICY = "policy"
WATCH = "watch"  # concurrency group of what answers while the event loop is blocked
FRAMES = 5  # of a stack that are shown
ISOLATED_SLOTS = 16  # child processes per worker, where env.isolated asks for them


@dataclass(frozen=True)
class WorkerJob:
    """What a worker needs to play.

    Attributes:
        env: how to make the environment.
        seats: who plays each seat: policy, endpoint, player:NAME or model:PATH.
        sampling: how models draw.
        models: directory of each model (its tokenizer), by what a seat calls it.
        apps: name of the Serve app of each model, likewise.
    """

    env: EnvSpec
    seats: Mapping[str, str]
    sampling: Sampling
    config: Config
    models: Mapping[str, str] = field(default_factory=dict)
    apps: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class News:
    """What happened on a worker: how many episodes ended there, and the groups that did."""

    episodes: int
    groups: tuple[Group, ...]


@dataclass(frozen=True, slots=True)
class Running:
    """What an event loop is doing.

    Attributes:
        episode: whose code it runs; empty if that is not known.
        stack: where it is, the innermost call last; empty if it runs nothing.
    """

    episode: str = ""
    stack: str = ""


def running_in(loop: asyncio.AbstractEventLoop, thread: int) -> Running:
    """What `loop`, which belongs to `thread`, is doing; to be asked by another thread."""
    task, frame = asyncio.current_task(loop), sys._current_frames().get(thread)
    if task is None or frame is None:
        return Running()
    frames = list(traceback.extract_stack(frame))
    ours = [at for at, one in enumerate(frames) if one.name == "_played"]  # what called its code
    frames = frames[ours[-1] + 1 if ours else 0 :]
    stack = "".join(traceback.format_list(frames[-FRAMES:]))
    name = task.get_name()  # of an episode's own task, as `play_episode` names it
    return Running(name.partition("~")[0] if "/" in name else "", stack)


def trainable_seats(seats: Mapping[str, str]) -> tuple[str, ...]:
    """Seats the policy plays: those whose tokens are trained on."""
    return tuple(seat for seat, who in seats.items() if who == POLICY)


class EnvWorker:
    """Plays groups. Methods are thin: `rayrl.rollout.rollout` has the one loop.

    Args:
        job: what is played.
        recorder: is told every turn; needed by `begin` only.
    """

    def __init__(self, job: WorkerJob, recorder: Any = None) -> None:
        prepare_process(1)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        self._job = job
        self._telling = Telling(recorder)
        self._clients: dict[str, BatchingClient] = {}
        self._stops = GroupCanceller(self._version)
        self._unbegun: dict[str, GroupPlan] = {}
        self._playing: set[asyncio.Task[None]] = set()
        # what `news` will tell
        self._episodes = 0
        self._groups: list[Group] = []
        self._error: BaseException | None = None
        self._changed = asyncio.Event()
        self._news_at = 0.0  # not before

    # Made at the first call and not before: its caller gets what is wrong, whole.

    @cached_property
    def environment(self) -> Environment:
        """What is played."""
        spec = self._job.env
        environment = load_env(spec.ref).configure(spec.args, spec.rewards)
        if not self._job.config.env.isolated:
            return environment
        slots = min(ISOLATED_SLOTS, self._job.config.cluster.concurrency)
        self._isolated = SubprocessEnv(environment, slots)
        return self._isolated.environment

    @cached_property
    def players(self) -> Mapping[str, Player]:
        """Who plays each seat."""
        return {seat: self._player(who) for seat, who in self._job.seats.items()}

    def _player(self, who: str) -> Player:
        job, config = self._job, self._job.config
        kind, _, name = who.partition(":")
        if kind == "endpoint":
            endpoint = share(config.endpoint, config.cluster.most_env_workers)
            return EndpointPlayer(endpoint, sampling=job.sampling)
        if kind == "player":
            known = self.environment.players
            if name not in known:
                near = did_you_mean(name, known) or f" It has: {', '.join(known) or 'none'}."
                raise ConfigError(
                    f"player:{name}: {self.environment.name!r} has no such player.{near}"
                )
            return ScriptedPlayer(known[name])
        client = BatchingClient(
            ServeReplicas(job.apps[who]),
            count=config.cluster.replicas,
            deadline_s=config.cluster.request_deadline_s,
        )
        self._clients[who] = client
        chat = Chat.load(job.models[who])
        return PolicyPlayer(chat, client, job.sampling, trainable=who == POLICY)

    @cached_property
    def _room(self) -> ConcurrencyLimit:
        """Episodes at once: what a server is asked for is asked by episodes that soon end."""
        job, config = self._job, self._job.config
        most = [config.cluster.concurrency, self.environment.slots or config.cluster.concurrency]
        if "endpoint" in job.seats.values():
            most.append(share(config.endpoint, config.cluster.most_env_workers).concurrency)
        return ConcurrencyLimit(min(most))

    def _version(self) -> int:
        """Weights that the policy's requests now ask for."""
        client = self._clients.get(POLICY)
        return client.min_version if client else 0

    async def ping(self) -> int:
        """How many episodes may be live here.

        Answers only while the event loop runs: env code that blocks it is found by this.
        """
        self._loop, self._thread = asyncio.get_running_loop(), threading.get_ident()
        assert self.environment.seats  # now: the plans to come hold tasks of its classes
        assert self.players
        return self._room.most

    @ray.method(concurrency_group=WATCH)  # type: ignore[untyped-decorator]
    async def running(self) -> Running:
        """What keeps the event loop; answers on a loop of its own, if it gets the interpreter."""
        return running_in(self._loop, self._thread)

    def stop(self, plans: Sequence[str], oldest: int) -> None:
        """End those of these plans that began with weights older than `oldest`."""
        self._stops.stop(plans, oldest)

    async def begin(
        self,
        plans: Sequence[GroupPlan],
        min_version: int = 0,
        recorded: Mapping[str, PartialEpisode] | None = None,
        workers: int = 1,
    ) -> None:
        """Play groups as there is room, earlier ones first; `news` says what comes of them.

        Args:
            recorded: episodes of these groups that began elsewhere, to go on with, by id.
            workers: how many there are; the more, the longer each waits between two messages.
        """
        self._telling.pause_s = PAUSE_S * workers
        if POLICY in self._clients:
            client = self._clients[POLICY]
            client.min_version = max(client.min_version, min_version)
        self._unbegun |= {plan.id: plan for plan in plans}
        task = asyncio.create_task(self._play([plan.id for plan in plans], recorded or {}))
        self._playing.add(task)
        task.add_done_callback(self._played)

    async def news(self) -> News:
        """What happened since this was asked last; waits until something has.

        Raises:
            Exception: an error of the program itself.
        """
        loop = asyncio.get_running_loop()
        await self._changed.wait()
        await asyncio.sleep(self._news_at - loop.time())
        self._changed.clear()
        self._news_at = loop.time() + self._telling.pause_s
        if self._error is not None:
            raise self._error
        news = News(self._episodes, tuple(self._groups))
        self._episodes, self._groups = 0, []
        return news

    async def give_back(self) -> list[str]:
        """Groups that have not begun, by id, and now will not."""
        names = list(self._unbegun)
        self._unbegun.clear()
        return names

    async def _play(self, names: Sequence[str], recorded: Mapping[str, PartialEpisode]) -> None:
        env = self._job.config.env
        async for group in play_groups(
            self.environment,
            self._begun(names),
            self.players,
            concurrency=self._room,
            retries=env.retries,
            deadline_s=env.deadline_s,
            stops=self._stops,
            recorded=recorded,
            on_turn=self._telling.add,
            on_end=self._ended,
        ):
            self._telling.ended(group)
            self._groups.append(group)
            self._changed.set()

    def _begun(self, names: Sequence[str]) -> Iterator[GroupPlan]:
        for name in names:
            if (plan := self._unbegun.pop(name, None)) is not None:
                yield plan

    def _ended(self) -> None:
        self._episodes += 1
        self._changed.set()

    def _played(self, task: asyncio.Task[None]) -> None:
        self._playing.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._error = error
            self._changed.set()


def start_worker(job: WorkerJob, recorder: Any) -> Any:
    """Start a worker's actor; it tells every turn to the recorder."""
    actor = ray.remote(
        num_cpus=job.config.cluster.env_worker_cpus,
        resources=dict(job.config.cluster.env_worker_resources),
        max_concurrency=1000,
        concurrency_groups={WATCH: 1},
    )(EnvWorker)
    return actor.remote(job, recorder)
