"""Play groups ahead of the learner and hand out a batch per step, after a restart the same one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from rayrl.cluster.rollouts import CollectedGroups, none_left, sort_out
from rayrl.cluster.workers.worker_pool import Load
from rayrl.config import Config
from rayrl.errors import ConfigError, RunFailed
from rayrl.learner.advantage import has_spread
from rayrl.rollout.rollout import GroupPlan
from rayrl.run.group_log import Batched, Begun, GroupLog, Played, Undone
from rayrl.run.rollout_buffer import GroupState, RolloutBuffer
from rayrl.run.sampling.task_sampler import TaskSampler
from rayrl.types import Group

__all__ = ["GroupCollector"]


class RolloutBackend(Protocol):
    """The part of `cluster.Rollouts` that collecting needs."""

    async def play(
        self, plans: Sequence[GroupPlan], min_version: int, on_group: Callable[[Group], None]
    ) -> None: ...

    def cancel(self, plans: Sequence[str], oldest: int) -> None: ...

    def load(self) -> Load: ...

    def discard_turns(self, groups: Sequence[str]) -> None: ...


@dataclass(frozen=True, slots=True)
class _LoggedBatch:
    """A batch that had closed before the process, or the learner, was lost."""

    record: Batched
    groups: Mapping[int, Group]  # taken, dropped and rejected


class GroupCollector:
    """Drives a `RolloutBuffer`: plays what may begin, logs what ends; an async context manager.

    Args:
        rollouts: plays groups.
        sampler: says what each group plays.
        config: `train`, and the failure budget.

    Attributes:
        log: everything played since the last checkpoint.
    """

    def __init__(
        self,
        rollouts: RolloutBackend,
        sampler: TaskSampler,
        config: Config,
        log: GroupLog,
    ) -> None:
        self._rollouts, self._config, self.log = rollouts, config, log
        self._sampler = sampler
        train = config.train
        self._buffer = RolloutBuffer(
            train.groups,
            train.max_lag,
            train.steps,
            int((train.refill - 1) * train.groups),
            has_spread,
        )
        self._version = -1  # of the replicas' weights
        self._running: dict[int, str] = {}  # plan ids
        self._logged: dict[int, _LoggedBatch] = {}  # by step; handed out instead of new ones
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._idle = IdleClock()

    async def __aenter__(self) -> GroupCollector:
        return self

    async def __aexit__(self, *error: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.log.close()

    # --- playing -----------------------------------------------------------------------------

    def advance(self, version: int) -> None:
        """The replicas hold `version`: cancel groups that are too old, begin those that may."""
        self._version = max(self._version, version)
        if max_lag := self._config.train.max_lag:
            self._rollouts.cancel([*self._running.values()], self._version - max_lag)
        self._begin()

    def _begin(self) -> None:
        # Not before logged batches are handed out: turns that were recorded for groups which were
        # running may be of the version that those batches lead to.
        if self._logged:
            return
        if begun := {index: self._plan(index) for index in self._buffer.begin(self._version)}:
            drawn = self._sampler.draws()
            if draws := {index: drawn[index] for index in begun if index in drawn}:
                self.log.add(Begun(draws))
            self._running |= {index: plan.id for index, plan in begun.items()}
            self._idle.stop()
            self._tasks.add(asyncio.create_task(self._play(begun)))

    def _plan(self, index: int) -> GroupPlan:
        plan, attempts = self._sampler.plan(index), self._buffer.attempts(index)
        return replace(plan, id=f"{plan.id}~{attempts}") if attempts else plan

    async def _play(self, begun: Mapping[int, GroupPlan]) -> None:
        index_of = {plan.id: index for index, plan in begun.items()}
        plans, version = list(begun.values()), self._version
        try:
            await self._rollouts.play(plans, version, lambda g: self._end(index_of[g.id], g))
        finally:
            self._changed.set()  # also for an error, which `collect` raises

    def _end(self, index: int, group: Group) -> None:
        del self._running[index]
        if not self._running:
            self._idle.start()
        if self._buffer.end(index, group) is not GroupState.PENDING:
            self.log.add(Played(index, group))
        self._changed.set()
        self._begin()

    # --- batches -----------------------------------------------------------------------------

    async def collect(self, step: int) -> CollectedGroups:
        """The groups of a step; waits until there are enough.

        Raises:
            RunFailed: see `sort_out`, or playing failed.
        """
        oldest = step - self._config.train.max_lag
        if (logged := self._logged.pop(step, None)) is not None:
            found = self._sorted(step, logged.groups, logged.record.rejected, oldest)
            return replace(found, load=self._rollouts.load())
        while True:
            for task in [task for task in self._tasks if task.done()]:
                self._tasks.discard(task)
                task.result()
            # without a lag, no token can be older than the replicas' only version
            if self._config.train.max_lag and self._buffer.restart_stale(oldest):
                self._begin()
            if self._buffer.is_due():
                break
            self._changed.clear()
            await self._changed.wait()
        batch = self._buffer.close()
        if not (batch.taken or batch.failed or batch.stale):
            raise ConfigError(
                f"step {step} has nothing to train on: collect every step once, and push(step) "
                "before, which lets it begin."
            )
        indices = tuple(batch.taken), tuple(batch.failed), batch.restarted, tuple(batch.rejected)
        self.log.add(Batched(step, *indices, batch.replaced))
        groups = batch.taken | batch.failed | batch.rejected
        return replace(
            self._sorted(step, groups, batch.rejected, oldest),
            stale_groups=batch.stale,
            waiting=self._buffer.count(GroupState.READY),
            live=len(self._running),
            idle_s=self._idle.read() if self._config.train.max_lag else None,
            load=self._rollouts.load(),
        )

    def _sorted(
        self, step: int, by_index: Mapping[int, Group], rejected: Collection[int], oldest: int
    ) -> CollectedGroups:
        groups = [group for index, group in sorted(by_index.items()) if index not in rejected]
        env = self._config.env
        try:
            found = sort_out(groups, oldest, env.failure_budget, env.mix)
            if groups and not found.groups:  # a server refused all of them
                raise none_left(groups, oldest)
        except RunFailed as error:
            self.log.add(Undone(step))
            raise RunFailed(
                f"{error}\nThe same command plays what failed again, and goes on from there."
            ) from error
        kept = {group.id for group in found.groups}
        complete = [(i, g) for i, g in sorted(by_index.items()) if g.id in kept or i in rejected]
        first = complete[: self._config.train.groups]
        sample = tuple(group for index, group in first if self._sampler.is_uniform(index))
        return replace(
            found,
            rejected=tuple(by_index[index] for index in rejected),
            sampling=self._sampler.observe(by_index),
            sample=sample,
        )

    # --- checkpoints -------------------------------------------------------------------------

    def begin_checkpoint(self, step: int) -> dict[str, Any]:
        """Begin the log of the checkpoint of `step`; returns what `restore` needs besides the log.

        While a learner makes up for lost steps, batches that it has still to make go into the new
        log.
        """
        records: list[Played | Batched] = []
        for _, batch in sorted(self._logged.items()):
            records += [Played(index, group) for index, group in batch.groups.items()]
            records.append(batch.record)
        ended = self._buffer.ended()
        self.log.begin(step, [*records, *(Played(index, group) for index, group in ended.items())])
        state = self._buffer.save()
        for batch in self._logged.values():  # which the new log has
            state["failures"] -= len(batch.record.dropped)
            state["replaced"] -= batch.record.replaced
            for index in map(str, batch.record.restarted):
                if index in state["attempts"]:
                    state["attempts"][index] -= 1
        return state | {"sampler": self._sampler.save()}

    def restore(self, step: int, state: Mapping[str, Any]) -> None:
        """Continue from the checkpoint of `step`, before anything has begun."""
        ended, draws, again = self._read_log(step)
        self._sampler.load(state.get("sampler", {}), draws)
        batches = [batch.record for batch in self._logged.values()]
        self._buffer.load(state, step, ended, batches, again)
        in_batches = [g for batch in self._logged.values() for g in batch.groups.values()]
        self._rollouts.discard_turns([group.id for group in (*ended.values(), *in_batches)])

    def rewind(self, step: int, state: Mapping[str, Any]) -> None:
        """Hand out the batches since the checkpoint of `step` again: the learner is back there."""
        logged, draws, _ = self._read_log(step)
        drawn, ended = self._sampler.draws(), self._buffer.ended()
        if missing := {index: drawn[index] for index in drawn if index not in draws}:
            self.log.add(Begun(missing))
        self._sampler.load(state.get("sampler", {}), draws | drawn)
        for index, group in ended.items():
            if index not in logged:  # it ended during a checkpoint that was never finished
                self.log.add(Played(index, group))

    def _read_log(self, step: int) -> tuple[dict[int, Group], dict[int, Any], list[int]]:
        """Read batches that closed since the checkpoint.

        Returns:
            Groups that are in none, all draws, and groups that began anew besides those that the
            batches name.
        """
        ended: dict[int, Group] = {}
        draws: dict[int, Any] = {}
        again: list[int] = []
        for record in self.log.read(step):
            if isinstance(record, Undone):
                undone = self._logged.pop(record.step)
                again += undone.record.restarted
                again += [i for i, group in undone.groups.items() if not group.complete]
                ended |= {i: group for i, group in undone.groups.items() if group.complete}
                continue
            if isinstance(record, Begun):
                draws |= record.draws
                continue
            if isinstance(record, Played):
                ended[record.index] = record.group
                continue
            groups = {index: ended.pop(index) for index in record.ended}
            self._logged[record.step] = _LoggedBatch(record, groups)
            for index in record.restarted:
                ended.pop(index, None)
        return ended, draws, again


class IdleClock:
    """Seconds in which nothing was running."""

    def __init__(self) -> None:
        self._idle_s, self._since = 0.0, time.perf_counter()
        self._is_idle = True

    def start(self) -> None:
        """Nothing is running any more."""
        self._since, self._is_idle = time.perf_counter(), True

    def stop(self) -> None:
        """Something is running."""
        if self._is_idle:
            self._idle_s += time.perf_counter() - self._since
            self._is_idle = False

    def read(self) -> float:
        """Idle seconds since the last reading."""
        if self._is_idle:
            self.stop()
            self.start()
        idle_s, self._idle_s = self._idle_s, 0.0
        return idle_s
