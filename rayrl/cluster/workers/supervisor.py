"""Keeps env workers running: starts, watches and replaces them, and scales their number.

`cluster.env_workers` of them are fixed: one that dies or hangs is replaced in its slot, and the run
stops if it cannot be. Others, up to `cluster.env_workers_max`, are elastic: they are started when
groups wait for capacity (`scaling.py`) and stopped when they are idle; one that dies or cannot
start is not replaced. What workers play is not known here: a slot is a number.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Collection, Coroutine
from functools import partial
from typing import Any, Protocol

import ray

from rayrl.cluster.workers.env_worker import Running, WorkerReport
from rayrl.cluster.workers.scaling import Growth
from rayrl.cluster.workers.worker_process import WorkerGone, WorkerProcess
from rayrl.config import ClusterConfig, Config
from rayrl.errors import InfraError, RayrlError, RunFailed

__all__ = ["GRACE_S", "Supervisor", "WorkerEvents"]

GRACE_S = 5.0  # without an answer, beyond env.deadline_s, after which a worker counts as hung
START_DEADLINE_S = 300.0
START_ATTEMPTS = 3
LATE_S = 300.0  # after which a warning says that an elastic worker has not started

_log = logging.getLogger(__name__)


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
        task.add_done_callback(self._on_done)

    def _on_done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._events.on_error(error)

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
