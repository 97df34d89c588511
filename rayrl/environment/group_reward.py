"""What a score may be, and rewards that compare the episodes of a group."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rayrl.types import Episode

if TYPE_CHECKING:
    pass

__all__ = ["MOST_SCORE", "GroupReward", "group_reward", "score_of"]

MOST_SCORE = 1e12  # squares of it, and sums over a batch of them, are still finite in float32

GroupRewardFunction = Callable[[Sequence[Episode]], Sequence[float]]
"""Episodes of one group in index order -> one score each."""


@dataclass(frozen=True)
class GroupReward:
    """A reward that compares the episodes of a group; made by `group_reward`."""

    function: GroupRewardFunction
    weight: float = 1.0
    seat: str | None = None  # None: the same score for every seat


def group_reward(
    function: GroupRewardFunction, weight: float = 1.0, *, seat: str | None = None
) -> GroupReward:
    """A reward computed over a whole group, for the `rewards` of `env`.

    Args:
        function: gets the group's episodes that have scores, in index order, and returns one finite
            score for each.
        weight: what the score is multiplied by in the reward.
        seat: who gets it; by default every seat.
    """
    return GroupReward(function, weight, seat)


def score_of(value: Any) -> float:
    """A score as a number that can be learned from: a number of Python, numpy or torch, or a bool.

    Raises:
        ValueError: it is not a number, not finite, or beyond `MOST_SCORE`; says which.
    """
    unreal = isinstance(value, numbers.Complex) and not isinstance(value, numbers.Real)
    if unreal or isinstance(value, str | bytes):  # of which float() would make something
        raise ValueError("it is not a real number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    except (TypeError, ValueError) as error:
        raise ValueError("it is not a real number") from error
    if not math.isfinite(number):
        raise ValueError("it is not finite")
    if abs(number) > MOST_SCORE:
        raise ValueError(f"its size must be at most {MOST_SCORE:g}")
    return number
