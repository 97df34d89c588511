"""How much better than its siblings an episode, or one of its turns, did. Pure functions.

Rewards are compared only inside a group and a seat. A group without spread gives exact zeros,
whatever the method, and then costs the learner nothing.

Methods (`algo.advantage`):

- "grpo": r − mean of the group (arXiv 2402.03300, §4.1.2).
- "rloo": r − mean of the *others*, = G/(G−1) · (r − mean) (arXiv 2402.14740, eq. 8).
- "gigpo": the episode's advantage plus `step_weight` times the turn's, which compares discounted
  returns among turns of the group taken in the same `state` (arXiv 2505.10978, eq. 3, 6–8).

They are divided by (`algo.normalize`): "std", the population standard deviation of the compared
set; "none" (Dr. GRPO, arXiv 2503.20783; GiGPO's F_norm = 1); or "batch_std", that of the centred
rewards of all groups of the batch, per seat (REINFORCE++, arXiv 2501.03262). Then the step level
is divided by the same number as the episode level, so that the two keep their proportion.

Deviations, numbered: (1) a set whose spread (maximum − minimum) is at most `SPREAD_FLOOR` counts as
equal and gives zeros, instead of dividing by std + ε: with discounted or summed floats, equal play
can differ in the last bit, and a tiny std would blow that up to ±1. (2) The reward of an episode
comes at its end, so a turn's return is reward · gamma^(turns after it). (3) Several turns of one
episode in the same state are separate members of that state's set, as in the paper. (4) A group
whose episodes all got the same reward gives zeros at the step level too: there discounting alone
would teach it to end sooner, or later where the reward is negative.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rayrl.config import AlgoConfig
from rayrl.errors import ConfigError, did_you_mean
from rayrl.types import Group

__all__ = ["SPREAD_FLOOR", "advantages", "centred", "leave_one_out", "step_level"]

SPREAD_FLOOR = 1e-6  # in units of reward

METHODS = ("grpo", "rloo", "gigpo")
NORMALIZERS = ("none", "std", "batch_std")


def _flat(values: Sequence[float]) -> bool:
    return max(values) - min(values) <= SPREAD_FLOOR


def _std(deviations: Sequence[float]) -> float:
    return math.sqrt(math.fsum(d * d for d in deviations) / len(deviations))


def centred(rewards: Sequence[float]) -> list[float]:
    """(G,) r − mean; exact zeros where there is no spread."""
    if not rewards or _flat(rewards):
        return [0.0] * len(rewards)
    mean = math.fsum(rewards) / len(rewards)
    return [reward - mean for reward in rewards]


def leave_one_out(rewards: Sequence[float]) -> list[float]:
    """(G,) r − mean of the others; exact zeros where there is no spread."""
    n = len(rewards)
    return [d * n / (n - 1) for d in centred(rewards)] if n > 1 else [0.0] * n


def step_level(
    states: Sequence[Sequence[str]],
    rewards: Sequence[float],
    gamma: float,
    *,
    divide_by_std: bool,
) -> list[list[float]]:
    """GiGPO's step advantages of one group and seat.

    Args:
        states: (G, turns) key of the state each turn was taken in.
        rewards: (G,).
        gamma: discount a turn.

    Returns:
        (G, turns): the turn's discounted return against the mean of those in the same state. 0
        where nobody else of the group was in that state.
    """
    sets: dict[str, list[tuple[int, int]]] = {}
    for i, turns in enumerate(states):
        for t, state in enumerate(turns):
            sets.setdefault(state, []).append((i, t))
    out = [[0.0] * len(turns) for turns in states]
    for members in sets.values():
        returns = [rewards[i] * gamma ** (len(states[i]) - 1 - t) for i, t in members]
        deviations = centred(returns)
        scale = _std(deviations) if divide_by_std and any(deviations) else 1.0
        for (i, t), deviation in zip(members, deviations, strict=True):
            out[i][t] = deviation / scale
    return out


def advantages(
    groups: Sequence[Group], cfg: AlgoConfig
) -> list[dict[tuple[int, str], tuple[float, ...]]]:
    """One advantage a turn of every trainable seat.

    Args:
        groups: complete groups (every episode has a reward for every trainable seat).

    Returns:
        For each group, by (episode index, seat), one number per turn of that seat.

    Raises:
        ConfigError: an unknown method or normalizer.
        ValueError: a group has an episode without a reward.
    """
    _check("advantage", cfg.advantage, METHODS)
    _check("normalize", cfg.normalize, NORMALIZERS)
    raw: list[dict[str, list[float]]] = []
    for group in groups:
        for episode in group.episodes:
            missing = [seat for seat in group.trainable if seat not in episode.rewards]
            if episode.failure is not None or missing:
                raise ValueError(
                    f"group {group.id!r}: episode {episode.id!r} has no reward; repair or drop it"
                )
        raw.append(
            {
                seat: centred([episode.rewards[seat] for episode in group.episodes])
                for seat in group.trainable
            }
        )
    batch = _batch_scales(raw) if cfg.normalize == "batch_std" else {}
    return [_group(group, values, batch, cfg) for group, values in zip(groups, raw, strict=True)]


def _check(key: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ConfigError(
            f"algo.{key}={value!r} is not one of {', '.join(known)}.{did_you_mean(value, known)}"
        )


def _batch_scales(raw: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, float]:
    """By seat, the standard deviation of the centred rewards of the whole batch."""
    pooled: dict[str, list[float]] = {}
    for by_seat in raw:
        for seat, values in by_seat.items():
            pooled.setdefault(seat, []).extend(values)
    return {seat: _std(values) if any(values) else 1.0 for seat, values in pooled.items()}


def _group(
    group: Group,
    deviations: Mapping[str, Sequence[float]],
    batch: Mapping[str, float],
    cfg: AlgoConfig,
) -> dict[tuple[int, str], tuple[float, ...]]:
    out: dict[tuple[int, str], tuple[float, ...]] = {}
    for seat, values in deviations.items():
        if cfg.normalize == "std":
            scale = _std(values) if any(values) else 1.0
        else:
            scale = batch.get(seat, 1.0)
        rewards = [episode.rewards[seat] for episode in group.episodes]
        if cfg.advantage == "rloo":
            whole = [value / scale for value in leave_one_out(rewards)]
        else:
            whole = [value / scale for value in values]
        turns = [episode.turns_of(seat) for episode in group.episodes]
        steps = [[0.0] * len(own) for own in turns]
        if cfg.advantage == "gigpo" and any(values):
            steps = step_level(
                [[turn.state for turn in own] for own in turns],
                rewards,
                cfg.gamma,
                divide_by_std=cfg.normalize == "std",
            )
            steps = [[step / batch.get(seat, 1.0) for step in own] for own in steps]
        for episode, value, own in zip(group.episodes, whole, steps, strict=True):
            out[episode.index, seat] = tuple(value + cfg.step_weight * step for step in own)
    return out
