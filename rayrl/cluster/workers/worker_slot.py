"""A worker as the driver sees it: what it was given, and whether it is still there."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayTaskError

from rayrl.cluster.gone import ACTOR_DIED
from rayrl.cluster.workers.env_worker import News, Running
from rayrl.config import ClusterConfig, EnvConfig
from rayrl.errors import RayrlError, RunFailed, safe_repr
from rayrl.rollout.resume import PartialEpisode
from rayrl.rollout.rollout import GroupPlan
from rayrl.types import Group

__all__ = [
    "GRACE_S",
    "PendingGroup",
    "RolloutRequest",
    "WorkerGone",
    "WorkerSlot",
    "blocked",
    "kill",
    "placing",
]

GRACE_S = 5.0  # of silence beyond env.deadline_s, after which a worker counts as hung
PING_EVERY_S = 1.0
BLOCKED_S = 5.0  # of silence after which it is said what blocks a worker
AHEAD = 8  # a worker gets 1/8 more than it has room for: the driver may be busy when it runs dry


class WorkerGone(Exception):
    """A worker died, or its event loop is blocked."""


class RolloutRequest:
    """Groups that somebody waits for.

    Args:
        keep: called with each of them.
    """

    def __init__(self, plans: Sequence[GroupPlan], keep: Callable[[Group], None]) -> None:
        self._left = {plan.id for plan in plans}
        self._keep = keep
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._look()

    def finish(self, group: Group) -> None:
        """It has been played."""
        if self.done.done():  # nobody waits any more
            return
        try:
            self._keep(group)
        except Exception as error:
            self.fail(error)
        self.skip(group.id)

    def skip(self, name: str) -> None:
        """It will not be played."""
        self._left.discard(name)
        self._look()

    def fail(self, error: BaseException) -> None:
        """Nothing can be played any more."""
        if not self.done.done():
            self.done.set_exception(error)

    def _look(self) -> None:
        if not self._left and not self.done.done():
            self.done.set_result(None)


class PendingGroup:
    """A group to be played.

    Attributes:
        deaths: workers that died while they had it.
        again: whether it was played before, so that turns of it are recorded.
    """

    def __init__(self, plan: GroupPlan, call: RolloutRequest, *, again: bool) -> None:
        self.plan, self.call, self.again = plan, call, again
        self.deaths = 0


class WorkerSlot:
    """A place for a worker: its actor now, and what that was given.

    Args:
        actor: of `EnvWorker`.
        patience_s: of silence, after which it counts as hung.
        on_blocked: told when it has been silent for `BLOCKED_S`, with what it does instead; None
            if it cannot say even that.

    Attributes:
        room: episodes the worker may have live; 0 until it can play.
        open: episodes it was given that have not ended.
        works: groups it was given that have not ended, by id.
        suspects: parts of what workers died with; it plays them by themselves, the last one first.
        trial: groups in the part it plays now; 0: it plays what comes.
        busy_at: when it last had something to do, by `time.monotonic`.
    """

    def __init__(
        self,
        actor: Any,
        patience_s: float,
        on_blocked: Callable[[WorkerSlot, Running | None], None] = lambda place, running: None,
    ) -> None:
        self._patience_s, self._on_blocked = patience_s, on_blocked
        self.suspects: list[list[PendingGroup]] = []
        self.busy_at = time.monotonic()
        self.renew(actor)

    def renew(self, actor: Any) -> None:
        """Another actor takes the place, with nothing to do yet."""
        self.actor = actor
        self.room = self.open = self.trial = 0
        self.works: dict[str, PendingGroup] = {}

    @property
    def free(self) -> int:
        """Episodes it may be given now; 0 while it plays, or waits to play, suspects."""
        if self.trial or self.suspects:
            return 0
        return max(0, self.room + self.room // AHEAD - self.open)

    async def start(self) -> None:
        """Wait until the worker can play: it is placed, and has its imports and players.

        Raises:
            WorkerGone: it died.
            RayrlError: it says that it cannot.
        """
        self.room = await answer(self.actor.ping.remote())

    def take(self, works: Sequence[PendingGroup]) -> None:
        """It is given these."""
        for work in works:
            self.works[work.plan.id] = work
            self.open += work.plan.size

    def drop(self, name: str) -> PendingGroup | None:
        """It has this no longer; returns what it was, if it was there."""
        work = self.works.pop(name, None)
        if not self.works:
            self.trial = 0
        return work

    def whose(self, running: Running | None) -> str:
        """Which of its episodes that is, as far as it is known."""
        episode = running.episode if running else ""
        work = self.works.get(episode.rpartition("/")[0])
        if work is not None:
            return f"episode {episode} on task {safe_repr(work.plan.task)}"
        tasks = "; ".join(safe_repr(one.plan.task, 200) for one in list(self.works.values())[:3])
        return f"one of {len(self.works)} groups (the first tasks are {tasks})"

    async def begin(
        self,
        works: Sequence[PendingGroup],
        version: int,
        recorded: Mapping[str, PartialEpisode],
        workers: int,
    ) -> None:
        """Have the worker play these; a worker that is gone is not told of here, but by `news`."""
        with suppress(WorkerGone):
            plans = [work.plan for work in works]
            await answer(self.actor.begin.remote(plans, version, recorded, workers))

    async def give_back(self) -> list[str]:
        """Have the worker give up, by id, what it has not begun."""
        with suppress(WorkerGone):
            names: list[str] = await answer(self.actor.give_back.remote())
            return names
        return []

    async def news(self) -> AsyncIterator[News]:
        """What happens on the worker.

        Raises:
            WorkerGone: sooner or later.
            RayrlError: an error of the program itself.
        """
        actor = self.actor
        watch = asyncio.create_task(self._watch(actor))
        try:
            while True:
                following = asyncio.ensure_future(answer(actor.news.remote()))
                try:
                    await asyncio.wait({following, watch}, return_when=asyncio.FIRST_COMPLETED)
                    if not following.done():
                        raise WorkerGone(watch.result())
                finally:
                    following.cancel()
                yield following.result()
        finally:
            watch.cancel()

    async def _watch(self, actor: Any) -> str:
        """Returns why, once the worker is silent."""
        while True:
            saying = asyncio.create_task(self._say_blocked(actor))
            try:
                async with asyncio.timeout(self._patience_s):
                    await actor.ping.remote()
            except TimeoutError:
                return (
                    "its code blocked the event loop of its worker for more than "
                    f"{self._patience_s:g} s"
                )
            except ACTOR_DIED as error:
                return f"its worker process died: {error}"
            finally:
                saying.cancel()
            await asyncio.sleep(PING_EVERY_S)

    async def _say_blocked(self, actor: Any) -> None:
        """Say what blocks the worker, unless this is cancelled before."""
        await asyncio.sleep(BLOCKED_S)
        running = None
        with suppress(TimeoutError, *ACTOR_DIED):  # it may hold the interpreter as well, or be dead
            async with asyncio.timeout(BLOCKED_S):
                running = await actor.running.remote()
        self._on_blocked(self, running)


def blocked(env: EnvConfig, what: str, running: Running | None) -> str:
    """What to tell a person when a worker is found blocked, in `what`."""
    remedy = (
        "Await what waits, and bound what computes; or let env.isolated=true play each episode in "
        "a process of its own, which is killed at its deadline."
    )
    if env.isolated:
        remedy = "Its machine may have too much to do (cluster.concurrency, cluster.env_workers)."
    stack = f"\n{running.stack.rstrip()}" if running else ""
    return (
        f"environment {env.name!r} has blocked the event loop of an env worker for "
        f"{BLOCKED_S:g} s, in {what}. Nothing else runs there, and after "
        f"{env.deadline_s + GRACE_S:g} s the worker is replaced. {remedy}{stack}"
    )


async def answer(ref: Any) -> Any:
    """A worker's answer, with its errors as ours."""
    try:
        return await ref
    except RayTaskError as error:
        if isinstance(error.cause, RayrlError):
            raise error.cause from None
        raise RunFailed(f"an env worker failed: {error}") from error
    except ACTOR_DIED as error:
        raise WorkerGone(f"its worker process died: {error}") from error


def kill(actor: Any) -> None:
    """End an actor, if it is there."""
    with suppress(Exception):  # it may be dead already
        ray.kill(actor)


def placing(cluster: ClusterConfig) -> str:
    """What a worker needs and what there is, for who reads that one has no place."""
    there, free = ray.cluster_resources(), ray.available_resources()
    own = f" and {dict(cluster.env_worker_resources)}" if cluster.env_worker_resources else ""
    return (
        f"Each reserves cluster.env_worker_cpus={cluster.env_worker_cpus:g}{own}; the cluster has "
        f"{there.get('CPU', 0):g} CPUs ({free.get('CPU', 0):g} free). Give the cluster more "
        "nodes, or ask for fewer workers."
    )
