"""Workers that start, die and come back: the supervisor by hand, its actors plain objects."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from ray.exceptions import RayActorError

from rayrl.cluster.workers import supervisor
from rayrl.cluster.workers.env_worker import Running, WorkerReport
from rayrl.cluster.workers.supervisor import START_ATTEMPTS, Supervisor
from rayrl.config import from_dict
from rayrl.errors import ConfigError, RunFailed


class Method:
    """A method of an actor; `remote` gives a coroutine in place of a reference."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.remote = call


class Actor:
    """A worker with a capacity of 4, which reports what the test puts, and dies when told to.

    Args:
        fails: what its pings raise.

    Attributes:
        blocked: whether its event loop is.
    """

    def __init__(self, fails: Exception | None = None) -> None:
        self.fails = fails
        self.reports: asyncio.Queue[WorkerReport | Exception] = asyncio.Queue()
        self.blocked = False
        self.ping, self.report = Method(self._ping), Method(self._report)
        self.running = Method(self._running)

    async def _ping(self) -> int:
        if self.fails is not None:
            raise self.fails
        if self.blocked:
            await asyncio.Event().wait()
        return 4

    async def _running(self) -> Running:
        return Running("g/0", "File")

    async def _report(self) -> WorkerReport:
        report = await self.reports.get()
        if isinstance(report, Exception):
            raise report
        return report

    def die(self) -> None:
        self.reports.put_nowait(RayActorError())


class Events:
    """Notes what a supervisor calls."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def on_ready(self, slot: int, capacity: int, *, elastic: bool) -> None:
        self.seen.append(("elastic" if elastic else "fixed", slot, capacity))

    def on_report(self, slot: int, report: WorkerReport) -> None:
        self.seen.append(("report", slot, report.episodes))

    def on_blocked(self, slot: int, running: Running | None) -> None:
        self.seen.append(("blocked", slot))

    def on_lost(self, slot: int, reason: str) -> None:
        self.seen.append(("lost", slot))

    def on_removed(self, slot: int) -> None:
        self.seen.append(("removed", slot))

    def on_error(self, error: BaseException) -> None:
        self.seen.append(("error", type(error)))

    def take(self) -> list[tuple[Any, ...]]:
        seen, self.seen = self.seen, []
        return seen


class Pool:
    """A supervisor with the actors it has started; those to come fail with `fails`."""

    def __init__(self, env: Any = None, **cluster: Any) -> None:
        self.actors: list[Actor] = []
        self.fails: Exception | None = None
        self.events = Events()
        config = from_dict({"cluster": cluster, "env": env or {}})
        self.supervisor = Supervisor(config, self._start, self.events)

    def _start(self) -> Actor:
        self.actors.append(Actor(self.fails))
        return self.actors[-1]

    async def settled(self) -> list[tuple[Any, ...]]:
        """What was called, once nothing happens any more."""
        for _ in range(50):
            await asyncio.sleep(0)
        return self.events.take()


@pytest.fixture(autouse=True)
def killed(monkeypatch: pytest.MonkeyPatch) -> list[Actor]:
    """The actors that were killed."""
    found: list[Actor] = []
    monkeypatch.setattr(supervisor, "kill_actor", found.append)
    return found


async def test_a_fixed_worker_that_dies_is_replaced_in_its_slot(killed: list[Actor]) -> None:
    pool = Pool(env_workers=2)
    assert len(pool.actors) == 2, "they begin to start at once"
    await pool.supervisor.ready()
    assert await pool.settled() == [("fixed", 0, 4), ("fixed", 1, 4)]
    first, second = pool.actors
    first.reports.put_nowait(WorkerReport(3, ()))
    second.die()
    assert await pool.settled() == [("report", 0, 3), ("lost", 1), ("fixed", 1, 4)]
    assert (killed, pool.supervisor.restarts, len(pool.actors)) == ([second], 1, 3)
    pool.actors[2].reports.put_nowait(WorkerReport(1, ()))
    assert await pool.settled() == [("report", 1, 1)]
    pool.supervisor.close()
    assert killed == [second, first, pool.actors[2]]


async def test_a_fixed_worker_that_cannot_start_ends_the_run_after_some_attempts() -> None:
    pool = Pool()
    await pool.supervisor.ready()
    await pool.settled()
    pool.fails = RayActorError()
    pool.actors[0].die()
    assert await pool.settled() == [("lost", 0), ("error", RunFailed)]
    assert len(pool.actors) == 1 + START_ATTEMPTS
    pool.supervisor.close()


async def test_a_programs_error_is_passed_on_and_nothing_is_restarted() -> None:
    pool = Pool()
    await pool.supervisor.ready()
    await pool.settled()
    pool.actors[0].reports.put_nowait(ZeroDivisionError())
    assert await pool.settled() == [("error", ZeroDivisionError)]
    assert len(pool.actors) == 1
    pool.supervisor.close()


async def test_elastic_workers_start_when_episodes_wait_and_stop_when_idle(
    killed: list[Actor],
) -> None:
    pool = Pool(env_workers_max=3, env_worker_idle_s=10.0)
    await pool.supervisor.ready()
    await pool.settled()
    now = pool.supervisor.worker(0).busy_at  # type: ignore[union-attr]
    pool.supervisor.scale(now, waiting=5, busy={0})
    assert pool.supervisor.count() == (1, 0), "episodes have waited for no time yet"
    now += supervisor.GROW_AFTER_S
    pool.supervisor.scale(now, waiting=5, busy={0})
    assert pool.supervisor.count() == (1, 2), "two more have capacity for 5 episodes"
    assert await pool.settled() == [("elastic", 1, 4), ("elastic", 2, 4)]
    pool.supervisor.scale(now, waiting=0, busy={0, 1, 2})
    pool.supervisor.scale(now + 9, waiting=0, busy={0, 2})
    assert await pool.settled() == []
    pool.supervisor.scale(now + 11, waiting=0, busy=set())
    assert await pool.settled() == [("removed", 1)]
    assert (killed, pool.supervisor.worker(1)) == ([pool.actors[1]], None)
    pool.supervisor.scale(now + 20, waiting=0, busy=set())
    assert await pool.settled() == [("removed", 2)], "9 s later it was busy; the fixed one stays"
    assert pool.supervisor.count() == (1, 0)
    pool.supervisor.close()


async def test_an_elastic_worker_that_dies_is_not_replaced() -> None:
    pool = Pool(env_workers_max=2)
    await pool.supervisor.ready()
    pool.supervisor.scale(0.0, waiting=1, busy={0})
    pool.supervisor.scale(supervisor.GROW_AFTER_S, waiting=1, busy={0})
    await pool.settled()
    pool.actors[1].die()
    assert await pool.settled() == [("lost", 1), ("removed", 1)]
    assert (pool.supervisor.restarts, len(pool.actors)) == (0, 2)
    pool.supervisor.close()


async def test_elastic_workers_that_cannot_start_are_given_up(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pool = Pool(env_workers_max=2)
    await pool.supervisor.ready()
    await pool.settled()
    pool.fails = ConfigError("no such player")
    for k in range(START_ATTEMPTS + 2):
        pool.supervisor.scale(k * supervisor.GROW_AFTER_S, waiting=1, busy={0})
        await pool.settled()
    assert len(pool.actors) == 1 + START_ATTEMPTS
    assert caplog.text.count("play goes on without it: no such player") == START_ATTEMPTS
    pool.supervisor.close()


async def test_a_worker_that_does_not_answer_is_reported_and_then_replaced(
    monkeypatch: pytest.MonkeyPatch, killed: list[Actor]
) -> None:
    monkeypatch.setattr(supervisor, "GRACE_S", 0.2)
    monkeypatch.setattr(supervisor, "BLOCKED_S", 0.05)
    monkeypatch.setattr(supervisor, "PING_EVERY_S", 0.0)
    pool = Pool(env={"deadline_s": 0.1})
    await pool.supervisor.ready()
    assert await pool.settled() == [("fixed", 0, 4)]
    pool.actors[0].blocked = True
    while not killed:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert await pool.settled() == [("blocked", 0), ("lost", 0), ("fixed", 0, 4)]
    assert killed == [pool.actors[0]]
    pool.supervisor.close()
