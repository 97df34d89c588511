"""95% confidence intervals of the shares and means that an evaluation reports.

A share, an event counted over episodes, gets Wilson's score interval (E. B. Wilson, JASA 22, 1927,
p. 209): it stays inside [0, 1] and remains informative at 0 of n, where the textbook
`p ± z·√(p(1-p)/n)` has zero width. A mean gets Student's t interval.

Both assume independent episodes, which several episodes of one task are not. Episodes are therefore
clustered by task (E. Miller, Adding Error Bars to Evals, 2024, arXiv 2411.00640, section 2.2): a
mean gets a cluster-robust standard error, and a share an effective sample size (the design effect
of L. Kish, Survey Sampling, 1965, with the correction for few clusters of E. L. Korn and B. I.
Graubard, Survey Methodology 24, 1998).
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Hashable, Sequence

__all__ = ["Z95", "effective_n", "mean_interval", "score_interval", "student_t", "wilson"]

Z95 = 1.959963984540054  # two-sided 95% point of the standard normal


def wilson(count: float, n: float, z: float = Z95) -> tuple[float, float]:
    """Wilson's interval `(low, high)` for an event seen `count` times in `n`; (0, 1) at `n` = 0.

    With p = count/n: centre (p + z²/2n) / (1 + z²/n), half width
    z·√(p(1-p)/n + z²/4n²) / (1 + z²/n). Both numbers may be fractional (see `effective_n`).

    Raises:
        ValueError: if `count` is not within 0 and `n`.
    """
    if not 0 <= count <= n:
        raise ValueError(f"a share needs 0 <= count <= n, got count={count}, n={n}")
    if n == 0:
        return (0.0, 1.0)
    p = count / n
    scale = 1 + z * z / n
    centre = (p + z * z / (2 * n)) / scale
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / scale
    # At 0 and n the bound is exact; rounding would leave an error of 1e-17.
    low = 0.0 if count == 0 else max(0.0, centre - half)
    high = 1.0 if count == n else min(1.0, centre + half)
    return (low, high)


def mean_interval(
    values: Sequence[float], clusters: Sequence[Hashable] | None = None
) -> tuple[float, float, float]:
    """Mean of `values` and its interval `mean ± t·(standard error)`: `(mean, low, high)`.

    Args:
        values: (n,).
        clusters: (n,) cluster of each value; values of one cluster may be dependent. By default all
            values are independent.

    With m clusters, the standard error is √(m/(m-1) · Σ_c (Σ_{i in c} (x_i - mean))²) / n, and t is
    Student's with m-1 degrees of freedom. With one value per cluster that is s/√n (s with n-1). A
    single cluster gives no estimate of the variance, and the interval is infinite.

    Raises:
        ValueError: if `values` is empty.
    """
    if not values:
        raise ValueError("a mean needs at least one value")
    mean = math.fsum(values) / len(values)
    m = len(values) if clusters is None else len(set(clusters))
    if m == 1:
        return (mean, -math.inf, math.inf)
    half = student_t(m - 1) * _standard_error(values, mean, clusters)
    return (mean, mean - half, mean + half)


def score_interval(
    values: Sequence[float], clusters: Sequence[Hashable]
) -> tuple[float, float, float]:
    """`mean_interval`; values that are all 0 or 1 are an event, which gets the bounds of a share.

    Raises:
        ValueError: if `values` is empty.
    """
    mean, low, high = mean_interval(values, clusters)
    if set(values) <= {0.0, 1.0}:
        n = effective_n(values, clusters)
        low, high = wilson(mean * n, n) if n > 1 else (-math.inf, math.inf)
    return (mean, low, high)


def effective_n(values: Sequence[float], clusters: Sequence[Hashable]) -> float:
    """Effective sample size of n clustered 0/1 values, at most n.

    n is divided by the design effect: the squared cluster-robust standard error over that of
    independent values. If all values are equal, the dependence cannot be estimated and is taken to
    be complete: the design effect is then Σ n_c²/n for clusters of n_c values. The result is
    multiplied by (t_{n-1}/t_{m-1})², because m clusters estimate the design effect less precisely.
    """
    n = len(values)
    sizes = defaultdict[Hashable, int](int)
    for cluster in clusters:
        sizes[cluster] += 1
    m = len(sizes)
    if m == n:
        return float(n)
    most = sum(size * size for size in sizes.values()) / n
    if m == 1:
        return 1.0
    mean = math.fsum(values) / n
    independent = _standard_error(values, mean, None)
    clustered = _standard_error(values, mean, clusters)
    effect = (clustered / independent) ** 2 if independent > 0 else most
    effect = min(max(effect, 1.0), most)
    return max(1.0, n / effect * (student_t(n - 1) / student_t(m - 1)) ** 2)


def _standard_error(
    values: Sequence[float], mean: float, clusters: Sequence[Hashable] | None
) -> float:
    sums = defaultdict[Hashable, list[float]](list)
    for value, cluster in zip(values, clusters or range(len(values)), strict=True):
        sums[cluster].append(value - mean)
    m = len(sums)
    squares = math.fsum(math.fsum(deviations) ** 2 for deviations in sums.values())
    return math.sqrt(squares * m / (m - 1)) / len(values)


@functools.cache
def student_t(df: int) -> float:
    """Two-sided 95% point of Student's t with `df` degrees of freedom, to a relative error of 1e-8.

    Up to 1,000 degrees of freedom it comes from the distribution's closed form (Abramowitz and
    Stegun, 26.7.3 and 26.7.4), above that from its expansion around the normal (26.7.5).

    Raises:
        ValueError: if `df` is below 1.
    """
    if df < 1:
        raise ValueError(f"Student's t needs at least 1 degree of freedom, got {df}")
    z = Z95
    if df > 1000:
        first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
        return z + first / df + second / df**2
    low, high = z, 13.0  # 12.7 at one degree of freedom
    while high - low > 1e-10:
        middle = (low + high) / 2
        low, high = (middle, high) if _coverage(middle, df) < 0.95 else (low, middle)
    return (low + high) / 2


def _coverage(t: float, df: int) -> float:
    """Probability that Student's t lies between -t and t."""
    angle = math.atan(t / math.sqrt(df))
    cosine = math.cos(angle)
    odd = df % 2
    term = cosine if odd else 1.0
    total = 0.0
    for k in range(2 + odd, df + 1, 2):  # terms up to cos^(df-2)
        total += term
        term *= cosine * cosine * (k - 1) / k
    if not odd:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + math.sin(angle) * total)
