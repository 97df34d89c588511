"""Scores of finished episodes: read, and completed by an environment's group rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rayrl.environment.environment import Environment
from rayrl.environment.group_reward import GroupReward, score_of
from rayrl.environment.randomness import EpisodeRandom
from rayrl.errors import EnvError, describe_error, error_message, format_traceback, safe_repr
from rayrl.types import Episode, Failure

__all__ = ["scores_of", "with_group_rewards"]


def scores_of(episode: Episode) -> dict[str, float]:
    """Flatten an episode's scores: `win` with one seat, `x.win` with several."""
    if len(episode.scores) == 1:
        (scores,) = episode.scores.values()
        return dict(scores)
    return {
        f"{seat}.{name}": value
        for seat, scores in episode.scores.items()
        for name, value in scores.items()
    }


def with_group_rewards(env: Environment, episodes: Sequence[Episode]) -> list[Episode]:
    """Add group rewards to the `scores` and `rewards` of a group's episodes.

    They are always recomputed from scratch over the episodes that did not fail; call this again
    after replacing an episode. If the code of a group reward fails, every episode of the group
    fails.
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
        what = error_message(error) if isinstance(error, EnvError) else describe_error(error)
        where = f"group reward {name!r} of environment {env.name!r} on {safe_repr(valid[0].task)}"
        failure = Failure("env", f"{where}: {what}", format_traceback(error))
        return [
            replace(episode, scores={}, rewards={}, failure=episode.failure or failure)
            for episode in episodes
        ]
    new = {
        episode.index: replace(episode, scores=scores, rewards=own)
        for episode, scores, own in zip(valid, added, rewards, strict=True)
    }
    return [new.get(episode.index, episode) for episode in episodes]


def _group_scores(
    env: Environment, name: str, group: GroupReward, episodes: Sequence[Episode]
) -> list[float]:
    with EpisodeRandom(episodes[0].task.seed, episodes[0].id.rpartition("/")[0], name):
        values = list(group.function(tuple(episodes)))
    if len(values) != len(episodes):
        raise EnvError(f"returned {len(values)} scores for {len(episodes)} episodes")
    for k, value in enumerate(values):
        try:
            values[k] = score_of(value)
        except ValueError as error:
            raise EnvError(f"returned {safe_repr(value)} as a score: {error}") from error
    if group.seat is not None and group.seat not in env.seats:
        raise EnvError(f"is for seat {group.seat!r}, which {env.name!r} does not have")
    return values
