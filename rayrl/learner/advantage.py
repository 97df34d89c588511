"""How much better than its siblings an episode, or one of its turns, did. Pure functions.

Rewards are compared only inside a group and a seat: an advantage is a function
`(inputs: AdvantageInputs) -> (G, turns)` of one group and seat. A group without spread gives exact
zeros with every method here, and then costs the learner nothing.

Methods (`algo.advantage`):

- "grpo": r − mean of the group (arXiv 2402.03300, §4.1.2).
- "rloo": r − mean of the *others*, = G/(G−1) · (r − mean) (arXiv 2402.14740, eq. 8).
- "gigpo": the episode's advantage plus `step_weight` times the turn's, which compares discounted
  returns among turns of the group taken in the same `state` (arXiv 2505.10978, eq. 3, 6–8).

They are divided by (`algo.normalize`): "std", the population standard deviation of the compared
set; "none" (Dr. GRPO, arXiv 2503.20783; GiGPO's F_norm = 1); or "batch_std", that of the centred
rewards of all groups of the batch, per environment and seat (REINFORCE++, arXiv 2501.03262). Then
the step level is divided by the same number as the episode level, so that the two keep their
proportion.

Deviations, numbered: (1) a set whose spread (maximum − minimum) is at most `SPREAD_FLOOR` counts as
equal and gives zeros, instead of dividing by std + ε: with discounted or summed floats, equal play
can differ in the last bit, and a tiny std would blow that up to ±1. (2) The reward of an episode
comes at its end, so a turn's return is reward · gamma^(turns after it); where conversations branch,
the turns on the longest way on from it. (3) Several turns of one episode in the same state are
separate members of that state's set, as in the paper. (4) A group whose episodes all got the same
reward gives zeros at the step level too: there discounting alone would teach it to end sooner, or
later where the reward is negative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rayrl.config import AlgoConfig
from rayrl.config.registry import Registry, function_name
from rayrl.conversations import turns_after
from rayrl.errors import ConfigError, NumericsError, did_you_mean, safe_repr
from rayrl.types import Group, Turn

__all__ = [
    "ADVANTAGES",
    "NORMALIZERS",
    "SPREAD_FLOOR",
    "Advantage",
    "AdvantageInputs",
    "advantages",
    "centred",
    "gigpo",
    "grpo",
    "has_spread",
    "leave_one_out",
    "rloo",
    "step_level",
]

SPREAD_FLOOR = 1e-6  # in units of reward

NORMALIZERS = ("none", "std", "batch_std")


@dataclass(frozen=True, slots=True)
class AdvantageInputs:
    """The G episodes of one group, as one trainable seat played them.

    Attributes:
        group: the group, its episodes in index order.
        seat: whose turns are compared.
        rewards: (G,) of the seat.
        centred: (G,) rewards minus their mean; exact zeros where there is no spread.
        scale: what centred rewards are divided by, as `algo.normalize` says: the population
            standard deviation of `centred`, that of the batch, or 1; never 0.
        algo: settings, of which a method reads what it needs.
    """

    group: Group
    seat: str
    rewards: Sequence[float]
    centred: Sequence[float]
    scale: float
    algo: AlgoConfig

    @property
    def turns(self) -> list[tuple[Turn, ...]]:
        """(G, turns) of the seat."""
        return [episode.turns_of(self.seat) for episode in self.group.episodes]


Advantage = Callable[[AdvantageInputs], Sequence[Sequence[float]]]
"""-> (G, turns): for each episode, one finite number per turn of the seat."""

ADVANTAGES: Registry[Advantage] = Registry("algo.advantage")


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


def has_spread(group: Group) -> bool:
    """Whether the episodes' rewards differ, for any trainable seat: else all advantages are 0."""
    return any(
        not _flat([episode.rewards[seat] for episode in group.episodes]) for seat in group.trainable
    )


def leave_one_out(rewards: Sequence[float]) -> list[float]:
    """(G,) r − mean of the others; exact zeros where there is no spread."""
    n = len(rewards)
    return [d * n / (n - 1) for d in centred(rewards)] if n > 1 else [0.0] * n


def step_level(
    states: Sequence[Sequence[str]],
    after: Sequence[Sequence[int]],
    rewards: Sequence[float],
    gamma: float,
    *,
    divide_by_std: bool,
) -> list[list[float]]:
    """GiGPO's step advantages of one group and seat.

    Args:
        states: (G, turns) key of the state each turn was taken in.
        after: (G, turns) number of turns that followed.
        rewards: (G,).
        gamma: discount per turn.

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
        returns = [rewards[i] * gamma ** after[i][t] for i, t in members]
        deviations = centred(returns)
        scale = _std(deviations) if divide_by_std and any(deviations) else 1.0
        for (i, t), deviation in zip(members, deviations, strict=True):
            out[i][t] = deviation / scale
    return out


@ADVANTAGES.register("grpo")
def grpo(inputs: AdvantageInputs) -> list[list[float]]:
    """The episode's centred reward, divided by the scale, at each of its turns."""
    whole = [value / inputs.scale for value in inputs.centred]
    return [[value] * len(own) for value, own in zip(whole, inputs.turns, strict=True)]


@ADVANTAGES.register("rloo")
def rloo(inputs: AdvantageInputs) -> list[list[float]]:
    """The reward minus the mean of the others, divided by the scale, at each turn."""
    whole = [value / inputs.scale for value in leave_one_out(inputs.rewards)]
    return [[value] * len(own) for value, own in zip(whole, inputs.turns, strict=True)]


@ADVANTAGES.register("gigpo")
def gigpo(inputs: AdvantageInputs) -> Sequence[Sequence[float]]:
    """That of `grpo`, plus `step_weight` times the turn's among turns in the same state."""
    algo = inputs.algo
    episode_level = grpo(inputs)
    if not any(inputs.centred):
        return episode_level
    by_std = algo.normalize == "std"  # then each state's set is divided by its own
    steps = step_level(
        [[turn.state for turn in own] for own in inputs.turns],
        [turns_after(own) for own in inputs.turns],
        inputs.rewards,
        algo.gamma,
        divide_by_std=by_std,
    )
    scale = 1.0 if by_std else inputs.scale
    return [
        [value + algo.step_weight * (step / scale) for value, step in zip(values, own, strict=True)]
        for values, own in zip(episode_level, steps, strict=True)
    ]


def advantages(
    groups: Sequence[Group], algo: AlgoConfig, advantage: str | Advantage | None = None
) -> list[dict[tuple[int, str], tuple[float, ...]]]:
    """One advantage per turn of every trainable seat.

    Args:
        groups: complete groups (every episode has a reward for every trainable seat).
        advantage: instead of `algo.advantage`: a name in `ADVANTAGES`, `module:function`,
            `path/to/file.py:function`, or a function.

    Returns:
        For each group, by (episode index, seat), one number per turn of that seat.

    Raises:
        ConfigError: an unknown method or normalizer, or a function that returned something else
            than (G, turns) numbers.
        NumericsError: a function returned a number that is not finite.
        ValueError: a group has an episode without a reward.
    """
    if algo.normalize not in NORMALIZERS:
        raise ConfigError(
            f"algo.normalize={algo.normalize!r} is not one of {', '.join(NORMALIZERS)}."
            f"{did_you_mean(algo.normalize, NORMALIZERS)}"
        )
    function = ADVANTAGES.resolve(algo.advantage if advantage is None else advantage)
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
    envs = [group.episodes[0].env if group.episodes else "" for group in groups]
    of_batch = _batch_scales(envs, raw) if algo.normalize == "batch_std" else {}
    out: list[dict[tuple[int, str], tuple[float, ...]]] = []
    for env, group, by_seat in zip(envs, groups, raw, strict=True):
        found: dict[tuple[int, str], tuple[float, ...]] = {}
        for seat, deviations in by_seat.items():
            scale = of_batch.get((env, seat), 1.0)
            if algo.normalize == "std" and any(deviations):
                scale = _std(deviations)
            rewards = [episode.rewards[seat] for episode in group.episodes]
            inputs = AdvantageInputs(group, seat, rewards, deviations, scale, algo)
            for episode, values in zip(group.episodes, _checked(function, inputs), strict=True):
                found[episode.index, seat] = values
        out.append(found)
    return out


def _checked(function: Advantage, inputs: AdvantageInputs) -> list[tuple[float, ...]]:
    """What a function returns for a group and seat, as (G, turns) finite floats."""
    turns = [len(own) for own in inputs.turns]
    returned = function(inputs)
    name = (
        f"the advantage {function_name(function)}, group {inputs.group.id!r}, seat {inputs.seat!r}"
    )
    try:
        values = [tuple(float(value) for value in own) for own in returned]
    except (TypeError, ValueError):
        values = []
    if [len(own) for own in values] != turns:
        raise ConfigError(
            f"{name}: returned {safe_repr(returned)}; return for each of the {len(turns)} episodes "
            f"one number per turn of the seat, here {turns}."
        )
    for k, own in enumerate(values):
        if not all(map(math.isfinite, own)):
            raise NumericsError(f"{name}, episode {k}: {list(own)} is not finite.")
    return values


def _batch_scales(
    envs: Sequence[str], raw: Sequence[Mapping[str, Sequence[float]]]
) -> dict[tuple[str, str], float]:
    """By environment and seat, the standard deviation of the centred rewards of the batch."""
    pooled: dict[tuple[str, str], list[float]] = {}
    for env, by_seat in zip(envs, raw, strict=True):
        for seat, values in by_seat.items():
            pooled.setdefault((env, seat), []).extend(values)
    return {key: _std(values) if any(values) else 1.0 for key, values in pooled.items()}
