"""95% confidence intervals for the two things an evaluation reports: shares and means.

A share is an event counted over independent episodes; its interval is Wilson's score interval
(E. B. Wilson, JASA 22, 1927, p. 209), which stays inside [0, 1] and says something useful at
0 of n, where the textbook `p ± z·√(p(1-p)/n)` claims certainty.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["Z95", "mean_interval", "wilson"]

Z95 = 1.959963984540054  # two-sided 95% point of the standard normal


def wilson(count: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's interval of a share seen `count` times in `n`; `(0, 1)` when nothing was seen.

    With p = count/n: centre (p + z²/2n) / (1 + z²/n), half width
    z·√(p(1-p)/n + z²/4n²) / (1 + z²/n).

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
    # At 0 and n the bound is exact; rounding would leave 1e-17 there.
    low = 0.0 if count == 0 else max(0.0, centre - half)
    high = 1.0 if count == n else min(1.0, centre + half)
    return (low, high)


def mean_interval(values: Sequence[float], z: float = Z95) -> tuple[float, float, float]:
    """Mean of `values` and its normal interval `mean ± z·s/√n` (s with n-1): `(mean, low, high)`.

    One value has no spread to estimate from, so its interval is infinitely wide.

    Raises:
        ValueError: if `values` is empty.
    """
    n = len(values)
    if n == 0:
        raise ValueError("a mean needs at least one value")
    mean = math.fsum(values) / n
    if n == 1:
        return (mean, -math.inf, math.inf)
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    half = z * math.sqrt(variance / n)
    return (mean, mean - half, mean + half)
