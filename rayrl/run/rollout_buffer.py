"""What the learner is fed: groups launched ahead of it, each trained on once.

One rule for every lag. With the replicas at weights version v, plans of the steps up to v + max_lag
may have begun. A batch closes when it has `train.groups` groups, the oldest plans first, or when
nothing is left that could still come; what ends later is for a later batch. No token is older than
max_lag versions when it is trained on: a group that has become too old is stopped (its episodes and
their generations end at once), counted, and its task is played again with new weights.

With max_lag=0 this is: play the step's groups, wait for all of them.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from rayrl.cluster.rollouts import CollectedGroups, is_stale, none_left, sort_out
from rayrl.cluster.workers.scaling import Load
from rayrl.config import Config
from rayrl.rollout.rollout import GroupPlan
from rayrl.run.group_log import Batched, GroupLog, Played
from rayrl.types import Group

__all__ = ["RolloutBuffer"]


class RolloutBackend(Protocol):
    """What a feed needs of `cluster.Rollouts`."""

    async def play(
        self, plans: Sequence[GroupPlan], min_version: int, keep: Callable[[Group], None]
    ) -> None: ...

    def cancel(self, plans: Sequence[str], oldest: int) -> None: ...

    def load(self) -> Load: ...

    def discard_turns(self, groups: Sequence[str]) -> None: ...


@dataclass(frozen=True, slots=True)
class _Kept:
    """A batch that was closed before the process, or the learner, was lost."""

    record: Batched
    taken: tuple[Group, ...]
    dropped: tuple[Group, ...]

    def records(self) -> Iterator[Played | Batched]:
        """As the log has it."""
        indices = (*self.record.taken, *self.record.dropped)
        for index, group in zip(indices, (*self.taken, *self.dropped), strict=True):
            yield Played(index, group)
        yield self.record


class RolloutBuffer:
    """Launches plans and closes batches; an async context manager.

    Args:
        rollouts: plays.
        plans: the plans of a step; the feed numbers them through, `train.groups` a step.
        config: `train`, and the failure budget.

    Attributes:
        log: keeps what was played since the last checkpoint.
    """

    def __init__(
        self,
        rollouts: RolloutBackend,
        plans: Callable[[int], Sequence[GroupPlan]],
        config: Config,
        log: GroupLog,
    ) -> None:
        self._rollouts = rollouts
        self._plans = functools.lru_cache(maxsize=8)(plans)
        self._config = config
        self._n, self._lag = config.train.groups, config.train.max_lag
        self.log = log
        self._version = -1
        self._next = 0  # the first plan that never began
        self._waiting: set[int] = set()  # of plans before that, those that must begin again
        self._live: dict[int, GroupPlan] = {}
        self._ready: dict[int, Group] = {}
        self._failed: dict[int, Group] = {}  # since the last batch
        self._stopped: list[Group] = []  # likewise
        self._again: list[int] = []  # likewise
        self._tries: dict[int, int] = {}  # of plans that began more than once
        self._lost = 0  # groups dropped so far
        self._kept: dict[int, _Kept] = {}  # by step
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._error: BaseException | None = None
        self._idle_s, self._idle_since = 0.0, time.perf_counter()  # since: while nothing is live

    # --- going on from a checkpoint ----------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What `restore` needs besides the log: plain data for the checkpoint."""
        logged = (*self._failed.values(), *(g for one in self._kept.values() for g in one.dropped))
        return {
            "next": self._next,
            # the log has those that are ready; without it they are played again
            "unfinished": sorted({*self._live, *self._waiting, *self._ready}),
            "tries": {str(index): tries for index, tries in self._tries.items()},
            "lost": self._lost - len(logged),  # the log has them
        }

    def checkpointed(self, step: int) -> None:
        """A checkpoint of `step` is about to be made: the log begins anew."""
        records: list[Played | Batched] = []
        for number, one in sorted(self._kept.items()):
            if number >= step:
                records += one.records()
        ended = sorted((self._ready | self._failed).items())
        self.log.begin(step, [*records, *(Played(index, group) for index, group in ended)])

    def restore(self, step: int, state: Mapping[str, Any]) -> None:
        """Go on from the checkpoint of `step`, before anything was launched."""
        self._next = state.get("next", step * self._n)
        self._waiting = set(state.get("unfinished", ()))
        self._tries = {int(index): tries for index, tries in state.get("tries", {}).items()}
        self._lost = state.get("lost", 0)
        ended = self._reread(step)
        kept = (g for one in self._kept.values() for g in (*one.taken, *one.dropped))
        self._rollouts.discard_turns([group.id for group in (*ended.values(), *kept)])
        for index, group in ended.items():
            (self._ready if group.complete else self._failed)[index] = group
        self._lost += len(self._failed) + sum(len(one.dropped) for one in self._kept.values())

    def rewind(self, step: int) -> None:
        """The learner is back at the checkpoint of `step`: it gets the same batches again."""
        known = self._reread(step)
        for index, group in sorted((self._ready | self._failed).items()):
            if index not in known:  # it ended while a checkpoint was made that there is not
                self.log.add(Played(index, group))

    def _reread(self, step: int) -> dict[int, Group]:
        """Take batches that were closed since the checkpoint from the log; returns what is left."""
        ended: dict[int, Group] = {}
        for record in self.log.read(step):
            if isinstance(record, Batched):
                taken, dropped = (
                    tuple(ended.pop(index) for index in indices)
                    for indices in (record.taken, record.dropped)
                )
                self._kept[record.step] = _Kept(record, taken, dropped)
                for index in record.again:
                    ended.pop(index, None)
                continue
            ended[record.index] = record.group
            if record.index in self._live or record.index in self._ready:
                continue
            self._waiting |= set(range(self._next, record.index))
            self._next = max(self._next, record.index + 1)
            self._waiting.discard(record.index)
        return ended

    # --- playing -----------------------------------------------------------------------------

    def advance(self, version: int) -> None:
        """The replicas hold `version` now: stop what is too old, and launch what may begin."""
        self._version = max(self._version, version)
        if self._lag:
            plans = [plan.id for plan in self._live.values()]
            self._rollouts.cancel(plans, self._version - self._lag)
        self._launch()

    def _launch(self) -> None:
        if self._kept:  # first the version they lead to: live turns that were recorded may be of it
            return
        steps = min(self._version + self._lag + 1, self._config.train.steps)
        end = steps * self._n + (self._lost if self._lag else 0)
        now = sorted(index for index in self._waiting if index < end)
        now += range(self._next, end)
        self._waiting -= set(now)
        self._next = max(self._next, end)
        if not now:
            return
        begun = {index: self._plan(index) for index in now}
        if not self._live:
            self._idle_s += time.perf_counter() - self._idle_since
        self._live |= begun
        task = asyncio.create_task(self._play(begun))
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _plan(self, index: int) -> GroupPlan:
        plan = self._plans(index // self._n)[index % self._n]
        tries = self._tries.get(index, 0)
        return replace(plan, id=f"{plan.id}~{tries}") if tries else plan

    async def _play(self, begun: Mapping[int, GroupPlan]) -> None:
        by_id = {plan.id: index for index, plan in begun.items()}
        broken: dict[int, Group] = {}  # they are played once more

        def keep(group: Group) -> None:
            index = by_id[group.id]
            kinds = {e.failure.kind for e in group.episodes if e.failure is not None}
            if "infra" in kinds and "stopped" not in kinds:
                broken[index] = group
            else:
                broken.pop(index, None)
                self._finish(index, group)

        await self._rollouts.play(list(begun.values()), self._version, keep)
        for index, group in broken.items():
            self._finish(index, group)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._error = task.exception()
            self._changed.set()

    def _finish(self, index: int, group: Group) -> None:
        del self._live[index]
        if not self._live:
            self._idle_since = time.perf_counter()
        self._changed.set()
        failures = [e.failure for e in group.episodes if e.failure is not None]
        if any(failure.kind == "stopped" for failure in failures):
            self._stopped.append(group)
            self._begin_again(index)
            return
        self.log.add(Played(index, group))
        if failures:
            self._failed[index] = group
            self._lost += 1
            self._launch()
        else:
            self._ready[index] = group

    def _begin_again(self, index: int) -> None:
        self._tries[index] = self._tries.get(index, 0) + 1
        self._again.append(index)
        self._waiting.add(index)
        self._launch()

    # --- batches -----------------------------------------------------------------------------

    async def batch(self, step: int) -> CollectedGroups:
        """The groups of a step; waits until there are enough.

        Raises:
            RunFailed: see `sort_out`, or playing cannot go on.
        """
        oldest = step - self._lag
        if (kept := self._kept.pop(step, None)) is not None:
            played = dict(zip(kept.record.taken, kept.taken, strict=True))
            played |= zip(kept.record.dropped, kept.dropped, strict=True)
            groups = [group for _, group in sorted(played.items())]
            found = self._sorted(groups, oldest)
            return replace(found, load=self._rollouts.load())
        while True:
            if self._error is not None:
                raise self._error
            self._drop_stale(oldest)
            if len(self._ready) >= self._n or not self._live:
                return self._close(step, oldest)
            self._changed.clear()
            await self._changed.wait()

    def _drop_stale(self, oldest: int) -> None:
        if not self._lag:  # no token can be older than the replicas' only version
            return
        for index, group in sorted(self._ready.items()):
            if any(is_stale(episode, oldest) for episode in group.episodes):
                del self._ready[index]
                self._stopped.append(group)
                self._begin_again(index)

    def _close(self, step: int, oldest: int) -> CollectedGroups:
        taken = dict(sorted(self._ready.items())[: self._n])
        for index in taken:
            del self._ready[index]
        failed, self._failed = self._failed, {}
        again, self._again = self._again, []
        stopped, self._stopped = self._stopped, []
        self.log.add(Batched(step, tuple(taken), tuple(failed), tuple(again)))
        groups = [group for _, group in sorted((taken | failed).items())]
        collection = self._sorted(groups, oldest)
        return replace(
            collection,
            stopped=tuple(stopped),
            waiting=len(self._ready),
            live=len(self._live),
            idle_s=self._idle() if self._lag else None,
            load=self._rollouts.load(),
        )

    def _sorted(self, groups: Sequence[Group], oldest: int) -> CollectedGroups:
        env = self._config.env
        found = sort_out(groups, oldest, env.failure_budget, env.name)
        if groups and not found.groups:  # a server refused them all: there is nothing to learn from
            raise none_left(groups, oldest)
        return found

    def _idle(self) -> float:
        """Seconds since it was asked last in which nothing was live."""
        now = time.perf_counter()
        if not self._live:
            self._idle_s += now - self._idle_since
            self._idle_since = now
        idle, self._idle_s = self._idle_s, 0.0
        return idle

    async def __aenter__(self) -> RolloutBuffer:
        return self

    async def __aexit__(self, *error: object) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.log.close()
