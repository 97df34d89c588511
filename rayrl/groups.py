"""Rewards that compare the episodes of a group: declared by `group_reward`, added at its end."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rayrl.errors import EnvError
from rayrl.randomness import EpisodeRandom
from rayrl.types import Episode, Failure

if TYPE_CHECKING:
    from rayrl.env import Environment

__all__ = ["GroupReward", "group_reward", "with_group_rewards"]

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
    for name, group in env.group_rewards.items():
        try:
            values = _group_scores(env, name, group, valid)
        except Exception as error:
            text = "".join(traceback.format_exception(error))
            message = f"group reward {name!r} of environment {env.name!r} on {valid[0].task!r}"
            failure = Failure("env", f"{message}: {type(error).__name__}: {error}", text)
            return [
                replace(episode, scores={}, rewards={}, failure=episode.failure or failure)
                for episode in episodes
            ]
        for scores, value in zip(added, values, strict=True):
            for seat in scores if group.seat is None else (group.seat,):
                scores[seat][name] = value
    new = {
        episode.index: replace(
            episode,
            scores=scores,
            rewards={seat: env.reward(of_seat) for seat, of_seat in scores.items()},
        )
        for episode, scores in zip(valid, added, strict=True)
    }
    return [new.get(episode.index, episode) for episode in episodes]


def _group_scores(
    env: Environment, name: str, group: GroupReward, episodes: Sequence[Episode]
) -> list[float]:
    with EpisodeRandom(episodes[0].task.seed, episodes[0].id.rpartition("/")[0], name):
        values = [float(value) for value in group.function(tuple(episodes))]
    if len(values) != len(episodes):
        raise EnvError(f"returned {len(values)} scores for {len(episodes)} episodes")
    if not all(math.isfinite(value) for value in values):
        raise EnvError(f"returned a score that is not finite: {values}")
    if group.seat is not None and group.seat not in env.seats:
        raise EnvError(f"is for seat {group.seat!r}, which {env.name!r} does not have")
    return values
