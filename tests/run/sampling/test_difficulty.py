"""Which tasks are drawn when groups differ in what they teach: by hand, and whatever is played."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrl.config import Config, from_dict
from rayrl.run.sampling.difficulty import DifficultySampler, Pools, reward_spread
from rayrl.run.sampling.mixture import run_sampler
from rayrl.types import Episode, Group, Task
from tests.sampled import DIFFERENT, SAME, At, environment, group, rows


def config(groups: int = 4, share: float = 0.25, pools: int = 4, **env: Any) -> Config:
    train = {
        "groups": groups,
        "group_size": 2,
        "task_sampling": "difficulty",
        "uniform_share": share,
        "pools": pools,
    }
    return from_dict({"env": env or {"name": "x"}, "train": train})


# --- pools ---------------------------------------------------------------------------------------


def test_pools_by_hand() -> None:
    """One pool with a standard deviation of 0.5, one with 0; two that nobody has seen."""
    pools = Pools(4)
    assert pools.shares() == [0.25] * 4
    pools.observe(0, group(0.0, 1.0))
    pools.observe(1, group(1.0, 1.0))
    # their mean is 0.25; 0: (0.25 * 0.25 + 0.5) / 1.25, and 1: 0.25 * 0.25 / 1.25
    assert pools.expected_spreads() == pytest.approx([0.45, 0.05, 0.25, 0.25])
    assert pools.u_at(0.225) == pytest.approx(0.125), "half of pool 0"
    assert pools.u_at(0.475) == pytest.approx(0.375), "half of pool 1"
    assert pools.u_at(0.625) == pytest.approx(0.625)
    assert pools.u_at(0.0) == 0.0
    assert pools.bands() == {"hard": [], "medium": [0], "easy": [1]}
    pools.observe(0, group(0.0, 0.0))  # its weights are 0.75 and 1
    assert pools.expected_spreads()[0] == pytest.approx(
        (0.25 * (0.375 / 1.75) / 2 + 0.375) / (0.25 + 1.75)
    )
    assert pools.bands() == {"hard": [0], "medium": [], "easy": [1]}, "0.375 / 1.75 is under 1/3"


def test_where_no_group_has_spread_all_pools_are_alike() -> None:
    pools = Pools(2)
    pools.observe(0, group(1.0, 1.0))
    pools.observe(1, group(0.0, 0.0))
    assert pools.shares() == [0.5, 0.5]
    assert pools.u_at(0.3) == pytest.approx(0.3)


def test_the_spread_of_a_group_is_the_mean_over_its_trained_seats() -> None:
    def of(x: float, o: float, number: int) -> Episode:
        return Episode(str(number), "x", Task(), number, (), {}, {"x": x, "o": o})

    episodes = of(0.0, 3.0, 0), of(1.0, 3.0, 1)
    assert reward_spread(Group("g", Task(), episodes, ("x", "o"))) == 0.25
    assert reward_spread(Group("g", Task(), episodes, ("x",))) == 0.5
    assert reward_spread(group(1.0, 1.0 + 1e-7)) == 0.0, "such rewards give no advantage"


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.lists(st.floats(-2, 2), min_size=2, max_size=4))),
    st.floats(0, 1, exclude_max=True),
    st.floats(0, 1, exclude_max=True),
)
def test_draws_follow_the_shares_whatever_was_played(
    played: Sequence[tuple[int, list[float]]], x: float, y: float
) -> None:
    pools = Pools(5)
    for pool, rewards in played:
        pools.observe(pool, group(*rewards))
    shares = pools.shares()
    assert sum(shares) == pytest.approx(1)
    assert all(share > 0 for share in shares), "nothing is given up for good"
    for number in (x, y):
        u = pools.u_at(number)
        assert 0 <= u < 1
        pool = pools.pool_of(u)
        below = sum(shares[:pool])
        assert below + (u * 5 - pool) * shares[pool] == pytest.approx(number, abs=1e-9)
    assert (x <= y) == (pools.u_at(x) <= pools.u_at(y)) or x == pytest.approx(y)
    assert sum(map(len, pools.bands().values())) == len({pool for pool, _ in played})


# --- what is drawn -------------------------------------------------------------------------------


def test_the_uniform_draws_of_rows_are_epochs_and_the_others_go_where_rewards_differ(
    tmp_path: Path,
) -> None:
    """Eight rows, of which only row 3 teaches anything, sixteen steps of two draws of each kind."""
    sampler = DifficultySampler(environment(rows(tmp_path, 8)), config(groups=4, share=0.5))
    uniform: list[int] = []
    others: list[int] = []
    for step in range(16):
        groups = {}
        for index in range(4 * step, 4 * step + 4):
            place = sampler.plan(index).task.seed
            (uniform if sampler.is_uniform(index) else others).append(place)
            groups[index] = group(*(DIFFERENT if place == 3 else SAME))
        sampler.observe(groups)
    for epoch in range(4):
        assert sorted(uniform[8 * epoch : 8 * epoch + 8]) == list(range(8))
    assert Counter(others[16:])[3] >= 10, "of 16, where 2 would be by chance"


def test_what_has_become_hard_or_easy_is_noticed() -> None:
    sampler = run_sampler({"": environment()}, config(groups=8, share=0.25, pools=4))

    def play(steps: range, teaches: Callable[[float], bool]) -> Counter[int]:
        drawn: Counter[int] = Counter()
        for step in steps:
            groups = {}
            for index in range(8 * step, 8 * step + 8):
                task = sampler.plan(index).task
                assert isinstance(task, At)
                drawn[int(4 * task.u)] += not sampler.is_uniform(index)
                groups[index] = group(*(DIFFERENT if teaches(task.u) else SAME))
            sampler.observe(groups)
        return drawn

    play(range(10), lambda u: u < 0.25)
    assert play(range(10, 20), lambda u: u < 0.25)[0] > 0.7 * 60
    play(range(20, 40), lambda u: u >= 0.75)
    assert play(range(40, 50), lambda u: u >= 0.75)[3] > 0.7 * 60


def test_a_failed_group_says_nothing_about_its_pool() -> None:
    sampler = DifficultySampler(environment(), config(groups=1, share=1.0))
    sampler.plan(0)
    metrics = sampler.observe({0: group(0.0, 1.0, kind="env")})
    assert metrics["pools/unseen"] == 1.0
    assert sampler.save() == {"pools": {}, "drawn": {}}


def test_metrics_by_hand() -> None:
    """Two pools: the first one's group differs, the second one's succeeds."""
    sampler = DifficultySampler(environment(), config(groups=2, share=0.5, pools=2))
    sampler._drawn = {0: 0.1, 1: 0.6}
    assert [sampler.is_uniform(index) for index in range(2)] == [False, True]
    # expected spreads: mean 0.25; (0.0625 + 0.5) / 1.25 = 0.45 and 0.0625 / 1.25 = 0.05
    assert sampler.observe({0: group(0.0, 1.0), 1: group(1.0, 1.0)}) == pytest.approx(
        {
            "pools/unseen": 0.0,
            "pools/hard": 0.0,
            "pools/medium": 0.5,
            "pools/easy": 0.5,
            "draws/hard": 0.0,
            "draws/medium": 0.5 * 0.5 + 0.5 * 0.9,
            "draws/easy": 0.5 * 0.5 + 0.5 * 0.1,
            "draws/spread_uniform": 0.0,
            "draws/spread_by_difficulty": 0.5,
        }
    )


def test_each_environment_of_a_mixture_has_pools_of_its_own() -> None:
    """In a, only the first quarter of u teaches anything; in b, only the last."""
    mix = {"a": {"name": "x", "weight": 2}, "b": {"name": "x"}}
    sampler = run_sampler({"a": environment(), "b": environment()}, config(groups=12, mix=mix))
    late: dict[str, Counter[int]] = {"a": Counter(), "b": Counter()}
    uniform: Counter[str] = Counter()
    for step in range(30):
        groups = {}
        for index in range(12 * step, 12 * step + 12):
            plan = sampler.plan(index)
            assert isinstance(plan.task, At)
            quarter = int(4 * plan.task.u)
            groups[index] = group(*(DIFFERENT if quarter == 3 * (plan.component == "b") else SAME))
            if sampler.is_uniform(index):
                uniform[plan.component] += 1
            elif step >= 10:
                late[plan.component][quarter] += 1
        metrics = sampler.observe(groups)
    assert uniform == {"a": 60, "b": 30}, "a quarter of the 240 and 120 groups"
    assert late["a"][0] > 0.7 * late["a"].total() > 80
    assert late["b"][3] > 0.7 * late["b"].total() > 40
    assert metrics["draws/a/spread_by_difficulty"] > metrics["draws/a/spread_uniform"]
    assert {"pools/a/unseen", "pools/b/easy", "draws/b/medium"} <= metrics.keys()
