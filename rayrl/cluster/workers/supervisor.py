"""Keeps env workers running: starts, watches and replaces them, and scales their number.

`cluster.env_workers` of them are fixed: one that dies or hangs is replaced in its slot, and the run
stops if it cannot be. Others, up to `cluster.env_workers_max`, are elastic: they are started when
groups wait for capacity (`Growth`) and stopped when they are idle; one that dies or cannot
start is not replaced. What workers play is not known here: a slot is a number.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

import ray
from ray.exceptions import RayTaskError

from rayrl.cluster.actors import ACTOR_DIED, kill_actor, on_failure
from rayrl.cluster.workers.env_worker import Running, WorkerReport
from rayrl.config import ClusterConfig, Config
from rayrl.errors import InfraError, RayrlError, RunFailed
from rayrl.rollout.resume import PartialEpisode
from rayrl.rollout.rollout import GroupPlan

__all__ = [
    "BLOCKED_S",
    "GRACE_S",
    "GROW_AFTER_S",
    "Growth",
    "Supervisor",
    "WorkerEvents",
    "WorkerGone",
    "WorkerProcess",
]

PING_EVERY_S = 1.0
BLOCKED_S = 5.0  # without an answer to a ping, after which the worker is reported as blocked
GRACE_S = 5.0  # without an answer, beyond env.deadline_s, after which a worker counts as hung
START_DEADLINE_S = 300.0
START_ATTEMPTS = 3
GROW_AFTER_S = 5.0  # with episodes waiting for capacity, before more workers are requested
LATE_S = 300.0  # after which a warning says that an elastic worker has not started

_log = logging.getLogger(__name__)


class WorkerGone(Exception):
    """A worker died, or its event loop is blocked."""


class WorkerProcess:
    """One actor of `EnvWorker`; whoever replaces a dead worker makes another one.

    Args:
        actor: of `EnvWorker`.
        patience_s: seconds without an answer to a ping, after which the worker counts as hung.
        on_blocked: called when a ping has had no answer for `BLOCKED_S`, with what the worker's
            event loop runs instead; None if the worker does not answer that either.

    Attributes:
        capacity: episodes that may be live on the worker; 0 until it can play.
        busy_at: when it last had something to play, by `time.monotonic`.
    """

    def __init__(
        self, actor: Any, patience_s: float, on_blocked: Callable[[Running | None], None]
    ) -> None:
        self._actor, self._patience_s, self._on_blocked = actor, patience_s, on_blocked
        self.capacity = 0
        self.busy_at = time.monotonic()

    async def start(self) -> None:
        """Wait until the worker can play: it is scheduled, and has its imports and players.

        Raises:
            WorkerGone: it died.
            RayrlError: what it raised itself.
        """
        self.capacity = await _result(self._actor.ping.remote())

    async def begin(
        self,
        plans: Sequence[GroupPlan],
        version: int,
        recorded: Mapping[str, PartialEpisode],
        workers: int,
    ) -> None:
        """Have the worker play groups, see `EnvWorker.begin`; `reports` raises if it is gone."""
        with suppress(WorkerGone):
            await _result(self._actor.begin.remote(plans, version, recorded, workers))

    async def give_back(self) -> list[str]:
        """Have the worker give up the groups it has not begun; returns their ids."""
        with suppress(WorkerGone):
            ids: list[str] = await _result(self._actor.give_back.remote())
            return ids
        return []

    def cancel(self, plans: Any, oldest: int) -> None:
        """Cancel plans that began with weights older than `oldest`.

        Args:
            plans: reference to their ids, which are put into the object store once for all workers.
        """
        self._actor.cancel.remote(plans, oldest)

    def kill(self) -> None:
        """End the process, if there is one."""
        kill_actor(self._actor)

    async def reports(self) -> AsyncIterator[WorkerReport]:
        """Yield what happens on the worker.

        Raises:
            WorkerGone: the worker died or hung; nothing else ends the iteration.
            RayrlError: an error of the program itself.
        """
        watch = asyncio.create_task(self._watch())
        try:
            while True:
                report = asyncio.ensure_future(_result(self._actor.report.remote()))
                try:
                    await asyncio.wait({report, watch}, return_when=asyncio.FIRST_COMPLETED)
                    if not report.done():
                        raise WorkerGone(watch.result())
                finally:
                    report.cancel()
                self.busy_at = time.monotonic()
                yield report.result()
        finally:
            watch.cancel()

    async def _watch(self) -> str:
        """Ping the worker until it is gone; returns the reason."""
        while True:
            blocked = asyncio.create_task(self._report_blocked())
            try:
                async with asyncio.timeout(self._patience_s):
                    await self._actor.ping.remote()
            except TimeoutError:
                return (
                    "its code blocked the event loop of its worker for more than "
                    f"{self._patience_s:g} s"
                )
            except ACTOR_DIED as error:
                return f"its worker process died: {error}"
            finally:
                blocked.cancel()
            await asyncio.sleep(PING_EVERY_S)

    async def _report_blocked(self) -> None:
        """Call `on_blocked` after `BLOCKED_S`, unless this is cancelled before."""
        await asyncio.sleep(BLOCKED_S)
        running = None
        with suppress(TimeoutError, *ACTOR_DIED):  # it may hold the interpreter as well, or be dead
            async with asyncio.timeout(BLOCKED_S):
                running = await self._actor.running.remote()
        self._on_blocked(running)


async def _result(ref: Any) -> Any:
    """The result of a worker's method, with Ray's errors as rayrl's."""
    try:
        return await ref
    except RayTaskError as error:
        if isinstance(error.cause, RayrlError):
            raise error.cause from None
        raise RunFailed(f"an env worker failed: {error}") from error
    except ACTOR_DIED as error:
        raise WorkerGone(f"its worker process died: {error}") from error


class WorkerEvents(Protocol):
    """What a supervisor calls, on the event loop."""

    def on_ready(self, slot: int, capacity: int, *, elastic: bool) -> None:
        """A worker, the slot's first or a replacement, can have `capacity` live episodes."""

    def on_report(self, slot: int, report: WorkerReport) -> None:
        """Episodes have ended on a worker."""

    def on_blocked(self, slot: int, running: Running | None) -> None:
        """A worker does not answer, see `WorkerProcess`; it may yet."""

    def on_lost(self, slot: int, reason: str) -> None:
        """A worker that was ready has died or hung."""

    def on_removed(self, slot: int) -> None:
        """An elastic worker has no replacement: it was idle, was lost or could not start."""

    def on_error(self, error: BaseException) -> None:
        """Nothing can be played any more: a bug, or a fixed worker that cannot be replaced."""


class Growth:
    """Decides how many more workers to request.

    Once episodes have waited for capacity for `GROW_AFTER_S` without a pause: as many workers as
    they need, less those that were requested before and have not started.

    Args:
        most: the most workers in all, requested ones included.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._since: float | None = None  # when episodes began to wait

    def more(self, now: float, *, waiting: int, capacity: int, workers: int, asked: int) -> int:
        """Return how many more workers to request.

        Args:
            now: seconds, of a monotonic clock.
            waiting: episodes for which no worker has capacity.
            capacity: of one worker, in episodes.
            workers: number that can play.
            asked: number that were requested and have not started.
        """
        if not waiting:
            self._since = None
            return 0
        if self._since is None:
            self._since = now
        if now - self._since < GROW_AFTER_S:
            return 0
        wanted = math.ceil(waiting / capacity) - asked
        return max(0, min(wanted, self._most - workers - asked))


class Supervisor:
    """Supervises env workers. The fixed ones begin to start at once.

    Args:
        config: `cluster` gives their number, `env.deadline_s` how long one may not answer.
        start: starts a worker's actor.
        events: is called as workers start, report and die.

    Attributes:
        restarts: workers replaced so far.
    """

    def __init__(self, config: Config, start: Callable[[], Any], events: WorkerEvents) -> None:
        self._config, self._start, self._events = config, start, events
        self._growth = Growth(config.cluster.most_env_workers)
        self._workers: dict[int, WorkerProcess] = {}  # by slot, the fixed ones first
        self._tasks: dict[int, asyncio.Task[None]] = {}  # one per slot
        self._slots = itertools.count()
        self._failed_starts = 0  # of elastic workers, in a row
        self._warned_late = False
        self.restarts = 0
        for _ in range(config.cluster.env_workers):
            self._start_process(next(self._slots))

    async def ready(self) -> None:
        """Wait until the fixed workers can play, then watch them.

        Raises:
            ConfigError: a setting the workers cannot work with.
            InfraError, RunFailed: one of them does not start.
        """
        fixed = list(self._workers)
        await asyncio.gather(*map(self._until_ready, fixed))
        for slot in fixed:
            self._spawn(slot, self._run_fixed(slot))

    def worker(self, slot: int) -> WorkerProcess | None:
        """The process that is in a slot now; None after the slot was removed."""
        return self._workers.get(slot)

    def count(self) -> tuple[int, int]:
        """Workers that can play, and those that have not started yet."""
        started = sum(worker.capacity > 0 for worker in self._workers.values())
        return started, len(self._workers) - started

    def scale(self, now: float, waiting: int, busy: Collection[int]) -> None:
        """Start elastic workers that are needed, and stop those that were idle for long enough.

        Args:
            now: seconds, by `time.monotonic`.
            waiting: episodes for which no worker has capacity.
            busy: slots of workers that have something to play.
        """
        cluster = self._config.cluster
        capacity = max(self._workers[slot].capacity for slot in range(cluster.env_workers))
        if capacity and self._failed_starts < START_ATTEMPTS:
            workers, asked = self.count()
            more = self._growth.more(
                now, waiting=waiting, capacity=capacity, workers=workers, asked=asked
            )
            for slot in itertools.islice(self._slots, more):
                self._start_process(slot)
                self._spawn(slot, self._run_elastic(slot))
        for slot, worker in list(self._workers.items()):
            if slot < cluster.env_workers:
                continue
            if slot in busy or (waiting and not worker.capacity):
                worker.busy_at = now
            elif now - worker.busy_at >= cluster.env_worker_idle_s:
                self._remove(slot)

    def close(self) -> None:
        """End the workers."""
        for task in self._tasks.values():
            task.cancel()
        for worker in self._workers.values():
            worker.kill()

    def _start_process(self, slot: int) -> None:
        patience_s = self._config.env.deadline_s + GRACE_S
        on_blocked = partial(self._events.on_blocked, slot)
        self._workers[slot] = WorkerProcess(self._start(), patience_s, on_blocked)

    def _spawn(self, slot: int, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self._tasks[slot] = asyncio.create_task(coroutine)
        task.add_done_callback(on_failure(self._events.on_error))

    async def _run_fixed(self, slot: int) -> None:
        while True:
            try:
                await self._follow(slot)
            except WorkerGone as gone:
                self.restarts += 1
                self._workers[slot].kill()
                self._events.on_lost(slot, str(gone))
                self._start_process(slot)
                await self._until_ready(slot)

    async def _until_ready(self, slot: int) -> None:
        """Wait for a fixed worker; one that dies meanwhile is replaced.

        Ray may put it on a node whose loss it has not noticed yet.
        """
        for attempt in range(START_ATTEMPTS):
            try:
                async with asyncio.timeout(START_DEADLINE_S):
                    await self._workers[slot].start()
                return
            except TimeoutError:
                needs = resources(self._config.cluster)
                what = f"an env worker did not start within {START_DEADLINE_S:g} s. {needs}"
                raise InfraError(what) from None
            except WorkerGone as gone:
                if attempt + 1 == START_ATTEMPTS:
                    raise RunFailed(f"an env worker cannot start: {gone}") from gone
                self._workers[slot].kill()
                self._start_process(slot)

    async def _run_elastic(self, slot: int) -> None:
        late = asyncio.get_running_loop().call_later(LATE_S, self._warn_late)
        try:
            await self._workers[slot].start()
        except (WorkerGone, RayrlError) as error:
            self._failed_starts += 1
            _log.warning("another env worker could not start, play goes on without it: %s", error)
            self._remove(slot)
            return
        finally:
            late.cancel()
        self._failed_starts = 0
        try:
            await self._follow(slot)
        except WorkerGone as gone:
            self._events.on_lost(slot, str(gone))
            self._remove(slot)

    async def _follow(self, slot: int) -> None:
        """Pass on what a worker reports, until it is gone."""
        worker, elastic = self._workers[slot], slot >= self._config.cluster.env_workers
        self._events.on_ready(slot, worker.capacity, elastic=elastic)
        async for report in worker.reports():
            self._events.on_report(slot, report)

    def _remove(self, slot: int) -> None:
        self._workers.pop(slot).kill()
        self._events.on_removed(slot)
        task = self._tasks.pop(slot)
        if task is not asyncio.current_task():
            task.cancel()

    def _warn_late(self) -> None:
        if self._warned_late:
            return
        self._warned_late = True
        _log.warning(
            "cluster.env_workers_max=%d: an env worker requested %g s ago has not started; "
            "rollouts go on with %d. %s",
            self._config.cluster.env_workers_max,
            LATE_S,
            self.count()[0],
            resources(self._config.cluster),
        )


def resources(cluster: ClusterConfig) -> str:
    """What a worker reserves and what the cluster has, for a message about one that waits."""
    there, free = ray.cluster_resources(), ray.available_resources()
    own = f" and {dict(cluster.env_worker_resources)}" if cluster.env_worker_resources else ""
    return (
        f"Each reserves cluster.env_worker_cpus={cluster.env_worker_cpus:g}{own}; the cluster has "
        f"{there.get('CPU', 0):g} CPUs ({free.get('CPU', 0):g} free). Give the cluster more "
        "nodes, or ask for fewer workers."
    )
