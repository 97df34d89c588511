"""The driver's side of playing: who plays what, and what happens to what goes wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, overload

from rayrl.cluster.workers.env_worker import WorkerJob, start_worker
from rayrl.cluster.workers.scaling import Load
from rayrl.cluster.workers.turn_log import start_recorder
from rayrl.cluster.workers.worker_pool import WorkerPool
from rayrl.cluster.workers.worker_slot import kill
from rayrl.errors import RunFailed, shown
from rayrl.rollout.rollout import GroupPlan
from rayrl.types import Episode, Failure, Group

__all__ = ["CollectedGroups", "Rollouts", "is_stale", "none_left", "sort_out"]

FORGET_AT = 32  # groups that have ended, of which the recorder is told at once


@dataclass(frozen=True, slots=True)
class CollectedGroups(Sequence[Group]):
    """What came of a batch of plans; as a sequence, its complete groups.

    Attributes:
        groups: complete groups in the order of their plans.
        dropped: groups with an episode that failed or is too old; never trained on.
        env_failures: episodes whose environment failed.
        infra_failures: episodes that failed otherwise, after their retries.
        refused: episodes whose conversation a server refuses; they are not played again.
        stale: episodes made with older weights than asked for.
        stopped: groups that became too old; their tasks are played again.
        waiting: complete groups that are there for a later batch.
        live: groups that are being played.
        idle_s: seconds since the last batch in which nothing was played; None with max_lag=0, where
            play waits for the learner by design.
        load: what the workers had to do.
    """

    groups: tuple[Group, ...]
    dropped: tuple[Group, ...] = ()
    env_failures: int = 0
    infra_failures: int = 0
    refused: int = 0
    stale: int = 0
    stopped: tuple[Group, ...] = ()
    waiting: int = 0
    live: int = 0
    idle_s: float | None = None
    load: Load | None = None

    def __len__(self) -> int:
        return len(self.groups)

    @overload
    def __getitem__(self, index: int) -> Group: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Group]: ...

    def __getitem__(self, index: int | slice) -> Group | Sequence[Group]:
        return self.groups[index]


def sort_out(groups: Sequence[Group], min_version: int, budget: float, env: str) -> CollectedGroups:
    """Separate what can be trained on, and stop a run whose environment fails too often.

    Args:
        groups: in the order of their plans.
        min_version: tokens of older weights make an episode stale.
        budget: share of the episodes whose environment may fail.
        env: the environment's name, for the message.

    Raises:
        RunFailed: the budget is exceeded, or no group is left, unless a server refused all of them:
            an evaluation has that as its result.
    """
    episodes = [episode for group in groups for episode in group.episodes]
    failed = [(e, e.failure) for e in episodes if e.failure is not None]
    by_env = [(e, f) for e, f in failed if f.kind == "env"]
    refused = sum(f.kind == "refused" for _, f in failed)
    if len(by_env) > budget * len(episodes):
        raise RunFailed(
            f"environment {env!r} failed in {len(by_env)} of {len(episodes)} episodes, more than "
            f"env.failure_budget={budget:g} allows.\n{_details(*by_env[0])}"
        )
    kept = tuple(
        g for g in groups if g.complete and not any(is_stale(e, min_version) for e in g.episodes)
    )
    if groups and not kept and not (failed and refused == len(failed)):
        raise none_left(groups, min_version)
    return CollectedGroups(
        groups=kept,
        dropped=tuple(g for g in groups if g not in kept),
        env_failures=len(by_env),
        infra_failures=len(failed) - len(by_env) - refused,
        refused=refused,
        stale=sum(is_stale(e, min_version) for e in episodes),
    )


def none_left(groups: Sequence[Group], min_version: int) -> RunFailed:
    """What stops a run that has nothing to go on with."""
    failed = [(e, e.failure) for group in groups for e in group.episodes if e.failure is not None]
    what = _details(*failed[0]) if failed else f"all are older than version {min_version}"
    return RunFailed(f"none of {len(groups)} groups is complete.\n{what}")


def is_stale(episode: Episode, min_version: int) -> bool:
    """Whether a token of it was made with older weights."""
    return episode.min_version is not None and episode.min_version < min_version


def _broken(group: Group) -> bool:
    """Whether an episode failed for no fault of its environment: worth playing once more."""
    kinds = {e.failure.kind for e in group.episodes if e.failure is not None}
    return "infra" in kinds and "stopped" not in kinds


def _details(episode: Episode, failure: Failure) -> str:
    return "\n".join(
        part
        for part in (
            f"episode {episode.id}: {failure.message}",
            f"task: {shown(episode.task)}",
            failure.traceback.rstrip(),
        )
        if part
    )


class Rollouts:
    """Plays plans on a set of workers.

    Results do not depend on who plays what, nor on how many there are. A worker that dies or hangs
    is replaced, and what it had not finished is played again: a group that takes down a second
    worker, alone on it, is recorded as a failure of the environment.

    Args:
        turns: a file for those of live episodes. Where an earlier driver has left one, its episodes
            go on when their plans are played again.

    Attributes:
        job: what the workers play.
    """

    def __init__(
        self,
        job: WorkerJob,
        start: Callable[[WorkerJob, Any], Any] = start_worker,
        turns: Path | None = None,
    ) -> None:
        self.job = job
        self._recorder = start_recorder(turns)
        self._pool = WorkerPool(job, partial(start, job, self._recorder), self._recorder)

    @property
    def restarts(self) -> int:
        """Workers replaced so far."""
        return self._pool.restarts

    async def ready(self) -> None:
        """Wait until the workers can play; those that may come later are not waited for.

        Raises:
            ConfigError: a setting the workers cannot work with.
        """
        await self._pool.ready()

    async def collect(
        self,
        plans: Sequence[GroupPlan],
        min_version: int = 0,
        on_group: Callable[[Group], None] = lambda group: None,
        known: Mapping[str, Group] | None = None,
    ) -> CollectedGroups:
        """Play all plans.

        Args:
            plans: with ids that differ.
            min_version: no token may come from older weights.
            on_group: called as each group finishes, in any order.
            known: groups of these plans that were played before, by id.

        Returns:
            What was played and known; after `wind_down`, of some plans only.

        Raises:
            RunFailed: see `sort_out`.
        """
        done: dict[str, Group] = dict(known or {})
        self._pool.wind_up()

        def keep(group: Group) -> None:
            done[group.id] = group
            on_group(group)

        await self.play([p for p in plans if p.id not in done], min_version, keep)
        env = self.job.config.env
        groups = [done[plan.id] for plan in plans if plan.id in done]
        return sort_out(groups, min_version, env.failure_budget, env.name)

    async def play(
        self, plans: Sequence[GroupPlan], min_version: int, keep: Callable[[Group], None]
    ) -> None:
        """Play plans, those with an infrastructure failure once more. Calls may overlap.

        Args:
            keep: called with each group as it finishes, and again if it was played once more.
        """
        broken: set[str] = set()
        over: list[str] = []

        def look(group: Group) -> None:
            keep(group)  # first: its turns are on the disk until the group is
            if _broken(group):
                broken.add(group.id)
            else:
                over.append(group.id)
                if len(over) >= FORGET_AT:
                    self.forget(over.copy())
                    over.clear()

        try:
            await self._pool.play(plans, min_version, look)
        finally:
            if over:
                self.forget(over)
        again = [plan for plan in plans if plan.id in broken]
        await self._pool.play(again, min_version, keep, again=True)
        if again:
            self.forget([plan.id for plan in again])

    def forget(self, groups: Sequence[str]) -> None:
        """These groups, by id, need not be brought back."""
        self._pool.forget(groups)

    def stop(self, plans: Sequence[str], oldest: int) -> None:
        """End those of these plans, by id, that began with weights older than `oldest`.

        Their groups come with what was played, and with failures of kind "stopped".
        """
        self._pool.stop(plans, oldest)

    def wind_down(self) -> None:
        """Let `collect` play what is begun and begin nothing more."""
        self._pool.wind_down()

    def load(self) -> Load:
        """What the workers have to do."""
        return self._pool.load()

    def close(self) -> None:
        """End the workers."""
        self._pool.close()
        kill(self._recorder)
