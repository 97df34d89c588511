"""Which task the index-th group of a run plays."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from rayrl.config import Config
from rayrl.environment.environment import Environment
from rayrl.rollout.rollout import GroupPlan
from rayrl.run.stage import check_tasks
from rayrl.types import Group, derive_seed

__all__ = ["TaskSampler", "UniformSampler"]


class TaskSampler(Protocol):
    """Plans the groups of a run by their index; what was played may decide about those to come.

    A plan is a function of the settings, the index and the batches that were observed before it was
    first asked for. A run that resumes gives a new sampler `load`, then the batches since.
    """

    def plan(self, index: int) -> GroupPlan:
        """The plan of the index-th group; the same again until the group has been observed."""
        ...

    def is_uniform(self, index: int) -> bool:
        """Whether a group that is not observed yet was drawn regardless of what had been played."""
        ...

    def draws(self) -> dict[int, Any]:
        """What of groups that were planned, not observed, does not follow from their index; by it.

        Plain data. It is logged before the group begins, which therefore plays the same task again
        after a restart.
        """
        ...

    def observe(self, groups: Mapping[int, Group]) -> dict[str, float]:
        """Take note, by index, of all groups that left with a batch: taken, rejected or failed.

        Called once per batch, in order; again after a `load` that went back before the batch.

        Returns:
            Metrics of the batch's step.
        """
        ...

    def save(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        ...

    def load(self, state: Mapping[str, Any], draws: Mapping[int, Any]) -> None:
        """Continue from what `save` gave (empty where nothing was), and `draws` logged since."""
        ...


class UniformSampler:
    """Every part of the task source alike: each step has a task of every stratum, see `tasks`."""

    def __init__(self, environment: Environment, config: Config) -> None:
        self._environment, self._train = environment, config.train
        self._seed = derive_seed(config.run.seed, config.run.name, "train")
        self._of_step = functools.lru_cache(maxsize=8)(self._plans)

    def plan(self, index: int) -> GroupPlan:
        """The plan of the index-th group."""
        step, k = divmod(index, self._train.groups)
        return self._of_step(step)[k]

    def is_uniform(self, index: int) -> bool:
        """All of them are."""
        return True

    def draws(self) -> dict[int, Any]:
        """None: a plan follows from its index."""
        return {}

    def observe(self, groups: Mapping[int, Group]) -> dict[str, float]:
        """Nothing that was played changes what is drawn."""
        return {}

    def save(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load(self, state: Mapping[str, Any], draws: Mapping[int, Any]) -> None:
        """Nothing was saved."""

    def _plans(self, step: int) -> Sequence[GroupPlan]:
        n = self._train.groups
        tasks = self._environment.tasks(self._seed, n, start=step * n)
        check_tasks(self._environment, tasks)
        return [
            GroupPlan(f"{step}-{k}", task, self._train.group_size, derive_seed(self._seed, step, k))
            for k, task in enumerate(tasks)
        ]
