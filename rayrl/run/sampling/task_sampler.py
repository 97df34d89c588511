"""Which task the index-th group of a run plays."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from rayrl.config import Config, TrainConfig
from rayrl.environment.environment import Environment, stratified
from rayrl.environment.rows import Rows
from rayrl.rollout.rollout import GroupPlan
from rayrl.run.stage import check_tasks
from rayrl.types import Group, Task, derive_seed

__all__ = ["TaskSampler", "UniformSampler", "UniformShare", "group_plan"]


def group_plan(
    environment: Environment, train: TrainConfig, seed: int, index: int, task: Task
) -> GroupPlan:
    """The plan of the index-th group of a run: its id names its step, its seed is of the run's."""
    check_tasks(environment, [task])
    step, k = divmod(index, train.groups)
    return GroupPlan(f"{step}-{k}", task, train.group_size, derive_seed(seed, step, k))


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
        return [
            group_plan(self._environment, self._train, self._seed, step * n + k, task)
            for k, task in enumerate(tasks)
        ]


class UniformShare:
    """The groups that are uniform draws all the same where what was played decides about the rest.

    Which ones they are follows from their index alone, evenly spaced: they are an unbiased sample
    of what the policy can do, and with `train.uniform_share=1` they are exactly the draws of
    `UniformSampler`.
    """

    def __init__(self, environment: Environment, train: TrainConfig, seed: int) -> None:
        self._source, self._train, self._seed = environment.source, train, seed
        self._per_step = max(round(train.groups * train.uniform_share), 1)

    def has(self, index: int) -> bool:
        """Whether the group is one of them."""
        return self._before(index + 1) > self._before(index)

    def u(self, index: int) -> float:
        """The u of one of them: a stratum of its own in the step, or the epoch's next row."""
        before = self._before(index)
        if isinstance(self._source, Rows):
            return (self._source.place(self._seed, before) + 0.5) / len(self._source)
        return stratified(self._seed, index, before % self._per_step, self._per_step)

    def other(self, index: int) -> float:
        """A number in [0, 1) for a group that is none of them; those of a step cover it evenly."""
        n = max(self._train.groups - self._per_step, 1)
        return stratified(self._seed, index, (index - self._before(index)) % n, n)

    def _before(self, index: int) -> int:
        """How many there are among the groups before this one."""
        return int(index * self._train.uniform_share)
