"""What rollouts do with the groups that a pool plays; the pool is played by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from rayrl.cluster import rollouts as module
from rayrl.cluster.rollouts import DISCARD_AT, Rollouts
from rayrl.cluster.workers.env_worker import PlayedEnv, WorkerJob
from rayrl.config import Config
from rayrl.environment.environment import EnvSpec
from rayrl.rollout.rollout import GroupPlan
from rayrl.types import Episode, Failure, Group, Sampling, Task

Callback = Callable[[Group], None]


def plans(n: int) -> list[GroupPlan]:
    return [GroupPlan(f"g{k}", Task(seed=k), 1, 0) for k in range(n)]


def played(plan: GroupPlan, kind: str = "") -> Group:
    failure = Failure(kind, "HTTP 503") if kind else None
    return Group(
        plan.id, plan.task, (Episode(f"{plan.id}/0", "x", plan.task, 0, (), failure=failure),)
    )


class Pool:
    """Plays as the function `script` says, and notes what happens."""

    def __init__(self) -> None:
        self.script: Callable[[Sequence[GroupPlan], Callback, Callback], None]
        self.happened: list[Any] = []

    async def play(
        self,
        plans: Sequence[GroupPlan],
        min_version: int,
        on_group: Callback,
        on_retry: Callback,
    ) -> None:
        self.script(plans, on_group, on_retry)

    def discard_turns(self, groups: Sequence[str]) -> None:
        self.happened.append(list(groups))

    def wind_up(self) -> None:
        """It never winds down."""


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Pool:
    one = Pool()
    monkeypatch.setattr(module, "WorkerPool", lambda *_: one)
    monkeypatch.setattr(module, "start_recorder", lambda _: None)
    return one


def rollouts() -> Rollouts:
    return Rollouts(
        WorkerJob({"": PlayedEnv(EnvSpec("x", {}, {}), {"agent": "policy"}, Sampling())}, Config())
    )


async def test_turns_are_discarded_in_batches_once_the_caller_has_their_groups(pool: Pool) -> None:
    def script(plans: Sequence[GroupPlan], on_group: Callback, on_retry: Callback) -> None:
        on_retry(played(plans[0], "infra"))
        for plan in plans[:0:-1]:
            on_group(played(plan))
        on_group(played(plans[0]))

    pool.script = script
    some = plans(DISCARD_AT + 2)
    await rollouts().play(some, 0, lambda group: pool.happened.append(group.id))
    ids = [plan.id for plan in some[::-1]]
    cut = DISCARD_AT
    assert pool.happened == [*ids[:cut], ids[:cut], *ids[cut:], ids[cut:]]


async def test_turns_of_what_has_not_ended_stay_when_the_pool_fails(pool: Pool) -> None:
    def script(plans: Sequence[GroupPlan], on_group: Callback, on_retry: Callback) -> None:
        on_group(played(plans[0]))
        on_retry(played(plans[1], "infra"))
        raise OSError("disk full")

    pool.script = script
    with pytest.raises(OSError, match="disk full"):
        await rollouts().play(plans(3), 0, lambda _: None)
    assert pool.happened == [["g0"]]


async def test_a_group_whose_retry_was_skipped_counts_as_it_is(pool: Pool) -> None:
    def script(plans: Sequence[GroupPlan], on_group: Callback, on_retry: Callback) -> None:
        on_retry(played(plans[1], "infra"))
        on_group(played(plans[0]))

    pool.script = script
    seen: list[str] = []
    found = await rollouts().collect(plans(3), on_group=lambda group: seen.append(group.id))
    assert seen == ["g1", "g0"]
    assert ([g.id for g in found.groups], [g.id for g in found.dropped]) == (["g0"], ["g1"])
    assert found.infra_failures == 1
    (discarded,) = pool.happened
    assert sorted(discarded) == ["g0", "g1", "g2"], "nobody will resume them"


async def test_a_retry_replaces_the_broken_group_and_the_caller_sees_both(pool: Pool) -> None:
    def script(plans: Sequence[GroupPlan], on_group: Callback, on_retry: Callback) -> None:
        on_retry(played(plans[0], "infra"))
        on_group(played(plans[0]))

    pool.script = script
    seen: list[bool] = []
    found = await rollouts().collect(plans(1), on_group=lambda group: seen.append(group.complete))
    assert seen == [False, True]
    assert ([g.id for g in found.groups], found.dropped) == (["g0"], ())
