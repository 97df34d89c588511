"""The driver's queue of groups, and the workers that play them.

Groups wait here and not on a worker: each worker has little more than it has room for, so that one
that comes later finds work, and one that dies takes little along. The first `cluster.env_workers`
workers share what there is evenly. Others, up to `cluster.env_workers_max`, are asked for when
groups wait for room (`scaling.py`), play what the first ones have no room for, and are let go when
there is nothing of that for a while.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import replace
from typing import Any

import ray

from rayrl.cluster.gone import ACTOR_DIED
from rayrl.cluster.workers.env_worker import Running, WorkerJob, trainable_seats
from rayrl.cluster.workers.scaling import Growth, Load
from rayrl.cluster.workers.worker_slot import (
    GRACE_S,
    PendingGroup,
    RolloutRequest,
    WorkerGone,
    WorkerSlot,
    blocked,
    kill,
    placing,
)
from rayrl.errors import InfraError, RayrlError, RunFailed, safe_repr
from rayrl.rollout.resume import PartialEpisode
from rayrl.rollout.rollout import GroupPlan
from rayrl.types import Episode, Failure, Group, Turn

__all__ = ["WorkerPool"]

START_DEADLINE_S = 300.0
START_ATTEMPTS = 3
LATE_S = 300.0  # after which it is said that a worker that was asked for has not come
BLAMED_AFTER = 2  # worker deaths, the last one alone on the worker, after which a group is to blame
BLOCKED_SAID = 8  # blocked workers of which is told; where all tasks block, that is enough
LOOK_EVERY_S = 1.0  # whether there should be more workers, or fewer

_log = logging.getLogger(__name__)


class WorkerPool:
    """Plays groups on a number of workers.

    Args:
        job: what the workers play.
        start: starts a worker's actor.
        recorder: the actor that keeps the turns of live episodes.

    Attributes:
        restarts: workers replaced so far.
    """

    def __init__(self, job: WorkerJob, start: Callable[[], Any], recorder: Any) -> None:
        cluster = job.config.cluster
        self._job, self._start, self._recorder = job, start, recorder
        self._first = [self._place() for _ in range(cluster.env_workers)]
        self._more: list[WorkerSlot] = []
        self._queue: deque[PendingGroup] = deque()
        self._calls: set[RolloutRequest] = set()
        self._brought: set[str] = set()  # groups that began with an earlier driver
        self._growth = Growth(cluster.most_env_workers)
        self._broken_starts = 0  # of workers that were asked for, in a row
        self._said_late = False
        self._said_blocked: set[str] = set()
        self._most_waiting = 0  # groups, since `load` was asked
        self._version = 0
        self._winding_down = False
        self._error: BaseException | None = None
        self._tasks: dict[asyncio.Task[None], WorkerSlot | None] = {}
        self.restarts = 0

    def _place(self) -> WorkerSlot:
        patience_s = self._job.config.env.deadline_s + GRACE_S
        return WorkerSlot(self._start(), patience_s, self._say_blocked)

    @property
    def _places(self) -> Iterator[WorkerSlot]:
        yield from self._first
        yield from self._more

    async def ready(self) -> None:
        """Wait until the first workers can play.

        Raises:
            ConfigError: a setting the workers cannot work with.
        """
        await asyncio.gather(*(self._started(place) for place in self._first))
        self._brought = await self._recorder.known.remote()
        for place in self._first:
            self._spawn(self._live(place), place)
        if self._job.config.cluster.most_env_workers > len(self._first):
            self._spawn(self._scale())

    async def play(
        self,
        plans: Sequence[GroupPlan],
        min_version: int,
        keep: Callable[[Group], None],
        *,
        again: bool = False,
    ) -> None:
        """Play groups; calls may overlap, and earlier ones are served first.

        Args:
            keep: called with each as it ends.
            again: whether turns of them are recorded.
        """
        if self._error is not None:
            raise self._error
        if self._winding_down:
            return
        call = RolloutRequest(plans, keep)
        self._version = max(self._version, min_version)
        self._calls.add(call)
        self._queue += [PendingGroup(plan, call, again=again) for plan in plans]
        self._deal()
        try:
            await call.done
        finally:
            self._calls.discard(call)
            self._queue = deque(work for work in self._queue if work.call is not call)

    def stop(self, plans: Sequence[str], oldest: int) -> None:
        """End those of these plans, by id, that began with weights older than `oldest`."""
        if not plans:
            return
        told = ray.put(list(plans))  # once, not for every worker
        for place in self._places:
            if place.works:
                place.actor.stop.remote(told, oldest)

    def forget(self, groups: Sequence[str]) -> None:
        """These groups, by id, need not be brought back."""
        self._brought.difference_update(groups)
        self._recorder.forget.remote(groups)

    def wind_down(self) -> None:
        """Begin nothing more, until `wind_up`."""
        self._winding_down = True
        waiting = list(self._queue)
        self._queue.clear()
        for place in self._places:
            waiting += [work for part in place.suspects for work in part]
            place.suspects.clear()
            if place.works:
                self._spawn(self._give_back(place))
        for work in waiting:
            work.call.skip(work.plan.id)

    def wind_up(self) -> None:
        """Begin groups again."""
        self._winding_down = False

    def load(self) -> Load:
        """What the workers have to do."""
        workers, asked = self._count()
        load = Load(workers, asked, self._most_waiting)
        self._most_waiting = len(self._queue)
        return load

    def _count(self) -> tuple[int, int]:
        """Workers that can play, and those that are not there yet."""
        workers = sum(place.room > 0 for place in self._places)
        return workers, len(self._first) + len(self._more) - workers

    def close(self) -> None:
        """End the workers."""
        for task in list(self._tasks):
            task.cancel()
        for place in self._places:
            kill(place.actor)

    def _spawn(self, coroutine: Coroutine[Any, Any, None], place: WorkerSlot | None = None) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks[task] = place
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._error = error
            for call in self._calls:
                call.fail(error)

    # --- who plays what ----------------------------------------------------------------------

    def _deal(self) -> None:
        """Give what waits to the workers that have room."""
        dealt: dict[WorkerSlot, list[PendingGroup]] = {}
        for place in self._places:
            if place.suspects and place.room and not place.works:
                part = place.suspects.pop()
                place.take(part)
                place.trial = len(part)
                dealt[place] = part
        while self._queue and (roomy := self._roomiest()) is not None:
            work = self._queue.popleft()
            roomy.take([work])
            dealt.setdefault(roomy, []).append(work)
        for place, works in dealt.items():
            self._spawn(self._give(place, works))
        self._most_waiting = max(self._most_waiting, len(self._queue))

    def _roomiest(self) -> WorkerSlot | None:
        """Of the first workers the one with most room; if there is none, the next that has some."""
        best = max(self._first, key=lambda place: place.free)
        if best.free:
            return best
        return next((place for place in self._more if place.free), None)

    async def _give(self, place: WorkerSlot, works: Sequence[PendingGroup]) -> None:
        actor = place.actor
        known = [work.plan.id for work in works if work.again or work.deaths]
        recorded = await self._recorded(known) if known else {}
        recorded |= await self._brought_back([work.plan.id for work in works])
        if place.actor is not actor:  # it died meanwhile
            return
        if self._winding_down:
            self._skip(place, [work.plan.id for work in works])
            return
        workers, _ = self._count()
        await place.begin(works, self._version, recorded, workers)

    async def _give_back(self, place: WorkerSlot) -> None:
        self._skip(place, await place.give_back())

    def _skip(self, place: WorkerSlot, names: Sequence[str]) -> None:
        for name in names:
            if (work := place.drop(name)) is not None:
                place.open -= work.plan.size
                work.call.skip(name)

    async def _recorded(self, plans: Sequence[str]) -> dict[str, PartialEpisode]:
        try:
            found: dict[str, PartialEpisode] = await self._recorder.begun.remote(plans)
        except ACTOR_DIED:  # it died as well, and begins anew: so do the episodes
            return {}
        return found

    async def _brought_back(self, plans: Sequence[str]) -> dict[str, PartialEpisode]:
        """The episodes that began with an earlier driver, without what newer weights have said."""
        brought = [plan for plan in plans if plan in self._brought]
        if not brought:
            return {}
        self._brought.difference_update(brought)
        old = _until(self._version)
        return {
            episode: replace(begun, turns=tuple(itertools.takewhile(old, begun.turns)))
            for episode, begun in (await self._recorded(brought)).items()
        }

    # --- the lives of workers ------------------------------------------------------------------

    async def _live(self, place: WorkerSlot) -> None:
        """One of the first workers, through its deaths."""
        while True:
            try:
                await self._hear(place)
            except WorkerGone as gone:
                self.restarts += 1
                self._say_gone(place, gone)
                kill(place.actor)
                place.suspects += self._suspects(place, str(gone))
                place.renew(self._start())
                await self._started(place)

    async def _started(self, place: WorkerSlot) -> None:
        """Wait for a worker. One may be placed on a node whose loss Ray has not noticed yet.

        Raises:
            RunFailed: none can start.
        """
        for attempt in range(START_ATTEMPTS):
            try:
                async with asyncio.timeout(START_DEADLINE_S):
                    await place.start()
                return
            except TimeoutError:
                needs = placing(self._job.config.cluster)
                what = f"an env worker did not start within {START_DEADLINE_S:g} s. {needs}"
                raise InfraError(what) from None
            except WorkerGone as gone:
                if attempt + 1 == START_ATTEMPTS:
                    raise RunFailed(f"an env worker cannot start: {gone}") from gone
                kill(place.actor)
                place.renew(self._start())

    def _say_gone(self, place: WorkerSlot, gone: WorkerGone) -> None:
        name, n = self._job.config.env.name, len(place.works)
        what = "an env worker of environment %r was lost with %d groups that had not ended: %s"
        _log.warning(what, name, n, gone)

    def _say_blocked(self, place: WorkerSlot, running: Running | None) -> None:
        """Say whose code blocks a worker, as soon as that is noticed, and once for each."""
        if running is not None and not running.stack:  # it runs nothing: the machine is slow
            return
        what = place.whose(running)
        if what in self._said_blocked or len(self._said_blocked) >= BLOCKED_SAID:
            return
        self._said_blocked.add(what)
        _log.warning("%s", blocked(self._job.config.env, what, running))

    async def _hear(self, place: WorkerSlot) -> None:
        """Take what a worker has played, until it is gone."""
        self._deal()
        async for news in place.news():
            place.open -= news.episodes
            place.busy_at = time.monotonic()
            for group in news.groups:
                if (work := place.drop(group.id)) is not None:
                    work.call.finish(group)
            self._deal()

    def _suspects(self, place: WorkerSlot, why: str) -> list[list[PendingGroup]]:
        """What a worker has died with, to be played again in parts.

        Episodes go on from the turns that were recorded of them. What was live is played in two
        halves, and so on, until it is known which group, if any, is to blame: each part has a
        worker to itself, where it can take down nobody else.
        """
        works, alone = list(place.works.values()), place.trial == 1
        place.works.clear()
        if self._winding_down:
            for work in works:
                work.call.skip(work.plan.id)
            return []
        for work in works:
            work.deaths += 1
        if alone and works and works[0].deaths >= BLAMED_AFTER:
            works[0].call.finish(self._blamed(works[0].plan, why))
            return []
        half = (len(works) + 1) // 2
        return [part for part in (works[half:], works[:half]) if part]

    def _blamed(self, plan: GroupPlan, why: str) -> Group:
        name = self._job.config.env.name
        failure = Failure("env", f"environment {name!r} on task {safe_repr(plan.task)}: {why}")
        episodes = tuple(
            Episode(f"{plan.id}/{index}", name, plan.task, index, (), failure=failure)
            for index in range(plan.size)
        )
        return Group(plan.id, plan.task, episodes, trainable_seats(self._job.seats))

    # --- more workers, and fewer ---------------------------------------------------------------

    async def _scale(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            now, idle_s = time.monotonic(), self._job.config.cluster.env_worker_idle_s
            workers, asked = self._count()
            waiting = sum(work.plan.size for work in self._queue)
            room = max(place.room for place in self._first)
            if room and self._broken_starts < START_ATTEMPTS:
                more = self._growth.more(
                    now, waiting=waiting, room=room, workers=workers, asked=asked
                )
                for _ in range(more):
                    self._ask()
            for place in list(self._more):
                if place.works or place.suspects or (waiting and not place.room):
                    place.busy_at = now
                elif now - place.busy_at >= idle_s:
                    self._let_go(place)

    def _ask(self) -> None:
        place = self._place()
        self._more.append(place)
        self._spawn(self._visit(place), place)

    async def _visit(self, place: WorkerSlot) -> None:
        """A worker above the first ones: it may never come, and may leave at any time."""
        late = asyncio.get_running_loop().call_later(LATE_S, self._say_late)
        try:
            await place.start()
        except (WorkerGone, RayrlError) as error:
            self._broken_starts += 1
            _log.warning("another env worker could not start, play goes on without it: %s", error)
            self._let_go(place)
            return
        finally:
            late.cancel()
        self._broken_starts = 0
        try:
            await self._hear(place)
        except WorkerGone as gone:
            self._say_gone(place, gone)
            parts = self._suspects(place, str(gone))
            self._let_go(place)
            heir = min(self._first, key=lambda other: len(other.suspects))
            heir.suspects[:0] = parts
            self._deal()

    def _let_go(self, place: WorkerSlot) -> None:
        self._more.remove(place)
        kill(place.actor)
        for task, whose in self._tasks.items():
            if whose is place and task is not asyncio.current_task():
                task.cancel()

    def _say_late(self) -> None:
        if self._said_late:
            return
        self._said_late = True
        _log.warning(
            "cluster.env_workers_max=%d: an env worker requested %g s ago has not started; "
            "rollouts go on with %d. %s",
            self._job.config.cluster.env_workers_max,
            LATE_S,
            self._count()[0],
            placing(self._job.config.cluster),
        )


def _until(version: int) -> Callable[[Turn], bool]:
    """Whether no weights newer than `version` made a turn."""
    return lambda turn: all(span.version <= version for span in turn.versions)
