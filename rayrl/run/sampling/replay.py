"""Play the tasks again that went worst, with a floor of uniform draws.

This is prioritized level replay (M. Jiang, E. Grefenstette and T. Rocktäschel, ICML 2021) with
another score. A task is remembered when the rewards inside its group differ, so that something can
be learned from it, and until they have been alike `PATIENCE` times in a row: what always fails is
not worth the samples, and what always succeeds has been learned. `train.uniform_share` of the
groups are drawn as if nothing had been played; each of the others plays the remembered task whose
latest group had the lowest mean reward, or a new one where all are being played.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

from rayrl.config import Config
from rayrl.environment.environment import Environment
from rayrl.learner.advantage import has_spread
from rayrl.rollout.rollout import GroupPlan
from rayrl.run.sampling.task_sampler import UniformShare, group_plan
from rayrl.types import Group, derive_seed

__all__ = ["ReplaySampler"]

REMEMBERED = 1000  # tasks at most, those that went worst
PATIENCE = 3  # groups without spread in a row until a task is forgotten


@dataclass(slots=True)
class _Memory:
    """A task that may be played again.

    Attributes:
        origin: index of the group that it was last drawn anew for, which tells its seed and u.
        reward: mean of its latest group, over trainable seats.
        alike: groups without spread in a row, up to the latest.
    """

    origin: int
    reward: float
    alike: int = 0


class ReplaySampler:
    """The `TaskSampler` of train.task_sampling=replay.

    A task of a function is known by the group that drew it, one of a sequence by its place there.
    """

    def __init__(self, environment: Environment, config: Config) -> None:
        self._environment, self._train = environment, config.train
        self._seed = derive_seed(config.run.seed, config.run.name, "train")
        self._uniform = UniformShare(environment, config.train, self._seed)
        self._known: dict[int, _Memory] = {}
        self._drawn: dict[int, int] = {}  # origins of groups that were not observed yet

    def plan(self, index: int) -> GroupPlan:
        """The plan of the index-th group."""
        if index not in self._drawn:
            self._drawn[index] = index if self.is_uniform(index) else self._draw(index)
        origin = self._drawn[index]
        task = self._environment.task(derive_seed(self._seed, "task", origin), self._u(origin))
        return group_plan(self._environment, self._train, self._seed, index, task)

    def is_uniform(self, index: int) -> bool:
        """Whether the group is one of the uniform draws."""
        return self._uniform.has(index)

    def draws(self) -> dict[int, int]:
        """Of groups that were planned and not observed yet, the one that first drew the task."""
        return dict(self._drawn)

    def observe(self, groups: Mapping[int, Group]) -> dict[str, float]:
        """Take note of a batch's groups; returns how those went that were played again."""
        again = []
        for index, group in sorted(groups.items()):
            origin = self._drawn.pop(index)
            if not group.complete:
                continue
            mean = statistics.fmean(
                episode.rewards[seat] for episode in group.episodes for seat in group.trainable
            )
            if origin != index:
                again.append(mean)
            key = self._key(origin)
            known = self._known.pop(key, None)
            alike = 0 if has_spread(group) else PATIENCE if known is None else known.alike + 1
            if alike < PATIENCE:
                self._known[key] = _Memory(origin, mean, alike)
        self._known = dict(self._worst_first()[:REMEMBERED])
        metrics = {"replay/known": float(len(self._known)), "replay/groups": float(len(again))}
        return metrics | ({"replay/reward": statistics.fmean(again)} if again else {})

    def save(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        known = {str(key): list(astuple(memory)) for key, memory in sorted(self._known.items())}
        drawn = {str(index): origin for index, origin in sorted(self._drawn.items())}
        return {"known": known, "drawn": drawn}

    def load(self, state: Mapping[str, Any], draws: Mapping[int, int]) -> None:
        """Continue from what `save` gave, and from draws that were logged since."""
        self._known = {int(key): _Memory(*data) for key, data in state.get("known", {}).items()}
        drawn = {int(index): origin for index, origin in state.get("drawn", {}).items()}
        self._drawn = drawn | dict(draws)

    def _draw(self, index: int) -> int:
        """The origin of a group that is no uniform draw: its own index for a new task."""
        playing = {self._key(origin) for origin in self._drawn.values()}
        waiting = (one.origin for key, one in self._worst_first() if key not in playing)
        return next(waiting, index)

    def _worst_first(self) -> list[tuple[int, _Memory]]:
        """What is known, in the order in which it is played again; of equals, the latest first."""
        return sorted(self._known.items(), key=lambda one: (one[1].reward, -one[1].origin))

    def _u(self, origin: int) -> float:
        uniform = self._uniform
        return uniform.u(origin) if uniform.has(origin) else uniform.other(origin)

    def _key(self, origin: int) -> int:
        source = self._environment.source
        return int(self._u(origin) * len(source)) if isinstance(source, Sequence) else origin
