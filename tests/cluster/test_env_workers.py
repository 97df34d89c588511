"""The number of env workers follows the work: by hand first, then on a real local Ray."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

import rayrl
from rayrl.cluster.open import make_environment, open_rollouts
from rayrl.cluster.rollouts import Rollouts
from rayrl.cluster.session import Session
from rayrl.cluster.workers.env_worker import EnvWorker, PlayedEnv, WorkerJob
from rayrl.cluster.workers.supervisor import GROW_AFTER_S, Growth
from rayrl.config import Config, from_dict
from rayrl.rollout.rollout import GroupPlan
from rayrl.types import Episode, Group, Sampling, Task

HERE = Path(__file__).parents[1]


def test_more_are_requested_once_groups_have_waited_for_a_while() -> None:
    growth = Growth(most=5)

    def more(at: float, waiting: int, workers: int = 1, asked: int = 0) -> int:
        return growth.more(at, waiting=waiting, capacity=10, workers=workers, asked=asked)

    assert more(0, 25) == 0, "just now"
    assert more(GROW_AFTER_S - 1, 25) == 0
    assert more(GROW_AFTER_S - 0.5, 0) == 0, "a pause: the clock begins anew"
    assert more(10, 25) == 0
    assert more(10 + GROW_AFTER_S, 25) == 3, "three workers have capacity for 25 episodes"
    assert more(16, 25, asked=3) == 0, "they are on their way"
    assert more(17, 35, asked=3) == 1
    assert more(18, 99, asked=4) == 0, "five in all"
    assert more(19, 99, workers=3, asked=1) == 1
    assert more(20, 1, workers=5) == 0


@pytest.mark.parametrize(
    ("slots", "workers", "concurrency", "isolated", "share"),
    [
        (None, 2, 100, False, 100),
        (9, 1, 100, False, 9),
        (9, 4, 100, False, 2),
        (3, 4, 100, False, 1),
        (90, 4, 8, False, 8),
        (None, 1, 100, True, 16),
        (12, 4, 100, True, 3),
    ],
)
async def test_env_workers_share_what_an_environment_can_play_at_once(
    slots: int | None, workers: int, concurrency: int, isolated: bool, share: int
) -> None:
    @rayrl.env(tasks=[Task(seed=1)], rewards={"x": 1.0}, slots=slots)
    async def asked(task: Task, agent: Any) -> dict[str, float]:
        return {"x": float(len(await agent("?")))}

    asked.player("x")(lambda messages, rng: "x")
    settings = from_dict(
        {
            "env": {"isolated": isolated},
            "cluster": {"env_workers": workers, "concurrency": concurrency},
        }
    )
    played = PlayedEnv(asked.spec, {"agent": "player:x"}, Sampling())
    assert await EnvWorker(WorkerJob({"": played}, settings)).ping() == share


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes seconds takes less."""
    monkeypatch.setattr("rayrl.cluster.workers.supervisor.GROW_AFTER_S", 0.2)
    monkeypatch.setattr("rayrl.cluster.workers.worker_pool.SCALE_EVERY_S", 0.1)


def config(tiny: Path, gate: Path, **cluster: Any) -> Config:
    return from_dict(
        {
            "env": {"name": f"{HERE / 'cluster_envs.py'}:waits", "args": {"gate": str(gate)}},
            "model": {"path": str(tiny)},
            "engine": {"max_len": 256},
            "sampling": {"max_tokens": 8},
            "cluster": {"concurrency": 2, **cluster},
        }
    )


def plans(config: Config) -> list[GroupPlan]:
    """Eight groups of two episodes."""
    tasks = make_environment(config).tasks(0, 8)
    return [GroupPlan(f"g{k}", task, 2, seed=k) for k, task in enumerate(tasks)]


async def until(fact: Callable[[], bool]) -> None:
    end = time.monotonic() + 900
    while not fact():
        assert time.monotonic() < end, "waited in vain"
        await asyncio.sleep(0.02)


def workers(rollouts: Rollouts) -> int:
    return rollouts.load().workers


def processes(groups: tuple[Group, ...]) -> set[int]:
    return {int(e.scores["agent"]["process"]) for group in groups for e in group.episodes}


def played(groups: tuple[Group, ...]) -> list[Episode]:
    """Without what differs by where and when."""
    episodes = [e for group in groups for e in group.episodes]
    return [
        replace(e, scores={"agent": {"letters": e.scores["agent"]["letters"]}}, replayed=0)
        for e in episodes
    ]


@pytest.mark.usefixtures("soon")
async def test_they_start_when_groups_wait_and_stop_when_idle(
    session: Session, tiny: Path, tmp_path: Path
) -> None:
    gate = tmp_path / "open"
    settings = config(tiny, gate, env_workers_max=3, env_worker_idle_s=1.0)
    async with open_rollouts(settings) as rollouts:
        playing = asyncio.ensure_future(rollouts.collect(plans(settings)))
        await until(lambda: workers(rollouts) == 3)
        assert rollouts.load().waiting == 5, "each worker plays a group"
        gate.touch()
        found = await playing
        assert len(found.groups) == 8
        all_three = processes(found.groups)
        assert len(all_three) == 3
        await until(lambda: workers(rollouts) == 1)
        await until(lambda: sum(map(psutil.pid_exists, all_three)) == 1)
        again = await rollouts.collect(plans(settings)[:1])
        assert processes(again.groups) < all_three
    fixed = config(tiny, gate)
    async with open_rollouts(fixed) as rollouts:
        alone = await rollouts.collect(plans(fixed))
    assert played(alone.groups) == played(found.groups)


@pytest.mark.usefixtures("soon")
async def test_one_that_is_lost_again_leaves_its_episodes_to_the_others(
    session: Session, tiny: Path, tmp_path: Path
) -> None:
    gate = tmp_path / "open"
    settings = config(tiny, gate, env_workers_max=2)
    async with open_rollouts(settings) as rollouts:
        playing = asyncio.ensure_future(rollouts.collect(plans(settings)))
        scheduler, supervisor = rollouts._pool._scheduler, rollouts._pool._supervisor
        await until(lambda: bool(scheduler.groups_on(1)))
        lost, elastic = set(scheduler.groups_on(1)), supervisor.worker(1)
        assert elastic is not None
        elastic.kill()
        await until(lambda: supervisor.worker(1) is None)
        gate.touch()
        found = await playing
        assert [group.id for group in found.groups] == [f"g{k}" for k in range(8)]
        assert rollouts.restarts == 0
    assert lost
    fixed = config(tiny, gate)
    async with open_rollouts(fixed) as rollouts:
        alone = await rollouts.collect(plans(fixed))
    assert played(alone.groups) == played(found.groups)


@pytest.mark.usefixtures("soon")
async def test_one_that_cannot_be_scheduled_harms_nothing_and_is_said_once(
    session: Session,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    import ray

    monkeypatch.setattr("rayrl.cluster.workers.supervisor.LATE_S", 0.3)
    gate = tmp_path / "open"
    cpus = ray.cluster_resources()["CPU"]
    settings = config(tiny, gate, env_workers_max=3, env_worker_cpus=cpus, env_worker_idle_s=0.5)
    async with open_rollouts(settings, seats={"": {"agent": "player:parrot"}}) as rollouts:
        playing = asyncio.ensure_future(rollouts.collect(plans(settings)))
        await until(lambda: rollouts.load().asked == 2)
        await until(lambda: bool(caplog.messages))
        gate.touch()
        found = await playing
        assert len(found.groups) == 8
        assert len(processes(found.groups)) == 1
        await until(lambda: rollouts.load().asked == 0)
        gate.unlink()
        playing = asyncio.ensure_future(rollouts.collect(plans(settings)))
        await until(lambda: rollouts.load().asked == 2)
        await asyncio.sleep(0.5)
        gate.touch()
        await playing
    (said,) = caplog.messages
    for part in (
        "cluster.env_workers_max=3",
        "go on with 1",
        f"env_worker_cpus={cpus:g}",
        "0 free",
    ):
        assert part in said
