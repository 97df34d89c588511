"""Rewards that compare the episodes of a group: declared by `group_reward`, added at its end."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rayrl.errors import EnvError, described, message_of, shown, traceback_of
from rayrl.randomness import EpisodeRandom
from rayrl.types import Episode, Failure

if TYPE_CHECKING:
    from rayrl.env import Environment

__all__ = ["MOST_SCORE", "GroupReward", "group_reward", "score_of", "with_group_rewards"]

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


def with_group_rewards(env: Environment, episodes: Sequence[Episode]) -> list[Episode]:
    """Episodes of one group with its group rewards in `scores` and `rewards`.

    They are computed over the episodes that did not fail, always from scratch: call it again when a
    group was repaired. If a group reward's own code fails, so does every episode of the group.
    """
    valid = [episode for episode in episodes if episode.failure is None]
    if not env.group_rewards or not valid:
        return list(episodes)
    added: list[dict[str, dict[str, float]]] = [
        {seat: dict(of_seat) for seat, of_seat in episode.scores.items()} for episode in valid
    ]
    name = ""
    try:
        for name, group in env.group_rewards.items():
            values = _group_scores(env, name, group, valid)
            for scores, value in zip(added, values, strict=True):
                for seat in scores if group.seat is None else (group.seat,):
                    scores[seat][name] = value
        rewards = [{seat: env.reward(own) for seat, own in scores.items()} for scores in added]
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the environment's code: SystemExit would end every episode
        said = message_of(error) if isinstance(error, EnvError) else described(error)
        where = f"group reward {name!r} of environment {env.name!r} on {shown(valid[0].task)}"
        failure = Failure("env", f"{where}: {said}", traceback_of(error))
        return [
            replace(episode, scores={}, rewards={}, failure=episode.failure or failure)
            for episode in episodes
        ]
    new = {
        episode.index: replace(episode, scores=scores, rewards=own)
        for episode, scores, own in zip(valid, added, rewards, strict=True)
    }
    return [new.get(episode.index, episode) for episode in episodes]


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


def _group_scores(
    env: Environment, name: str, group: GroupReward, episodes: Sequence[Episode]
) -> list[float]:
    with EpisodeRandom(episodes[0].task.seed, episodes[0].id.rpartition("/")[0], name):
        values = list(group.function(tuple(episodes)))
    if len(values) != len(episodes):
        raise EnvError(f"returned {len(values)} scores for {len(episodes)} episodes")
    for place, value in enumerate(values):
        try:
            values[place] = score_of(value)
        except ValueError as error:
            raise EnvError(f"returned {shown(value)} as a score: {error}") from error
    if group.seat is not None and group.seat not in env.seats:
        raise EnvError(f"is for seat {group.seat!r}, which {env.name!r} does not have")
    return values
