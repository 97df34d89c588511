"""Advantages against numbers worked by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest

from rayrl.config import AlgoConfig
from rayrl.errors import ConfigError, NumericsError
from rayrl.learner.advantage import advantages, centred, leave_one_out, step_level
from rayrl.types import Episode, Failure, Group, Task, Turn


def turn(seat="agent", state=""):
    return Turn(seat=seat, prompt=(), text="", finish="stop", state=state)


def group(rewards, states=None, seat="agent"):
    """One episode a reward; `states` gives each its turns."""
    states = states or [("s",)] * len(rewards)
    episodes = tuple(
        Episode(
            id=f"e{i}",
            env="t",
            task=Task(),
            index=i,
            turns=tuple(turn(seat, s) for s in own),
            rewards={seat: reward},
        )
        for i, (reward, own) in enumerate(zip(rewards, states, strict=True))
    )
    return Group(id="g", task=Task(), episodes=episodes, trainable=(seat,))


def firsts(result):
    return [values[0] for _, values in sorted(result.items())]


def test_grpo_divides_by_the_population_std():
    # 1, 0, 0, 1: mean 0.5, std 0.5.
    (result,) = advantages([group([1, 0, 0, 1])], AlgoConfig(advantage="grpo", normalize="std"))
    assert firsts(result) == [1, -1, -1, 1]


def test_dr_grpo_only_centres():
    (result,) = advantages([group([1, 0, 0, 0])], AlgoConfig(advantage="grpo", normalize="none"))
    assert firsts(result) == [0.75, -0.25, -0.25, -0.25]


def test_rloo_compares_with_the_others():
    # 1 against the mean of (0, 0, 0.5) and so on.
    (result,) = advantages([group([1, 0, 0, 0.5])], AlgoConfig(advantage="rloo", normalize="none"))
    assert firsts(result) == pytest.approx([1 - 0.5 / 3, -0.5, -0.5, 0.5 - 1 / 3])


def test_rloo_with_std_is_not_grpo():
    cfg = AlgoConfig(advantage="rloo", normalize="std")
    (result,) = advantages([group([1, 0, 0, 1])], cfg)
    assert firsts(result) == pytest.approx([4 / 3, -4 / 3, -4 / 3, 4 / 3])


def test_batch_std_pools_the_centred_rewards_of_all_groups():
    # Deviations ±0.5 (twice) and ±0.1 (twice): std = sqrt((4·0.25 + 4·0.01) / 8).
    groups = [group([1, 0, 0, 1]), group([0.1, -0.1, 0.1, -0.1])]
    one, two = advantages(groups, AlgoConfig(advantage="grpo", normalize="batch_std"))
    scale = math.sqrt((4 * 0.25 + 4 * 0.01) / 8)
    assert firsts(one) == pytest.approx([0.5 / scale, -0.5 / scale, -0.5 / scale, 0.5 / scale])
    assert firsts(two)[0] == pytest.approx(0.1 / scale)


def test_every_turn_of_an_episode_gets_its_advantage():
    cfg = AlgoConfig(advantage="grpo", normalize="none")
    (result,) = advantages([group([1, 0], [("a", "b", "c"), ("a",)])], cfg)
    assert result == {(0, "agent"): (0.5, 0.5, 0.5), (1, "agent"): (-0.5,)}


@pytest.mark.parametrize("method", ["grpo", "rloo", "gigpo"])
@pytest.mark.parametrize("normalize", ["none", "std", "batch_std"])
def test_no_spread_gives_exact_zeros(method, normalize):
    # 0.1 + 0.2 is not 0.3 in floats: that is not a difference in play.
    dead = group([0.3, 0.1 + 0.2, 0.3], [("a",), ("a", "b"), ("a", "b", "c")])
    cfg = AlgoConfig(advantage=method, normalize=normalize)
    (result,) = advantages([dead], cfg)
    assert all(value == 0.0 for values in result.values() for value in values)
    alone, _ = advantages([group([0.7]), group([1, 0])], cfg)
    assert alone == {(0, "agent"): (0.0,)}


def test_gigpo_compares_turns_taken_in_the_same_state():
    # Returns at gamma 0.5: episode 0 wins after a, b: 0.5, 1. Episode 1 loses: 0, 0. Episode 2 wins
    # at once from b: 1, and never saw a. Set a: {0.5, 0}; set b: {1, 1}; set c: {0}.
    states = [("a", "b"), ("a", "c"), ("b",)]
    after = [(1, 0), (1, 0), (0,)]
    assert step_level(states, after, [1, 0, 1], 0.5, divide_by_std=False) == [
        [0.25, 0.0],
        [-0.25, 0.0],
        [0.0],
    ]
    assert step_level(states, after, [1, 0, 1], 0.5, divide_by_std=True)[0] == [1.0, 0.0]
    cfg = AlgoConfig(advantage="gigpo", normalize="none", step_weight=2.0, gamma=0.5)
    (result,) = advantages([group([1, 0, 1], states)], cfg)
    assert result[0, "agent"] == pytest.approx((1 / 3 + 2 * 0.25, 1 / 3))
    assert result[1, "agent"] == pytest.approx((-2 / 3 - 2 * 0.25, -2 / 3))
    assert result[2, "agent"] == pytest.approx((1 / 3,))


def test_gigpo_counts_a_state_seen_twice_by_one_episode_twice():
    # Set a: returns 0.5 and 1 (same episode), 0 (other): mean 0.5.
    got = step_level([("a", "a"), ("a",)], [(1, 0), (0,)], [1, 0], 0.5, divide_by_std=False)
    assert got == [[0.0, 0.5], [-0.5]]


def test_gigpo_with_batch_std_scales_both_levels_alike():
    states = [("a",), ("a",)]
    cfg = AlgoConfig(advantage="gigpo", normalize="batch_std", step_weight=1.0)
    (result,) = advantages([group([1, 0], states)], cfg)
    assert result[0, "agent"] == pytest.approx((1.0 + 1.0,))


def test_seats_are_compared_among_themselves():
    def episode(i, x, o):
        turns = (turn("x"), turn("o"), turn("x"))
        return Episode(f"e{i}", "t", Task(), i, turns, rewards={"x": x, "o": o})

    both = Group("g", Task(), (episode(0, 1, 0), episode(1, 0, 0.5)), trainable=("x", "o"))
    (result,) = advantages([both], AlgoConfig(advantage="grpo", normalize="none"))
    assert result == {
        (0, "x"): (0.5, 0.5),
        (1, "x"): (-0.5, -0.5),
        (0, "o"): (-0.25,),
        (1, "o"): (0.25,),
    }


def test_centred_and_leave_one_out():
    assert centred([]) == []
    assert centred([1.0, 3.0]) == [-1.0, 1.0]
    assert leave_one_out([1.0, 3.0]) == [-2.0, 2.0]


def test_wrong_names_and_missing_rewards_are_said():
    with pytest.raises(ConfigError, match=r"algo.advantage='gigpoo'.*Did you mean 'gigpo'"):
        advantages([group([1, 0])], AlgoConfig(advantage="gigpoo"))
    with pytest.raises(ConfigError, match=r"algo\.normalize"):
        advantages([group([1, 0])], AlgoConfig(normalize="l2"))
    failed = Episode("e1", "t", Task(), 1, (), failure=Failure("env", "boom"))
    short = Group("g7", Task(), (*group([1]).episodes, failed))
    with pytest.raises(ValueError, match=r"'g7'.*'e1' has no reward"):
        advantages([short], AlgoConfig())


# Advantages from outside the package.

OUTSIDE = """
def ranks(inputs):
    order = sorted(inputs.rewards)
    return [[order.index(r) / inputs.scale] * len(t) for r, t in zip(inputs.rewards, inputs.turns)]
"""


def test_an_advantage_from_a_file_and_as_a_function(tmp_path):
    (tmp_path / "own.py").write_text(OUTSIDE)
    groups = [group([0.5, 0, 1], [("a",), ("a", "b"), ("a",)])]
    algo = AlgoConfig(advantage=f"{tmp_path}/own.py:ranks", normalize="std")
    (result,) = advantages(groups, algo)
    std = math.sqrt((0 + 0.25 + 0.25) / 3)
    assert result == {
        (0, "agent"): (1 / std,),
        (1, "agent"): (0.0, 0.0),
        (2, "agent"): (2 / std,),
    }

    def of_a_cell(inputs):
        assert (inputs.group, inputs.seat, inputs.algo) == (groups[0], "agent", algo)
        return np.array(inputs.centred)[:, None] * np.ones((1, 1))

    with pytest.raises(
        ConfigError, match=r"(?s)of_a_cell.*for each of the 3 episodes.*\[1, 2, 1\]"
    ):
        advantages(groups, algo, of_a_cell)
    (result,) = advantages([group([1, 0])], algo, lambda i: np.array(i.centred)[:, None])
    assert result == {(0, "agent"): (0.5,), (1, "agent"): (-0.5,)}
    assert advantages(groups, algo, "rloo") == advantages(groups, replace(algo, advantage="rloo"))


@pytest.mark.parametrize(
    ("returned", "error", "said"),
    [
        ([1.0, 2.0], ConfigError, r"returned \[1\.0, 2\.0\]; .*each of the 2 episodes"),
        ([[1.0]], ConfigError, "each of the 2 episodes"),
        ([["a"], [1.0]], ConfigError, "each of the 2 episodes"),
        (None, ConfigError, "returned None"),
        ([[1.0], [math.inf]], NumericsError, r"episode 1: \[inf\] is not finite"),
    ],
)
def test_what_an_advantage_returns_is_checked(returned, error, said):
    with pytest.raises(error, match=f"advantage .*<lambda>, group 'g', seat 'agent'.*{said}"):
        advantages([group([1, 0])], AlgoConfig(), lambda inputs: returned)


def test_batch_std_never_mixes_environments():
    # Of a mixture: deviations ±0.5 in one environment, ±10 in the other, each its own std.
    one, two = group([1, 0]), group([20, 0])
    other = replace(two, episodes=tuple(replace(e, env="other") for e in two.episodes))
    found = advantages([one, other], AlgoConfig(advantage="grpo", normalize="batch_std"))
    assert [firsts(result) for result in found] == [[1, -1], [1, -1]]
