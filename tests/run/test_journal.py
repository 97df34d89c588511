from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from rayrl.cluster.rollouts import CollectedGroups
from rayrl.errors import DataError, RunFailed
from rayrl.rollout.episode_io import read_episodes
from rayrl.rollout.rollout import GroupPlan
from rayrl.run.journal import Journal, JournaledRollouts
from rayrl.run.progress_bar import ProgressBar
from rayrl.types import Episode, Failure, Group, Task, Turn, Usage, user

SEATS = {"": {"agent": "endpoint"}}
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
    ) -> CollectedGroups:
        self.begun += [plan.id for plan in plans if plan.id not in known]
        for failure in (Failure("infra", "HTTP 503"), None):
            for plan in plans:
                if plan.id not in known:
                    on_group(played(plan, failure))
        return CollectedGroups(tuple(known.get(plan.id) or played(plan) for plan in plans))

    def wind_down(self) -> None:
        """It plays to the end what is begun."""


async def test_a_finished_cell_remembers_what_failed_episodes_cost(tmp_path: Path) -> None:
    files = {cell: tmp_path / f"{cell}.jsonl" for cell in "ab"}
    first = {cell: Journal(file, plans(cell), SEATS) for cell, file in files.items()}
    with ProgressBar("x", 4) as bar:
        done = await JournaledRollouts([*first.values()], bar).collect(Unlucky(), first["a"])  # type: ignore[arg-type]
    first["a"].seal(done.groups)  # and here it is killed
    assert first["a"].usage == Usage(4, 0, 200, 40)
    assert [e.retried_usage for e in read_episodes(files["a"])] == [COST, COST]
    again = {cell: Journal(file, plans(cell), SEATS) for cell, file in files.items()}
    assert again["a"].usage == first["a"].usage
    with ProgressBar("x", 4) as bar:
        assert JournaledRollouts([*again.values()], bar).spent == 240
    again["a"].seal([*again["a"].known.values()])
    assert [e.retried_usage for e in read_episodes(files["a"])] == [COST, COST]  # not twice


async def test_a_spent_budget_begins_no_other_cell() -> None:
    a, b = (Journal(None, plans(cell), SEATS) for cell in "ab")
    rollouts = Unlucky()
    with ProgressBar("x", 4) as bar:
        play = JournaledRollouts([a, b], bar, 240)
        await play.collect(rollouts, a)  # type: ignore[arg-type]  # its last episode spends it
        with pytest.raises(RunFailed, match="240 tokens for 2 of 4 episodes"):
            await play.collect(rollouts, b)  # type: ignore[arg-type]
    assert rollouts.begun == ["a-0", "a-1"]


class Side(enum.StrEnum):
    LEFT = "left"


@dataclass(frozen=True, kw_only=True)
class Board(Task):
    side: Side = Side.LEFT
    marks: dict[int, str] = field(default_factory=lambda: {3: "x"})
    limit: float = math.nan
    type: str = "small"


def journal(file: Path) -> Journal:
    return Journal(file, [GroupPlan(f"b-{k}", Board(seed=k), 1, k) for k in range(3)], SEATS)


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A journal of three episodes."""
    one = journal(tmp_path / "played.jsonl")
    for plan in one.plans:
        one.add(played(plan))
    one.close()
    assert one.file is not None
    return one.file


def test_a_task_is_known_again_whatever_it_holds(kept: Path) -> None:
    assert [*journal(kept).known] == ["b-0", "b-1", "b-2"]


@pytest.mark.parametrize("tail", [b'{"id": "b-2/0", "en', bytes(4096), b"\xff\xfe"])
def test_a_torn_tail_is_cut_off(kept: Path, tail: bytes) -> None:
    whole = kept.read_bytes()
    kept.write_bytes(whole + tail)
    assert len(journal(kept).known) == 3
    assert kept.read_bytes() == whole


@pytest.mark.parametrize("line", [0, 1, 2])
def test_every_other_damage_names_file_and_line(kept: Path, line: int) -> None:
    lines = kept.read_bytes().splitlines(keepends=True)
    for at in range(0, len(lines[line]) - 1, 7):
        bad = bytearray(lines[line])
        bad[at] ^= 1
        kept.write_bytes(b"".join([*lines[:line], bytes(bad), *lines[line + 1 :]]))
        try:
            known = journal(kept).known
        except RunFailed as error:  # the flipped bit is in its id or its task
            said = str(error)
            assert "played.jsonl: episode" in said
        except DataError as error:
            said = str(error)
            assert f"played.jsonl:{line + 1}: " in said, said
            assert "Remove the line" in said
        else:  # the name of the checksum: the line itself is whole
            assert b'"checksum"' not in bad
            assert [*known] == ["b-0", "b-1", "b-2"]
