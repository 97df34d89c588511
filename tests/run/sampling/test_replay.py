"""Which tasks are played again: by hand, and over many steps."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from rayrl.config import Config, from_dict
from rayrl.run.sampling.replay import PATIENCE, ReplaySampler
from rayrl.types import Episode, Group, Task
from tests.sampled import DIFFERENT, SAME, environment, group, rows

LOST = 0.0, 0.0


def config(groups: int = 4, share: float = 0.5) -> Config:
    train = {"groups": groups, "group_size": 2, "task_sampling": "replay", "uniform_share": share}
    return from_dict({"env": {"name": "x"}, "train": train})


def play(sampler: ReplaySampler, step: int, groups: dict[int, Group]) -> dict[str, float]:
    """A step of four groups, those that are not named all alike."""
    indices = range(4 * step, 4 * step + 4)
    for index in indices:
        sampler.plan(index)
    return sampler.observe({index: groups.get(index, group(*SAME)) for index in indices})


def origins(sampler: ReplaySampler, step: int) -> list[int]:
    """Which group first drew the task of each group of a step."""
    indices = range(4 * step, 4 * step + 4)
    for index in indices:
        sampler.plan(index)
    return [sampler.draws()[index] for index in indices]


def test_the_task_that_went_worst_is_played_again_as_it_was() -> None:
    """With half of the groups drawn uniformly, those with odd numbers are."""
    sampler = ReplaySampler(environment(), config())
    first = {index: sampler.plan(index) for index in range(4)}
    assert [sampler.is_uniform(index) for index in range(4)] == [False, True, False, True]
    assert len({plan.task.seed for plan in first.values()}) == 4, "nothing is known"
    metrics = sampler.observe(
        {0: group(1.0, 0.5), 1: group(0.5, 0.0), 2: group(1.0, 1.0), 3: group(0.0, 0.0)}
    )
    assert metrics == {"replay/known": 2.0, "replay/groups": 0.0}
    assert origins(sampler, 1) == [1, 5, 0, 7]
    again = sampler.plan(4)
    assert again.task == first[1].task
    assert again.seed != first[1].seed, "its episodes are others"
    assert again.id == "1-0"


def test_the_latest_group_decides() -> None:
    sampler = ReplaySampler(environment(), config())
    play(sampler, 0, {0: group(1.0, 0.5), 1: group(0.5, 0.0)})
    assert origins(sampler, 1) == [1, 5, 0, 7]
    metrics = play(sampler, 1, {4: group(1.0, 0.8), 6: group(0.2, 0.0)})
    assert metrics == {
        "replay/known": 2.0,
        "replay/groups": 2.0,
        "replay/reward": pytest.approx((0.9 + 0.1) / 2),
    }
    assert origins(sampler, 2) == [0, 9, 1, 11]
    play(sampler, 2, {8: group(0.9, 0.7), 10: group(0.9, 0.7)})  # alike: the latest comes first
    assert origins(sampler, 3) == [1, 13, 0, 15]


def test_rewards_are_those_of_trained_seats() -> None:
    """A self-played game that x mostly loses, and one that x mostly wins."""

    def of(*rewards: float, seats: tuple[str, ...]) -> Group:
        episodes = (
            Episode(str(k), "x", Task(), k, (), {}, {"x": reward, "o": 1 - reward})
            for k, reward in enumerate(rewards)
        )
        return Group("g", Task(), tuple(episodes), seats)

    for seats, order in ((("x",), [2, 0]), (("o",), [0, 2]), (("x", "o"), [2, 0])):
        sampler = ReplaySampler(environment(), config())
        play(sampler, 0, {0: of(1.0, 0.9, seats=seats), 2: of(0.0, 0.1, seats=seats)})
        assert origins(sampler, 1) == [order[0], 5, order[1], 7]


def test_a_task_is_not_played_twice_at_once() -> None:
    sampler = ReplaySampler(environment(), config())
    play(sampler, 0, {0: group(*DIFFERENT)})
    assert origins(sampler, 1) == [0, 5, 6, 7]
    assert sampler.plan(8).task != sampler.plan(0).task, "nor while groups of the step before run"


def test_what_never_differs_is_forgotten() -> None:
    """It could be done once, as by luck, and never again."""
    sampler = ReplaySampler(environment(), config())
    play(sampler, 0, {0: group(*DIFFERENT)})
    for step in range(1, 1 + PATIENCE):
        assert origins(sampler, step)[0] == 0
        play(sampler, step, {4 * step: group(*LOST)})
    assert origins(sampler, 1 + PATIENCE)[0] == 4 * (1 + PATIENCE)


def test_a_failed_group_says_nothing_about_its_task() -> None:
    sampler = ReplaySampler(environment(), config(groups=1, share=1.0))
    sampler.plan(0)
    metrics = sampler.observe({0: group(0.0, 1.0, kind="env")})
    assert metrics == {"replay/known": 0.0, "replay/groups": 0.0}
    assert sampler.save() == {"known": {}, "drawn": {}}


def test_rows_are_known_by_their_place_in_every_epoch(tmp_path: Path) -> None:
    """Of eight rows number 3 goes well half of the time, number 5 never, the others always."""
    sampler = ReplaySampler(environment(rows(tmp_path, 8)), config())
    uniform: list[int] = []
    others: Counter[int] = Counter()
    for step in range(16):
        groups = {}
        for index in range(4 * step, 4 * step + 4):
            place = sampler.plan(index).task.seed
            if sampler.is_uniform(index):
                uniform.append(place)
            else:
                others[place] += 1
            groups[index] = group(*{3: DIFFERENT, 5: LOST}.get(place, SAME))
        metrics = sampler.observe(groups)
        assert metrics["replay/known"] <= 1
    for epoch in range(4):
        assert sorted(uniform[8 * epoch : 8 * epoch + 8]) == list(range(8))
    assert others[3] >= 9, "once in every step in which no uniform draw has it, once it is known"
    assert others.total() == 32
