"""Validate scores, and declare rewards that compare the episodes of a group."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rayrl.types import Episode

__all__ = ["MAX_SCORE", "GroupReward", "group_reward", "score_of"]

MAX_SCORE = 1e12  # squares of it, and sums over a batch of them, are still finite in float32

GroupRewardFunction = Callable[[Sequence[Episode]], Sequence[float]]
"""Maps the episodes of a group, in index order, to one score each."""


@dataclass(frozen=True)
class GroupReward:
    """A reward that compares the episodes of a group; created by `group_reward`."""

    function: GroupRewardFunction
    weight: float = 1.0
    seat: str | None = None  # None: the same score for every seat


def group_reward(
    function: GroupRewardFunction, weight: float = 1.0, *, seat: str | None = None
) -> GroupReward:
    """Declare a reward computed over a whole group, for the `rewards` of `env`.

    Args:
        function: takes the group's episodes that have scores, in index order, and returns one
            finite score per episode.
        weight: weight of the score in the reward.
        seat: the seat that gets the score; by default every seat.
    """
    return GroupReward(function, weight, seat)


def score_of(value: Any) -> float:
    """Convert a score to a float: a bool, or a Python, numpy or torch number.

    Raises:
        ValueError: it is not a number, not finite, or beyond `MAX_SCORE`; says which.
    """
    is_complex = isinstance(value, numbers.Complex) and not isinstance(value, numbers.Real)
    if is_complex or isinstance(value, str | bytes):  # float() would accept some of these
        raise ValueError("it is not a real number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    except (TypeError, ValueError) as error:
        raise ValueError("it is not a real number") from error
    if not math.isfinite(number):
        raise ValueError("it is not finite")
    if abs(number) > MAX_SCORE:
        raise ValueError(f"its absolute value must be at most {MAX_SCORE:g}")
    return number
