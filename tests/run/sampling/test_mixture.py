"""Which environment of a mixture plays: shares, by episodes and by tokens, and resuming."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from rayrl.config import from_dict
from rayrl.environment.registry import load_env
from rayrl.rollout.rollout import GroupPlan
from rayrl.run.sampling.mixture import MixtureSampler, component_shares, run_sampler
from rayrl.types import Episode, Failure, Group, Task, Turn

STEP = 4


class Numbered:
    """A sampler whose tasks are numbered; it keeps what it has observed."""

    def __init__(self) -> None:
        self.observed: list[int] = []

    def plan(self, index: int) -> GroupPlan:
        return GroupPlan("own", Task(seed=index), 1, index)

    def is_uniform(self, index: int) -> bool:
        return True

    def draws(self) -> dict[int, Any]:
        return {}

    def observe(self, groups: Mapping[int, Group]) -> dict[str, float]:
        self.observed += groups
        return {}

    def save(self) -> dict[str, Any]:
        return {"observed": self.observed}

    def load(self, state: Mapping[str, Any], draws: Mapping[int, Any]) -> None:
        self.observed = [*state.get("observed", [])]


def mixture(weights: Sequence[float], *, by_tokens: bool = False) -> MixtureSampler:
    exact = [Fraction(weight) for weight in weights]
    names = [chr(ord("a") + k) for k in range(len(weights))]
    shares = {name: one / sum(exact) for name, one in zip(names, exact, strict=True)}
    samplers = {name: Numbered() for name in names}
    return MixtureSampler(samplers, shares, STEP, by_tokens=by_tokens)


def group(plan: GroupPlan, tokens: int, failure: Failure | None = None) -> Group:
    turn = Turn("agent", (), "x", "stop", completion_ids=(1,) * tokens)
    rival = Turn("rival", (), "x", "stop", completion_ids=(1,) * 1000)
    episode = Episode("e", plan.component, plan.task, 0, (turn, rival), failure=failure)
    return Group(plan.id, plan.task, (episode,))


def names(sampler: MixtureSampler, n: int, start: int = 0) -> str:
    return "".join(sampler.plan(index).component for index in range(start, start + n))


def test_two_to_one() -> None:
    """After n groups a has had 2n/3 of them and b n/3, up to less than one."""
    sampler = mixture([2, 1])
    assert names(sampler, 9) == "abaabaaba"
    plans = [sampler.plan(index) for index in range(6)]
    assert [plan.id for plan in plans] == ["0-0", "0-1", "0-2", "0-3", "1-0", "1-1"]
    own = [(plan.component, plan.task.seed) for plan in plans]
    assert own == [("a", 0), ("b", 0), ("a", 1), ("a", 2), ("b", 1), ("a", 3)], "none is left out"


@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=6), st.integers(1, 200))
def test_every_share_is_exact_up_to_less_than_a_group(weights: list[float], n: int) -> None:
    sampler = mixture(weights)
    total = sum(map(Fraction, weights))
    counts: Counter[str] = Counter()
    for index in range(n):
        counts[sampler.plan(index).component] += 1
        for k, weight in enumerate(weights):
            share = Fraction(weight) / total * (index + 1)
            assert abs(counts[chr(ord("a") + k)] - share) < 1


def test_by_tokens_the_shares_are_of_what_was_written() -> None:
    """b writes nine times as much: of equal shares, it soon has one group in ten."""
    sampler = mixture([1, 1], by_tokens=True)
    tokens = {"a": 10, "b": 90}
    written: Counter[str] = Counter()
    for step in range(50):
        indices = range(step * STEP, (step + 1) * STEP)
        plans = {index: sampler.plan(index) for index in indices}
        sampler.observe({i: group(plan, tokens[plan.component]) for i, plan in plans.items()})
        for plan in plans.values():
            written[plan.component] += tokens[plan.component]
        if step == 0:
            assert [plan.component for plan in plans.values()] == ["a", "b", "a", "b"]
    assert abs(written["a"] - written["b"]) <= 90, "up to one group of the longer"
    assert written["a"] // 10 > 5 * written["b"] // 90


def test_by_tokens_failed_groups_count_nothing() -> None:
    """Without the failed ones, those of a would have to go on for ever."""
    sampler = mixture([1, 1], by_tokens=True)
    plans = {index: sampler.plan(index) for index in range(4)}
    failed = Failure("env", "it broke")
    sampler.observe(
        {i: group(p, 5, failed if p.component == "a" else None) for i, p in plans.items()}
    )
    # 2 × 5 tokens of b are there, and a group of a is expected to be as long as one of b
    assert names(sampler, 4, start=4) == "aaab"


@given(
    st.lists(st.integers(1, 5), min_size=2, max_size=4),
    st.lists(st.integers(1, 60), min_size=STEP * 6, max_size=STEP * 6),
    st.integers(0, 5),
    st.booleans(),
)
def test_a_resumed_run_draws_what_an_unbroken_one_draws(
    weights: list[int], tokens: list[int], at: int, by_tokens: bool
) -> None:
    """The checkpoint of a step, in JSON, and the batches since, some of whose groups had begun."""

    def step_of(sampler: MixtureSampler, step: int) -> list[GroupPlan]:
        return [sampler.plan(index) for index in range(step * STEP, (step + 1) * STEP)]

    def close(sampler: MixtureSampler, step: int) -> None:
        plans = enumerate(step_of(sampler, step), step * STEP)
        sampler.observe({index: group(plan, tokens[index]) for index, plan in plans})

    unbroken = mixture(weights, by_tokens=by_tokens)
    plans, state = [], "{}"
    for step in range(6):
        plans.append(step_of(unbroken, step))  # it begins, and then a checkpoint is made
        if step == at:
            state = json.dumps(unbroken.save())
        close(unbroken, step)
    resumed = mixture(weights, by_tokens=by_tokens)
    resumed.load(json.loads(state), {})
    for step in range(at, 6):
        assert step_of(resumed, step) == plans[step]
        close(resumed, step)
    assert resumed.save() == unbroken.save()


def test_by_tokens_groups_that_had_begun_keep_their_component() -> None:
    """Four groups begin ahead of the first batch, whose tokens would give them to others."""
    sampler = mixture([1, 1], by_tokens=True)
    first = {index: sampler.plan(index) for index in range(4)}
    state = json.dumps(sampler.save())
    ahead = names(sampler, 4, start=4)
    draws = sampler.draws()
    assert [draws[index] for index in range(8)] == [[0, None], [1, None]] * 4
    closed = {
        index: group(plan, 1 if plan.component == "a" else 90) for index, plan in first.items()
    }
    sampler.observe(closed)
    assert sampler.draws().keys() == {4, 5, 6, 7}
    assert mixture([1, 1]).draws() == {}

    def resumed(draws: Mapping[int, Any]) -> MixtureSampler:
        again = mixture([1, 1], by_tokens=True)
        again.load(json.loads(state), draws)
        again.observe(closed)
        return again

    again = resumed(draws)
    assert names(again, 4, start=4) == ahead
    assert names(again, 4, start=8) == names(sampler, 4, start=8)
    assert again.save() == sampler.save()
    assert names(resumed({}), 4, start=4) != ahead, "or else this test shows nothing"


def test_groups_are_passed_to_the_sampler_of_their_component() -> None:
    sampler = mixture([2, 1])
    plans = {index: sampler.plan(index) for index in range(6)}
    sampler.observe({index: group(plans[index], 1) for index in (4, 0, 2)})
    assert [one["observed"] for one in sampler.save()["samplers"].values()] == [[0, 1], [1]]


def test_each_environment_has_a_stream_of_tasks_of_its_own() -> None:
    """Of 6 groups a step, words has 4 and so 4 strata of u; its tasks are the same next to others.

    `copyword` draws lengths from 2 to 8 evenly by u.
    """
    data = {"words": {"name": "copyword", "weight": 2}, "games": {"name": "tictactoe"}}
    config = from_dict({"env": {"mix": data}, "train": {"groups": 6}})
    assert component_shares(config) == {"words": Fraction(2, 3), "games": Fraction(1, 3)}
    envs = {name: load_env(one["name"]) for name, one in data.items()}
    sampler = run_sampler(envs, config)
    plans = [sampler.plan(index) for index in range(12)]
    words = [plan.task for plan in plans if plan.component == "words"]
    lengths = [len(task.word) for task in words]  # type: ignore[attr-defined]
    for step in (lengths[:4], lengths[4:]):
        strata = [(2, 3), (3, 5), (5, 7), (7, 8)]  # of u in quarters, in lengths
        assert all(low <= n <= high for n, (low, high) in zip(step, strata, strict=True))
    assert len({task.seed for task in words}) == 8
    data["games"] = {"name": "tools"}
    other = from_dict({"env": {"mix": data}, "train": {"groups": 6}})
    again = run_sampler({"words": envs["words"], "games": load_env("tools")}, other)
    drawn = [again.plan(index) for index in range(12)]
    assert [plan.task for plan in drawn if plan.component == "words"] == words
