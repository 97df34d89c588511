"""An env worker's actor as the driver sees it: calls to it, and whether it is still alive."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayTaskError

from rayrl.cluster.gone import ACTOR_DIED
from rayrl.cluster.workers.env_worker import Running, WorkerReport
from rayrl.errors import RayrlError, RunFailed
from rayrl.rollout.resume import PartialEpisode
from rayrl.rollout.rollout import GroupPlan

__all__ = ["BLOCKED_S", "WorkerGone", "WorkerProcess", "kill_actor"]

PING_EVERY_S = 1.0
BLOCKED_S = 5.0  # without an answer to a ping, after which the worker is reported as blocked


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


def kill_actor(actor: Any) -> None:
    """End an actor, if it is there."""
    with suppress(Exception):  # it may be dead already
        ray.kill(actor)
