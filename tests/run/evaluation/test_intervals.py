"""Intervals by hand, against SciPy, and by how often they cover what they are to cover."""

import math

import numpy as np
import pytest

from rayrl.run.evaluation.intervals import effective_n, mean_interval, student_t, wilson

DRAWS = 2000


def test_wilson_by_hand() -> None:
    # p=0.9, n=100, z=2: (0.9 + 4/200 ± 2·√(0.09/100 + 4/40000)) / 1.04
    low, high = wilson(90, 100, z=2.0)
    half = 2 * math.sqrt(0.0009 + 0.0001)
    assert (low, high) == pytest.approx(((0.92 - half) / 1.04, (0.92 + half) / 1.04))


def test_wilson_at_the_ends() -> None:
    # at 0 of n: z²/(n + z²) with z² = 3.8414588
    assert wilson(0, 400) == (0.0, pytest.approx(3.8414588 / 403.8414588))
    assert wilson(400, 400) == (pytest.approx(400 / 403.8414588), 1.0)
    assert wilson(0, 0) == (0.0, 1.0)


def test_wilson_agrees_with_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    for count, n in [(0, 7), (3, 7), (7, 7), (1, 400), (200, 400), (399, 400)]:
        theirs = stats.binomtest(count, n).proportion_ci(method="wilson")
        assert wilson(count, n) == (pytest.approx(theirs.low), pytest.approx(theirs.high))


def test_wilson_refuses_impossible_counts() -> None:
    with pytest.raises(ValueError, match="count=5, n=4"):
        wilson(5, 4)


def test_students_t_agrees_with_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    for df in [*range(1, 40), 99, 399, 999, 1000, 1001, 5000, 10**6]:
        assert student_t(df) == pytest.approx(stats.t.ppf(0.975, df), rel=1e-8)
    with pytest.raises(ValueError, match="at least 1 degree"):
        student_t(0)


def test_a_mean_by_hand() -> None:
    # mean 2.5, s² = 5/3, n = 4: the standard error is √(5/12), and t with 3 degrees is 3.182446
    half = 3.182446305 * math.sqrt(5 / 12)
    assert mean_interval([1, 2, 3, 4]) == pytest.approx((2.5, 2.5 - half, 2.5 + half))
    assert mean_interval([1, 2, 3, 4], "abcd") == mean_interval([1, 2, 3, 4])


def test_a_clustered_mean_by_hand() -> None:
    # mean 3; clusters' sums of deviations: (1-3)+(2-3) = -3, (3-3) = 0, (4-3)+(5-3) = 3;
    # √(3/2 · (9+0+9)) / 5 = √27 / 5; t with 2 degrees is 4.302653
    half = 4.302652730 * math.sqrt(27) / 5
    assert mean_interval([1, 2, 3, 4, 5], "aabcc") == pytest.approx((3, 3 - half, 3 + half))


def test_a_clustered_mean_is_that_of_cluster_means_where_they_are_equal_in_size() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(20, 4)) + rng.normal(size=(20, 1))
    tasks = np.repeat(np.arange(20), 4)
    got = mean_interval(rows.ravel().tolist(), tasks.tolist())
    assert got == pytest.approx(mean_interval(rows.mean(1).tolist()))


def test_a_mean_without_spread() -> None:
    assert mean_interval([0.5]) == (0.5, -math.inf, math.inf)
    assert mean_interval([0.5, 0.7], "aa") == (0.6, -math.inf, math.inf)
    assert mean_interval([0.5, 0.5]) == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="at least one value"):
        mean_interval([])


def test_what_clustered_shares_are_worth() -> None:
    """By hand for 100 tasks with 4 episodes each; few tasks tell less of how alike theirs are."""
    tasks = [k // 4 for k in range(400)]
    few = (student_t(399) / student_t(99)) ** 2
    alike = [float(k // 4 < 90) for k in range(400)]  # four episodes tell what one does
    effect = (100 / 99 * 1600 * 0.09) / (400 / 399 * 400 * 0.09)
    assert effective_n(alike, tasks) == pytest.approx(400 / min(effect, 4) * few)
    assert effective_n([1.0] * 400, tasks) == pytest.approx(100 * few)  # nobody knows: as if alike
    apart = [float(k % 4 < 2) for k in range(400)]  # half of every task's: less than by chance
    assert effective_n(apart, tasks) == pytest.approx(400 * few)  # but never worth more than 400
    assert effective_n(alike, list(range(400))) == 400
    assert effective_n([1.0, 0.0, 1.0], [0, 0, 0]) == 1
    assert effective_n([1.0], [0]) == 1
    uneven = [0] * 10 + [*range(1, 11)]  # Σ n_c²/n = (100 + 10)/20
    few = (student_t(19) / student_t(10)) ** 2
    assert effective_n([0.0] * 20, uneven) == pytest.approx(20 / 5.5 * few)


@pytest.mark.parametrize(
    ("p", "n", "exact"),
    [
        (0.5, 50, 0.9351),
        (0.5, 400, 0.9490),
        (0.9, 50, 0.9703),
        (0.9, 400, 0.9454),
        (0.99, 50, 0.9106),  # Wilson's dips where np(1-p) is below 1; the normal one has 0.39
        (0.99, 400, 0.9318),
    ],
)
def test_how_often_wilson_covers(p: float, n: int, exact: float) -> None:
    """Summed over all counts, and drawn."""
    weights = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
    covering = [low <= p <= high for low, high in (wilson(k, n) for k in range(n + 1))]
    assert sum(w for w, covers in zip(weights, covering, strict=True) if covers) == pytest.approx(
        exact, abs=5e-5
    )
    drawn = np.random.default_rng(n).binomial(n, p, DRAWS)
    share = sum(covering[k] for k in drawn) / DRAWS
    assert share == pytest.approx(exact, abs=3 * math.sqrt(exact * (1 - exact) / DRAWS))


@pytest.mark.parametrize("p", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("alike", [0.2, 3.0, 1000.0])
def test_repeated_tasks_are_covered_too(p: float, alike: float) -> None:
    """100 tasks, each played four times with a chance of its own from a beta distribution.

    With `alike` = 1000 every task has nearly the same chance, with 0.2 nearly 0 or 1.
    """
    rng = np.random.default_rng(0)
    tasks = np.repeat(np.arange(100), 4).tolist()
    covered = naive = 0
    for _ in range(DRAWS // 4):
        chances = rng.beta(alike * p, alike * (1 - p), 100)
        values = (rng.random((100, 4)) < chances[:, None]).ravel().astype(float).tolist()
        worth = effective_n(values, tasks)
        low, high = wilson(sum(values) / 400 * worth, worth)
        covered += low <= p <= high
        low, high = wilson(sum(values), 400)
        naive += low <= p <= high
    assert 0.92 <= covered / (DRAWS // 4) <= 0.99  # Wilson's own for p=0.99 is 0.932, see above
    if alike < 1:
        assert naive / (DRAWS // 4) < 0.80


@pytest.mark.parametrize("n", [5, 50])
def test_how_often_students_t_covers(n: int) -> None:
    rng = np.random.default_rng(n)
    found = [mean_interval(rng.normal(3, 2, n).tolist()) for _ in range(DRAWS)]
    assert 0.935 <= sum(low <= 3 <= high for _, low, high in found) / DRAWS <= 0.965


def test_how_often_a_clustered_mean_covers() -> None:
    rng = np.random.default_rng(0)
    tasks = np.repeat(np.arange(30), 4).tolist()
    covered = naive = 0
    for _ in range(DRAWS // 2):
        values = (rng.normal(size=(30, 1)) + rng.normal(size=(30, 4))).ravel().tolist()
        _, low, high = mean_interval(values, tasks)
        covered += low <= 0 <= high
        _, low, high = mean_interval(values)
        naive += low <= 0 <= high
    assert 0.93 <= covered / (DRAWS // 2) <= 0.97
    assert naive / (DRAWS // 2) < 0.85
