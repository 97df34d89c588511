from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from rayrl.bar import Bar
from rayrl.cluster.rollouts import Collection
from rayrl.episodes import read_episodes
from rayrl.errors import RunFailed
from rayrl.journal import Journal, Play
from rayrl.rollout import GroupPlan
from rayrl.types import Episode, Failure, Group, Task, Turn, Usage, user

SEATS = {"agent": "endpoint"}
COST = Usage(1, 0, 50, 10)


def plans(cell: str) -> list[GroupPlan]:
    return [GroupPlan(f"{cell}-{k}", Task(), 1, k) for k in range(2)]


def played(plan: GroupPlan, failure: Failure | None = None) -> Group:
    turns = (Turn("agent", (user("go"),), "no", "stop", usage=COST),)
    one = Episode(f"{plan.id}/0", "game", plan.task, 0, turns, failure=failure)
    return Group(plan.id, plan.task, (one,))


class Unlucky:
    """Rollouts whose server breaks every episode once; notes what was begun."""

    def __init__(self) -> None:
        self.begun: list[str] = []

    async def collect(
        self,
        plans: Sequence[GroupPlan],
        on_group: Callable[[Group], None],
        known: Mapping[str, Group],
    ) -> Collection:
        self.begun += [plan.id for plan in plans if plan.id not in known]
        for failure in (Failure("infra", "HTTP 503"), None):
            for plan in plans:
                if plan.id not in known:
                    on_group(played(plan, failure))
        return Collection(tuple(known.get(plan.id) or played(plan) for plan in plans))

    def wind_down(self) -> None:
        """It plays to the end what is begun."""


async def test_a_sealed_cell_remembers_what_broken_episodes_cost(tmp_path: Path) -> None:
    files = {cell: tmp_path / f"{cell}.jsonl" for cell in "ab"}
    first = {cell: Journal(file, plans(cell), SEATS) for cell, file in files.items()}
    with Bar("x", 4) as bar:
        done = await Play([*first.values()], bar).collect(Unlucky(), first["a"])  # type: ignore[arg-type]
    first["a"].seal(done.groups)  # and here it is killed
    assert first["a"].usage == Usage(4, 0, 200, 40)
    assert [e.wasted for e in read_episodes(files["a"])] == [COST, COST]
    again = {cell: Journal(file, plans(cell), SEATS) for cell, file in files.items()}
    assert again["a"].usage == first["a"].usage
    with Bar("x", 4) as bar:
        assert Play([*again.values()], bar).spent == 240
    again["a"].seal([*again["a"].known.values()])
    assert [e.wasted for e in read_episodes(files["a"])] == [COST, COST]  # not twice


async def test_a_spent_budget_begins_no_other_cell() -> None:
    a, b = (Journal(None, plans(cell), SEATS) for cell in "ab")
    rollouts = Unlucky()
    with Bar("x", 4) as bar:
        play = Play([a, b], bar, 240)
        await play.collect(rollouts, a)  # type: ignore[arg-type]  # its last episode spends it
        with pytest.raises(RunFailed, match="240 tokens for 2 of 4 episodes"):
            await play.collect(rollouts, b)  # type: ignore[arg-type]
    assert rollouts.begun == ["a-0", "a-1"]
