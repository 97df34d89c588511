"""The driver's side of rollouts: plans go in, groups come out, and what failed is sorted out.

A retry has one owner per level:

- a request that a replica did not answer is sent again by the worker's `BatchingClient`
  (serving/inference_client.py);
- an episode with an infrastructure failure is played again, at most `env.retries` times, by
  `play_groups` (rayrl/rollout/rollout.py);
- a group is played again by the pool's `Scheduler` (workers/scheduler.py): once if one of its
  episodes failed in spite of its retries, and whenever its worker has died.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, overload

from rayrl.cluster.actors import kill_actor
from rayrl.cluster.workers.env_worker import WorkerJob, start_worker
from rayrl.cluster.workers.turn_log import start_recorder
from rayrl.cluster.workers.worker_pool import Load, WorkerPool
from rayrl.errors import RunFailed, safe_repr
from rayrl.rollout.rollout import GroupPlan
from rayrl.types import Episode, Failure, Group

__all__ = ["CollectedGroups", "Rollouts", "is_stale", "none_left", "sort_out"]

DISCARD_AT = 32  # ended groups whose turns the recorder discards in one call


@dataclass(frozen=True, slots=True)
class CollectedGroups(Sequence[Group]):
    """The outcome of a batch of plans; as a sequence, its complete groups.

    Attributes:
        groups: complete groups in the order of their plans.
        dropped: groups with an episode that failed or is stale; never trained on.
        env_failures: number of episodes whose environment failed.
        infra_failures: number of episodes that failed otherwise, after their retries.
        refused: number of episodes whose conversation a server refused; they are not retried.
        stale: number of episodes with a token from older weights than requested.
        rejected: complete groups that taught nothing and were replaced (`train.refill`).
        sample: the complete groups that were drawn first, as many as a step asks for, whether they
            are trained on or were rejected, without those that were drawn by difficulty: how the
            policy plays, whatever was chosen to learn from; None: `groups`.
        sampling: metrics of what tasks were drawn, see `TaskSampler.observe`.
        stale_groups: groups that became too old; their tasks are played again.
        waiting: number of complete groups that are ready for a later batch.
        live: number of groups that are being played.
        idle_s: seconds since the last batch in which nothing was played; None with max_lag=0, where
            rollouts wait for the learner by design.
        load: what the workers had to do.
    """

    groups: tuple[Group, ...]
    dropped: tuple[Group, ...] = ()
    env_failures: int = 0
    infra_failures: int = 0
    refused: int = 0
    stale: int = 0
    rejected: tuple[Group, ...] = ()
    sample: tuple[Group, ...] | None = None
    sampling: Mapping[str, float] = field(default_factory=dict)
    stale_groups: tuple[Group, ...] = ()
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


def sort_out(
    groups: Sequence[Group], min_version: int, budget: float, components: Iterable[str] = ()
) -> CollectedGroups:
    """Separate the groups that can be trained on; stop a run whose environment fails too often.

    Args:
        groups: in the order of their plans.
        min_version: a token from older weights makes an episode stale.
        budget: share of the episodes, 0 to 1, whose environment may fail.
        components: of a mixture.

    Raises:
        RunFailed: the budget is exceeded, one of a mixture's environments failed in each of its
            episodes, or no group is left, unless a server refused all of them: that is a result of
            an evaluation.
    """
    episodes = [episode for group in groups for episode in group.episodes]
    failed = [(e, e.failure) for e in episodes if e.failure is not None]
    by_env = [(e, f) for e, f in failed if f.kind == "env"]
    refused = sum(f.kind == "refused" for _, f in failed)
    played, lost = Counter(e.env for e in episodes), Counter(e.env for e, _ in by_env)
    if len(by_env) > budget * len(episodes):
        names = " and ".join(map(repr, lost))
        raise RunFailed(
            f"environment {names} failed in {len(by_env)} of {len(episodes)} episodes, more than "
            f"env.failure_budget={budget:g} allows.\n{_details(*by_env[0])}"
        )
    for env in components:
        if 0 < (n := lost[env]) == played[env] and budget < 1:
            first = next(pair for pair in by_env if pair[0].env == env)
            raise RunFailed(
                f"environment {env!r} of the mixture failed in all of its {n} episodes.\n"
                f"{_details(*first)}"
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
    """The error of a run that has no complete group to go on with."""
    failed = [(e, e.failure) for group in groups for e in group.episodes if e.failure is not None]
    what = _details(*failed[0]) if failed else f"all are older than version {min_version}"
    return RunFailed(f"none of {len(groups)} groups is complete.\n{what}")


def is_stale(episode: Episode, min_version: int) -> bool:
    """Whether a token of the episode was sampled from weights older than `min_version`."""
    return episode.min_version is not None and episode.min_version < min_version


def _details(episode: Episode, failure: Failure) -> str:
    return "\n".join(
        part
        for part in (
            f"episode {episode.id}: {failure.message}",
            f"task: {safe_repr(episode.task)}",
            # which says nothing of a server or a machine that failed
            failure.traceback.rstrip() if failure.kind == "env" else "",
        )
        if part
    )


class Rollouts:
    """Plays plans on a pool of workers.

    Results depend neither on which worker plays what, nor on how many there are. A worker that dies
    or hangs is replaced, and what it had not finished is played again: a group that takes down a
    second worker, alone on it, is recorded as a failure of the environment.

    Args:
        job: what the workers play.
        start: starts a worker's actor.
        turns: a file for the turns of live episodes. Episodes that an earlier driver has left there
            resume when their plans are played again.

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
        """Wait until the fixed workers can play; elastic ones may start later.

        Raises:
            ConfigError: a setting the workers cannot work with.
            InfraError, RunFailed: a worker does not start.
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
            on_group: called as each group ends, in any order, also with one that is to be retried.
            known: groups of these plans that were played before, by id.

        Returns:
            Groups that were played or known; after `wind_down`, of some plans only.

        Raises:
            RunFailed: see `sort_out`.
        """
        done: dict[str, Group] = dict(known or {})
        self._pool.wind_up()

        def keep(group: Group) -> None:
            done[group.id] = group
            on_group(group)

        await self.play([p for p in plans if p.id not in done], min_version, keep, keep)
        groups = [done[plan.id] for plan in plans if plan.id in done]
        env = self.job.config.env
        return sort_out(groups, min_version, env.failure_budget, env.mix)

    async def play(
        self,
        plans: Sequence[GroupPlan],
        min_version: int,
        on_group: Callable[[Group], None],
        on_retry: Callable[[Group], None] = lambda group: None,
    ) -> None:
        """Play plans; calls may overlap, and earlier ones are served first.

        Args:
            plans: with ids that differ.
            min_version: no token may come from older weights.
            on_group: called once with each group, as it ends for good.
            on_retry: called with a group that has an infrastructure failure and is played once
                more; after `wind_down` it is not, and `on_group` is not called with it.
        """
        left = {plan.id for plan in plans}
        ended: list[str] = []

        def finish(group: Group) -> None:
            on_group(group)  # first: the turns stay on the disk until the group is there
            left.discard(group.id)
            ended.append(group.id)
            if len(ended) >= DISCARD_AT:
                self.discard_turns(ended.copy())
                ended.clear()

        try:
            await self._pool.play(plans, min_version, finish, on_retry)
            ended += left  # those that were not played because of `wind_down`
        finally:
            if ended:
                self.discard_turns(ended)

    def discard_turns(self, groups: Sequence[str]) -> None:
        """Drop the recorded turns of these groups, by id: they will not be resumed."""
        self._pool.discard_turns(groups)

    def cancel(self, plans: Sequence[str], oldest: int) -> None:
        """Cancel those of these plans, by id, that began with weights older than `oldest`.

        Their groups end with the turns that were played, and with failures of kind "stopped".
        """
        self._pool.cancel(plans, oldest)

    def wind_down(self) -> None:
        """Have `collect` end with the groups that have begun, and begin no more."""
        self._pool.wind_down()

    def load(self) -> Load:
        """What the workers had to do since the last call."""
        return self._pool.load()

    def close(self) -> None:
        """End the workers."""
        self._pool.close()
        kill_actor(self._recorder)
