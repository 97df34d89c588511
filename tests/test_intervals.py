import math

import pytest

from rayrl.intervals import mean_interval, wilson


def test_wilson_by_hand() -> None:
    # p = .9, n = 100, z = 2: scale 1.04, centre (.9 + .02) / 1.04, half 2·√(.0009 + .0001) / 1.04
    low, high = wilson(90, 100, z=2.0)
    assert low == pytest.approx((0.92 - 2 * math.sqrt(0.001)) / 1.04)
    assert high == pytest.approx((0.92 + 2 * math.sqrt(0.001)) / 1.04)


def test_wilson_at_the_ends() -> None:
    # 0 of n: upper bound z²/(n + z²); never the false certainty of a zero-width interval.
    assert wilson(0, 400) == (0.0, pytest.approx(3.8414588 / 403.8414588))
    assert wilson(400, 400) == (pytest.approx(400 / 403.8414588), 1.0)
    assert wilson(0, 0) == (0.0, 1.0)


def test_wilson_agrees_with_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    for count, n in [(0, 7), (3, 7), (97, 100), (388, 400)]:
        theirs = stats.binomtest(count, n).proportion_ci(method="wilson")
        assert wilson(count, n) == (pytest.approx(theirs.low), pytest.approx(theirs.high))


def test_wilson_refuses_impossible_counts() -> None:
    with pytest.raises(ValueError, match="count=5, n=4"):
        wilson(5, 4)


def test_mean_interval_by_hand() -> None:
    # 1, 2, 3, 4: mean 2.5, s² = 5/3, standard error √(5/12)
    assert mean_interval([1, 2, 3, 4], z=1.0) == (
        2.5,
        pytest.approx(2.5 - math.sqrt(5 / 12)),
        pytest.approx(2.5 + math.sqrt(5 / 12)),
    )


def test_mean_interval_without_spread() -> None:
    assert mean_interval([0.5]) == (0.5, -math.inf, math.inf)
    assert mean_interval([0.5, 0.5]) == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="at least one"):
        mean_interval([])
