"""Code that blocks its worker is named at once. Ray's actors are played by plain objects."""

from __future__ import annotations

import asyncio
import logging
import threading
from types import SimpleNamespace
from typing import Any

import pytest

import rayrl
from rayrl import Agent, GroupPlan, Scores, Task
from rayrl.cluster.workers import supervisor
from rayrl.cluster.workers.env_worker import PlayedEnv, Running, WorkerJob, running_in
from rayrl.cluster.workers.scheduler import RolloutRequest
from rayrl.cluster.workers.supervisor import WorkerProcess
from rayrl.cluster.workers.worker_pool import BLOCKED_WARNINGS, WorkerPool, blocked_warning
from rayrl.config import from_dict
from rayrl.environment.environment import EnvSpec
from rayrl.rollout.rollout import play_episode
from rayrl.types import Sampling
from tests.act import says


async def test_what_runs_in_an_event_loop_that_is_blocked() -> None:
    began, over = threading.Event(), threading.Event()

    @rayrl.env(tasks=[Task()], rewards={"win": 1.0})
    async def blocks(task: Task, agent: Agent) -> Scores:
        began.set()
        over.wait()
        return {"win": 1.0}

    found: dict[str, Any] = {}

    async def worker() -> None:
        found["loop"], found["thread"] = asyncio.get_running_loop(), threading.get_ident()
        await play_episode(blocks, Task(), says(), id="g7/3", attempt=2)

    thread = threading.Thread(target=asyncio.run, args=(worker(),))
    thread.start()
    assert await asyncio.to_thread(began.wait, 30)
    running = running_in(found["loop"], found["thread"])
    over.set()
    await asyncio.to_thread(thread.join)
    assert running.episode == "g7/3"
    assert "over.wait()" in running.stack
    assert "in blocks" in running.stack.splitlines()[0]  # nothing of ours before it


async def test_an_idle_loop_runs_nothing() -> None:
    ready, over = threading.Event(), threading.Event()
    found: dict[str, Any] = {}

    async def idle() -> None:
        found["loop"], found["thread"] = asyncio.get_running_loop(), threading.get_ident()
        ready.set()
        await asyncio.to_thread(over.wait)

    thread = threading.Thread(target=asyncio.run, args=(idle(),))
    thread.start()
    await asyncio.to_thread(ready.wait)
    while (running := running_in(found["loop"], found["thread"])).stack:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    over.set()
    await asyncio.to_thread(thread.join)
    assert running == Running()


class Actor:
    """A worker that does not answer `ping`; `running` is what it says it does, or an error."""

    def __init__(self, running: Running | Exception | None) -> None:
        self.ping = SimpleNamespace(remote=self._never)
        self.running = SimpleNamespace(remote=self._running)
        self._says = running

    async def _never(self) -> None:
        await asyncio.Event().wait()

    async def _running(self) -> Running:
        if isinstance(self._says, Running):
            return self._says
        if self._says is not None:
            raise self._says
        await asyncio.Event().wait()
        raise AssertionError


@pytest.mark.parametrize("says", [Running("g/0", "File"), None, TimeoutError()])
async def test_a_blocked_worker_is_reported_long_before_it_counts_as_hung(
    monkeypatch: pytest.MonkeyPatch, says: Any
) -> None:
    monkeypatch.setattr(supervisor, "BLOCKED_S", 0.01)
    reported: asyncio.Queue[Running | None] = asyncio.Queue()
    watch = asyncio.create_task(WorkerProcess(Actor(says), 3600.0, reported.put_nowait)._watch())
    assert await reported.get() == (says if isinstance(says, Running) else None)
    assert not watch.done()
    watch.cancel()


async def test_a_worker_that_hangs_is_given_up_with_the_reason() -> None:
    reason = await WorkerProcess(Actor(None), 0.01, lambda running: None)._watch()
    assert "blocked the event loop of its worker for more than 0.01 s" in reason


def test_the_warning_names_environment_and_task_and_a_remedy(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = from_dict({"env": {"name": "nim", "deadline_s": 60.0}})
    job = WorkerJob(
        {"": PlayedEnv(EnvSpec("nim", {}, {}), {"agent": "policy"}, Sampling())}, config
    )
    pool = WorkerPool(job, object, None)

    def submit(*plans: GroupPlan) -> None:
        ignore: Any = lambda _: None  # noqa: E731
        pool._scheduler.submit(RolloutRequest(plans, ignore, ignore, ignore))
        pool._scheduler.assign()

    pool._scheduler.add_worker(0, 1000)
    submit(*(GroupPlan(f"g{k}", Task(seed=k), 1, 0) for k in range(5)))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            pool.on_blocked(0, Running("g3/0", "nim.py:7: time.sleep(60)\n"))
        pool.on_blocked(0, Running())  # nothing runs there
        assert len(caplog.records) == 1  # once
        pool.on_blocked(0, None)
        for k in range(100):
            submit(GroupPlan(f"other{k}", Task(seed=k), 1, 0))
            pool.on_blocked(0, Running(f"other{k}/0", "x"))
    first, second = caplog.messages[:2]
    for part in ("'nim'", "episode g3/0", "Task(seed=3)", "65 s", "env.isolated=true", "nim.py:7"):
        assert part in first
    assert (
        "one of 5 groups (the first tasks are Task(seed=0); Task(seed=1); Task(seed=2))" in second
    )
    assert len(caplog.records) == BLOCKED_WARNINGS


def test_an_isolated_environment_is_not_told_to_be_isolated() -> None:
    env = from_dict({"env": {"isolated": True}}).env
    assert "env.isolated" not in blocked_warning("nim", env, "x", None)
