"""The driver's pool of env workers.

`Supervisor` (supervisor.py) knows processes and no groups, `Scheduler` (scheduler.py) groups and no
processes. The pool tells the scheduler what the supervisor reports, and has the workers begin what
the scheduler assigns, each episode from the turns that were recorded of it (turn_log.py).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from rayrl.cluster.actors import on_failure
from rayrl.cluster.workers.env_worker import Running, WorkerJob, WorkerReport, trainable_seats
from rayrl.cluster.workers.scheduler import PendingGroup, RolloutRequest, Scheduler
from rayrl.cluster.workers.supervisor import BLOCKED_S, GRACE_S, Supervisor
from rayrl.cluster.workers.turn_log import RecordedTurns
from rayrl.config import EnvConfig
from rayrl.config.mix import env_label
from rayrl.errors import safe_repr
from rayrl.rollout.rollout import GroupPlan
from rayrl.types import Group

__all__ = ["Load", "WorkerPool"]

SCALE_EVERY_S = 1.0
BLOCKED_WARNINGS = 8  # the most per pool; where all tasks block, that is enough

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Load:
    """What the workers have to do.

    Attributes:
        workers: number of workers that can play.
        asked: number of workers that were requested and have not started yet.
        waiting: the most groups that waited for capacity at once since the last `Load`.
    """

    workers: int
    asked: int
    waiting: int


class WorkerPool:
    """Plays groups on a number of workers.

    Args:
        job: what the workers play.
        start: starts a worker's actor.
        recorder: the actor that keeps the turns of live episodes.
    """

    def __init__(self, job: WorkerJob, start: Callable[[], Any], recorder: Any) -> None:
        self._job = job
        self._turns = RecordedTurns(recorder)
        self._env = env_label(job.config)
        self._scheduler = Scheduler(
            {name: (name or self._env, trainable_seats(o.seats)) for name, o in job.envs.items()}
        )
        self._supervisor = Supervisor(job.config, start, self)
        self._version = 0
        self._warned_blocked: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._error: BaseException | None = None

    @property
    def restarts(self) -> int:
        """Workers replaced so far."""
        return self._supervisor.restarts

    async def ready(self) -> None:
        """Wait until the fixed workers can play.

        Raises:
            ConfigError: a setting the workers cannot work with.
            InfraError, RunFailed: one of them does not start.
        """
        await self._turns.open()
        await self._supervisor.ready()
        cluster = self._job.config.cluster
        if cluster.most_env_workers > cluster.env_workers:
            self._spawn(self._scale())

    async def play(
        self,
        plans: Sequence[GroupPlan],
        min_version: int,
        on_group: Callable[[Group], None],
        on_retry: Callable[[Group], None],
    ) -> None:
        """Play groups; calls may overlap, and earlier ones are served first.

        Args:
            min_version: no token may come from older weights.
            on_group: called with each group when it has ended for good.
            on_retry: called with each group that has ended but is to be played once more; after
                `wind_down` it may be left at that.

        Raises:
            Exception: of `on_group` or `on_retry`, or the one that ended the pool.
        """
        if self._error is not None:
            raise self._error
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def end(error: BaseException | None) -> None:
            if done.done():  # the caller was cancelled
                return
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)

        self._version = max(self._version, min_version)
        request = RolloutRequest(plans, on_group, on_retry, end)
        self._scheduler.submit(request)
        self._assign()
        try:
            await done
        finally:
            self._scheduler.withdraw(request)

    def cancel(self, plans: Sequence[str], oldest: int) -> None:
        """Cancel those of these plans, by id, that began with weights older than `oldest`."""
        if not plans:
            return
        ids = ray.put(list(plans))  # once, not for every worker
        for slot in self._scheduler.busy:
            if (worker := self._supervisor.worker(slot)) is not None:
                worker.cancel(ids, oldest)

    def discard_turns(self, groups: Sequence[str]) -> None:
        """Drop what was recorded of these groups, by id: they will not be resumed."""
        self._turns.discard(groups)

    def wind_down(self) -> None:
        """Begin no more groups until `wind_up`: calls of `play` end with those that have begun."""
        self._scheduler.wind_down()
        for slot in self._scheduler.busy:
            self._spawn(self._give_back(slot))

    def wind_up(self) -> None:
        """Begin groups again."""
        self._scheduler.wind_up()

    def load(self) -> Load:
        """What the workers had to do since the last call."""
        workers, asked = self._supervisor.count()
        return Load(workers, asked, self._scheduler.take_most_waiting())

    def close(self) -> None:
        """End the workers."""
        for task in self._tasks:
            task.cancel()
        self._supervisor.close()

    # --- what the supervisor calls -------------------------------------------------------------

    def on_ready(self, slot: int, capacity: int, *, elastic: bool) -> None:
        """Give a worker that has started what waits."""
        self._scheduler.add_worker(slot, capacity, elastic=elastic)
        self._assign()

    def on_report(self, slot: int, report: WorkerReport) -> None:
        """Deliver the groups that ended on a worker, and give it others."""
        self._scheduler.finish(slot, report.episodes, report.groups)
        self._assign()

    def on_blocked(self, slot: int, running: Running | None) -> None:
        """Warn of the code that blocks a worker, once per episode."""
        if running is not None and not running.stack:  # it runs nothing: the machine is slow
            return
        what = self._describe(slot, running)
        if what in self._warned_blocked or len(self._warned_blocked) >= BLOCKED_WARNINGS:
            return
        self._warned_blocked.add(what)
        _log.warning("%s", blocked_warning(self._env, self._job.config.env, what, running))

    def on_lost(self, slot: int, reason: str) -> None:
        """Have what a dead worker had played again."""
        n = len(self._scheduler.groups_on(slot))
        what = "an env worker of environment %r was lost with %d groups that had not ended: %s"
        _log.warning(what, self._env, n, reason)
        self._scheduler.lose_worker(slot, reason)
        self._assign()

    def on_removed(self, slot: int) -> None:
        """Leave to others what an elastic worker had to play again."""
        self._scheduler.remove_worker(slot)
        self._assign()

    def on_error(self, error: BaseException) -> None:
        """End all calls of `play`: an error of the program, or a worker that cannot start."""
        self._error = error
        self._scheduler.fail(error)

    # -------------------------------------------------------------------------------------------

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(on_failure(self.on_error))

    def _assign(self) -> None:
        for slot, groups in self._scheduler.assign().items():
            self._spawn(self._begin(slot, groups))

    async def _begin(self, slot: int, groups: Sequence[PendingGroup]) -> None:
        worker = self._supervisor.worker(slot)
        ids = [group.plan.id for group in groups]
        recorded = await self._turns.find(
            [group.plan.id for group in groups if group.resumes], ids, self._version
        )
        if worker is None or self._supervisor.worker(slot) is not worker:  # it died meanwhile
            return
        if self._scheduler.winding_down:
            self._scheduler.give_back(slot, ids)
            return
        workers, _ = self._supervisor.count()
        plans = [group.plan for group in groups]
        await worker.begin(plans, self._version, recorded, workers)

    async def _give_back(self, slot: int) -> None:
        if (worker := self._supervisor.worker(slot)) is not None:
            self._scheduler.give_back(slot, await worker.give_back())
            self._assign()

    async def _scale(self) -> None:
        while True:
            await asyncio.sleep(SCALE_EVERY_S)
            scheduler = self._scheduler
            self._supervisor.scale(time.monotonic(), scheduler.waiting_episodes, scheduler.busy)

    def _describe(self, slot: int, running: Running | None) -> str:
        """Which of a worker's episodes blocks it, as far as that is known."""
        groups = self._scheduler.groups_on(slot)
        episode = running.episode if running else ""
        if (group := groups.get(episode.rpartition("/")[0])) is not None:
            return f"episode {episode} on task {safe_repr(group.plan.task)}"
        tasks = "; ".join(safe_repr(group.plan.task, 200) for group in list(groups.values())[:3])
        return f"one of {len(groups)} groups (the first tasks are {tasks})"


def blocked_warning(name: str, env: EnvConfig, what: str, running: Running | None) -> str:
    """The warning about a blocked worker of the environment; `what` says which episode it is."""
    remedy = (
        "Await what waits, and bound what computes; or let env.isolated=true play each episode in "
        "a process of its own, which is killed at its deadline."
    )
    if env.isolated:
        remedy = "Its machine may have too much to do (cluster.concurrency, cluster.env_workers)."
    stack = f"\n{running.stack.rstrip()}" if running else ""
    return (
        f"environment {name!r} has blocked the event loop of an env worker for "
        f"{BLOCKED_S:g} s, in {what}. Nothing else runs there, and after "
        f"{env.deadline_s + GRACE_S:g} s the worker is replaced. {remedy}{stack}"
    )
