"""Groups on their way to a batch: which may begin, which are ready, which have to be played again.

One rule for every lag. With the replicas at weights version v, groups of the steps up to
v + max_lag may be running. A batch closes when `train.groups` groups are ready, oldest first, or
when nothing is running that could still become ready; what ends later is for a later batch. No
token is older than max_lag versions when it is trained on: a group that has become too old is
cancelled, counted, and its task is played again with new weights.

With max_lag=0 this is: play the step's groups and wait for all of them.

With `train.refill` a group without spread in its rewards is not ready but *rejected*, and the next
task takes its place, at most so many times per batch. Groups are numbered in the order of the
tasks, so which ones begin depends on how many were rejected and not on which ended first: with
max_lag=0, a batch is what comes first in that order and has spread. A batch that the limit leaves
short takes the oldest rejected ones too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from rayrl.cluster.rollouts import is_stale
from rayrl.run.group_log import Batched
from rayrl.types import Group

__all__ = ["ClosedBatch", "GroupState", "RolloutBuffer"]

MOST_FAILED = 2  # times as many groups as a batch has


class GroupState(Enum):
    """Where a group is; one that was trained on or reported as failed is no longer in the buffer.

    Groups enter as PENDING or RUNNING. RUNNING goes to one of the last three when it ends, and back
    to PENDING when it was cancelled as too old, as READY does when it has waited for too long.
    """

    PENDING = "pending"  # to begin, perhaps again
    RUNNING = "running"
    READY = "ready"  # complete; waits for a batch
    FAILED = "failed"  # never trained on; waits to be reported with the next batch
    REJECTED = "rejected"  # complete, but teaches nothing; likewise


@dataclass(slots=True)
class _Entry:
    state: GroupState
    attempts: int = 0  # how often it began anew because its weights had become too old
    group: Group | None = None  # once it has ended


@dataclass(frozen=True, slots=True)
class ClosedBatch:
    """What one step is given, by index, and what happened since the step before.

    Attributes:
        taken: groups to train on, in order.
        failed: groups that are never trained on.
        rejected: complete groups that are not trained on either.
        replaced: for how many groups without spread others were played.
        restarted: indices of groups that began anew because they were too old.
        stale: what had been played of those.
    """

    taken: dict[int, Group]
    failed: dict[int, Group]
    rejected: dict[int, Group]
    replaced: int
    restarted: tuple[int, ...]
    stale: tuple[Group, ...]


class RolloutBuffer:
    """Decides when groups begin and which make up a batch. No I/O, no clock, no tasks.

    Groups are known by their index in the run, which is that of their task. Where none was
    replaced, group k of step s is s * groups + k.

    Args:
        groups: per batch.
        max_lag: weights versions that a token may be older than the learner's.
        steps: of the run.
        refill: groups that may be replaced per batch.
        teaches: whether a complete group is worth a place in a batch; asked only with `refill`.
    """

    def __init__(
        self,
        groups: int,
        max_lag: int,
        steps: int,
        refill: int = 0,
        teaches: Callable[[Group], bool] = lambda group: True,
    ) -> None:
        self._groups, self._max_lag, self._steps = groups, max_lag, steps
        self._refill, self._teaches = refill, teaches
        self._replaced = 0  # of the batches that have closed
        self._entries: dict[int, _Entry] = {}
        self._next = 0  # the first index that never began
        self._failures = 0  # of the whole run; with a lag, others are played instead
        self._restarted: list[int] = []  # since the last batch
        self._stale: list[Group] = []  # likewise

    def state_of(self, index: int) -> GroupState | None:
        """The state of a group; None before it began and after it left with a batch."""
        entry = self._entries.get(index)
        return entry.state if entry else None

    def count(self, state: GroupState) -> int:
        """How many groups are in that state."""
        return sum(entry.state is state for entry in self._entries.values())

    def attempts(self, index: int) -> int:
        """How often a group began anew because its weights had become too old."""
        return self._entries[index].attempts

    def begin(self, version: int) -> list[int]:
        """Mark as running what may begin with the replicas at `version`; returns it, in order."""
        steps = min(version + self._max_lag + 1, self._steps)
        instead = self._replaced + self._replaced_now() + (self._failures if self._max_lag else 0)
        end = steps * self._groups + instead
        begun = [index for index in self._in(GroupState.PENDING) if index < end]
        for index in range(self._next, end):
            self._entries[index] = _Entry(GroupState.PENDING)
            begun.append(index)
        self._next = max(self._next, end)
        for index in begun:
            self._entries[index].state = GroupState.RUNNING
        return begun

    def end(self, index: int, group: Group) -> GroupState:
        """A group has ended; returns its new state."""
        entry = self._entries[index]
        failures = {e.failure.kind for e in group.episodes if e.failure is not None}
        if "stopped" in failures:
            self._restart(index, group)
        else:
            entry.group = group
            self._failures += bool(failures)
            if failures:
                entry.state = GroupState.FAILED
            elif self._refill and not self._teaches(group):
                entry.state = GroupState.REJECTED
            else:
                entry.state = GroupState.READY
        return entry.state

    def restart_stale(self, oldest: int) -> bool:
        """Restart groups that are ready but have tokens of a version before `oldest`."""
        stale = {
            index: group
            for index, group in self.ended(GroupState.READY).items()
            if any(is_stale(episode, oldest) for episode in group.episodes)
        }
        for index, group in stale.items():
            self._restart(index, group)
        return bool(stale)

    def is_due(self) -> bool:
        """Whether a batch can close: it is full, or nothing is running that could join it.

        Or so many groups have failed that others would be played in their place for ever.
        """
        ready, running = self.count(GroupState.READY), self.count(GroupState.RUNNING)
        failed = self.count(GroupState.FAILED)
        return ready >= self._groups or failed >= MOST_FAILED * self._groups or not running

    def close(self) -> ClosedBatch:
        """Take the oldest groups that are ready, and report what became of others."""
        ready, rejected = self.ended(GroupState.READY), self.ended(GroupState.REJECTED)
        chosen = sorted([*ready, *rejected][: self._groups])  # ready ones before rejected ones
        left = {index: group for index, group in rejected.items() if index not in chosen}
        batch = ClosedBatch(
            taken={index: (ready | rejected)[index] for index in chosen},
            failed=self.ended(GroupState.FAILED),
            rejected=left,
            # with a lag, groups of later steps may be among them: those steps get others
            replaced=max(self._replaced_now(), len(chosen) + len(left) - self._groups),
            restarted=tuple(self._restarted),
            stale=tuple(self._stale),
        )
        self._replaced += batch.replaced
        for index in (*batch.taken, *batch.failed, *batch.rejected):
            del self._entries[index]
        self._restarted, self._stale = [], []
        return batch

    def ended(self, *states: GroupState) -> dict[int, Group]:
        """Groups that have ended, in these states or any, by index, in order."""
        found = ((index, self._entries[index].group) for index in self._in(*states or GroupState))
        return {index: group for index, group in found if group is not None}

    # --- checkpoints ---------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        """Plain data for a checkpoint: everything but groups that have ended, which the log has."""
        logged_later = Counter(self._restarted)  # with the batch that closes next
        attempts = {
            index: entry.attempts - logged_later[index] for index, entry in self._entries.items()
        }
        return {
            "next": self._next,
            # those that are ready too: without a log they are played again
            "unfinished": self._in(*set(GroupState) - {GroupState.FAILED}),
            "attempts": {str(index): n for index, n in sorted(attempts.items()) if n},
            "failures": self._failures - self.count(GroupState.FAILED),
            "replaced": self._replaced,
        }

    def load(
        self,
        state: Mapping[str, Any],
        step: int,
        ended: Mapping[int, Group],
        batches: Sequence[Batched],
        again: Sequence[int] = (),
    ) -> None:
        """Continue from what `save` gave at `step`, and what was logged since.

        Args:
            state: of `save`; empty where nothing was saved.
            ended: groups that are in no batch yet.
            batches: that have closed.
            again: groups that began anew for another reason than these batches say, as often.
        """
        consumed = {index for batch in batches for index in batch.ended}
        restarted = Counter(index for batch in batches for index in batch.restarted)
        restarted.update(again)
        self._next = state.get("next", step * self._groups)
        pending = set(state.get("unfinished", ())) | restarted.keys()
        end = max((*ended, *consumed, *restarted), default=-1) + 1
        pending |= set(range(self._next, end))  # began when a later one did
        self._next = max(self._next, end)
        attempts = state.get("attempts", {})
        self._entries = {
            index: _Entry(GroupState.PENDING, attempts.get(str(index), 0) + restarted[index])
            for index in pending | ended.keys()
            if index in ended or index not in consumed
        }
        self._failures = state.get("failures", 0) + sum(len(batch.dropped) for batch in batches)
        self._replaced = state.get("replaced", 0) + sum(batch.replaced for batch in batches)
        for index, group in ended.items():
            self.end(index, group)

    def _replaced_now(self) -> int:
        """Groups that were replaced since the last batch."""
        return min(self.count(GroupState.REJECTED), self._refill)

    def _in(self, *states: GroupState) -> list[int]:
        return sorted(index for index, entry in self._entries.items() if entry.state in states)

    def _restart(self, index: int, group: Group) -> None:
        entry = self._entries[index]
        entry.state, entry.group = GroupState.PENDING, None
        entry.attempts += 1
        self._restarted.append(index)
        self._stale.append(group)
