"""Which worker plays which group, and which groups are played again.

Groups wait in the driver's queue and not on a worker: each worker has little more than its
capacity, so that a worker that starts later finds work, and one that dies takes few groups along.
Fixed workers share the queue evenly; elastic ones get what the fixed ones have no capacity for.

Every retry of a group is decided here. A group with an infrastructure failure is played once more,
after the other groups of its request. The groups of a worker that died are suspects: they resume,
apart from all other groups, in two halves. A half whose worker dies is halved again, until a group
is alone on a worker that dies: it is recorded as a failure of its environment. So one group that
kills workers is found among n after log2(n) + 1 deaths, in at most 2 log2(n) parts; to play each
suspect alone would need fewer deaths, but n parts one after the other.

Nothing here waits, knows the time or calls Ray: the worker pool reports what happened, and carries
out what `assign` returns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from rayrl.errors import safe_repr
from rayrl.rollout.rollout import GroupPlan
from rayrl.types import Episode, Failure, Group

__all__ = ["PendingGroup", "RolloutRequest", "Scheduler", "is_broken"]

PREFETCH = 8  # a worker gets 1/8 more than its capacity: the driver may be busy when it runs dry


def is_broken(group: Group) -> bool:
    """Whether a group has an infrastructure failure and was not cancelled: it is worth a retry."""
    kinds = {e.failure.kind for e in group.episodes if e.failure is not None}
    return "infra" in kinds and "stopped" not in kinds


class RolloutRequest:
    """Groups that one caller waits for.

    Args:
        plans: with ids that differ.
        on_group: called with each group when it has ended for good.
        on_retry: called with each group that has ended but is to be played once more.
        on_end: called once, when no group is left, or with the error that ends the request.

    Attributes:
        remaining: groups that have not ended for good, by id.
        broken: ids of those that wait for the others to end, and are then played once more.
        ended: whether `on_end` was called, or the caller has gone.
    """

    def __init__(
        self,
        plans: Sequence[GroupPlan],
        on_group: Callable[[Group], None],
        on_retry: Callable[[Group], None],
        on_end: Callable[[BaseException | None], None],
    ) -> None:
        self.remaining = {plan.id: PendingGroup(plan, self) for plan in plans}
        self.broken: set[str] = set()
        self.ended = False
        self._on_group, self._on_retry, self._on_end = on_group, on_retry, on_end

    def finish(self, group: Group) -> None:
        """Pass a group to the caller; an exception of the caller's ends the request."""
        if self.ended:
            return
        pending = self.remaining[group.id]
        retry = is_broken(group) and not pending.retried
        try:
            (self._on_retry if retry else self._on_group)(group)
        except Exception as error:
            self.end(error)
            return
        if retry:
            pending.retried = pending.resumes = True
            self.broken.add(group.id)
        else:
            self.skip(group.id)

    def skip(self, group: str) -> None:
        """Wait for a group no longer."""
        self.remaining.pop(group, None)
        self.broken.discard(group)
        if not self.remaining:
            self.end()

    def end(self, error: BaseException | None = None) -> None:
        """End the request, unless it has ended."""
        if not self.ended:
            self.ended = True
            self._on_end(error)


@dataclass(eq=False, slots=True)
class PendingGroup:
    """A group that has not ended.

    Attributes:
        plan: what to play.
        request: who waits for it.
        retried: whether it has ended with an infrastructure failure before.
        resumes: whether a worker has had it before, so that turns of it may be recorded.
    """

    plan: GroupPlan
    request: RolloutRequest
    retried: bool = False
    resumes: bool = False


@dataclass(eq=False, slots=True)
class _Slot:
    """A worker's share of the groups; it outlives the worker's process.

    Attributes:
        elastic: whether it only gets what fixed workers have no capacity for.
        capacity: episodes that may be live on the worker; 0 while it cannot play.
        unfinished: episodes it was given that have not ended.
        groups: those it was given that have not ended, by id.
        suspects: parts to be played apart, the last one first.
        on_trial: number of groups in the part it plays; 0: it plays groups of the queue.
    """

    elastic: bool
    capacity: int = 0
    unfinished: int = 0
    groups: dict[str, PendingGroup] = field(default_factory=dict)
    suspects: list[list[PendingGroup]] = field(default_factory=list)
    on_trial: int = 0

    @property
    def free(self) -> int:
        """Episodes it may be given from the queue; 0 while it has suspects."""
        if self.on_trial or self.suspects:
            return 0
        return max(0, self.capacity + self.capacity // PREFETCH - self.unfinished)

    def add(self, groups: Iterable[PendingGroup]) -> None:
        for group in groups:
            self.groups[group.plan.id] = group
            self.unfinished += group.plan.size

    def pop(self, group: str) -> PendingGroup | None:
        found = self.groups.pop(group, None)
        if not self.groups:
            self.on_trial = 0
        return found


class Scheduler:
    """The queue of groups, and what each worker has of it.

    Args:
        envs: by component, the environment's name and its trained seats, for the failures that
            are recorded.

    Attributes:
        winding_down: whether no group is begun, see `wind_down`.
    """

    def __init__(self, envs: Mapping[str, tuple[str, tuple[str, ...]]]) -> None:
        self._envs = envs
        self._slots: dict[int, _Slot] = {}
        self._queue: deque[PendingGroup] = deque()
        self._requests: list[RolloutRequest] = []
        self._most_waiting = 0
        self.winding_down = False

    # --- requests ------------------------------------------------------------------------------

    def submit(self, request: RolloutRequest) -> None:
        """Queue the groups of a request, after those of earlier ones."""
        if self.winding_down or not request.remaining:
            request.end()
            return
        self._requests.append(request)
        self._queue += request.remaining.values()

    def withdraw(self, request: RolloutRequest) -> None:
        """Begin no more of a request; what its groups end with that have begun is ignored."""
        request.ended = True
        self._drop_ended()

    def fail(self, error: BaseException) -> None:
        """End all requests with an error."""
        for request in self._requests:
            request.end(error)
        self._drop_ended()

    def _drop_ended(self) -> None:
        self._requests = [request for request in self._requests if not request.ended]
        self._queue = deque(_awaited(self._queue))
        for slot in self._slots.values():
            slot.suspects = [part for part in map(_awaited, slot.suspects) if part]

    def wind_down(self) -> None:
        """Begin no more groups, and retry none, until `wind_up`; requests end without them.

        What workers have but have not begun is theirs to give back, see `give_back`.
        """
        self.winding_down = True
        waiting = [*self._queue]
        self._queue.clear()
        for slot in self._slots.values():
            waiting += [group for part in slot.suspects for group in part]
            slot.suspects.clear()
        for request in self._requests:
            waiting += [request.remaining[name] for name in request.broken]
        for group in waiting:
            group.request.skip(group.plan.id)

    def wind_up(self) -> None:
        """Begin groups again."""
        self.winding_down = False

    # --- workers -------------------------------------------------------------------------------

    def add_worker(self, slot: int, capacity: int, *, elastic: bool = False) -> None:
        """Count on a worker that has started, in a new slot or in that of one that was lost.

        Args:
            capacity: episodes that may be live on it.
        """
        self._slots.setdefault(slot, _Slot(elastic)).capacity = capacity

    def lose_worker(self, slot: int, reason: str) -> None:
        """Have what a dead worker had played again, apart; or record the one group it had.

        Args:
            reason: what it died of, for the record.
        """
        lost = self._slots[slot]
        groups, alone = list(lost.groups.values()), lost.on_trial == 1
        lost.groups = {}
        lost.capacity = lost.unfinished = lost.on_trial = 0
        if self.winding_down:
            for group in groups:
                group.request.skip(group.plan.id)
        elif alone:  # it was a suspect: this is the second worker that died with it
            for group in groups:
                group.request.finish(self._failed(group.plan, reason))
        else:
            groups = _awaited(groups)
            for group in groups:
                group.resumes = True
            half = (len(groups) + 1) // 2
            lost.suspects += [part for part in (groups[half:], groups[:half]) if part]

    def remove_worker(self, slot: int) -> None:
        """Leave an elastic worker's suspects to the fixed worker that has fewest."""
        removed = self._slots.pop(slot, None)
        if removed is not None and removed.suspects:
            fixed = [other for other in self._slots.values() if not other.elastic]
            heir = min(fixed, key=lambda other: len(other.suspects))
            heir.suspects[:0] = removed.suspects

    def finish(self, slot: int, episodes: int, groups: Iterable[Group]) -> None:
        """Take what ended on a worker.

        Args:
            episodes: number of episodes that ended there, of whatever group.
            groups: those whose last episode has ended.
        """
        worker = self._slots[slot]
        worker.unfinished -= episodes
        for group in groups:
            if (pending := worker.pop(group.id)) is None:
                continue
            request = pending.request
            request.finish(group)
            if self.winding_down and group.id in request.broken:
                request.skip(group.id)

    def give_back(self, slot: int, groups: Iterable[str]) -> None:
        """Skip groups that a worker has not begun while the pool winds down."""
        if (worker := self._slots.get(slot)) is None:  # it was removed meanwhile
            return
        for name in groups:
            if (pending := worker.pop(name)) is not None:
                worker.unfinished -= pending.plan.size
                pending.request.skip(name)

    def assign(self) -> dict[int, list[PendingGroup]]:
        """Give waiting groups to workers with capacity, first to the fixed one that has most of it.

        Returns:
            What each worker, by slot, is to begin.
        """
        if any(request.ended for request in self._requests):
            self._drop_ended()
        for request in self._requests:
            if len(request.broken) == len(request.remaining):  # the others have ended
                request.broken.clear()
                self._queue += request.remaining.values()
        assigned: dict[int, list[PendingGroup]] = {}
        for number, slot in self._slots.items():
            if slot.suspects and slot.capacity and not slot.groups:
                assigned[number] = slot.suspects.pop()
                slot.add(assigned[number])
                slot.on_trial = len(slot.groups)
        fixed = [number for number, slot in self._slots.items() if not slot.elastic]
        free = {number: slot.free for number, slot in self._slots.items()}
        while self._queue:
            best = max(fixed, key=free.__getitem__, default=None)
            if best is None or not free[best]:
                best = next((number for number in free if free[number]), None)
            if best is None:
                break
            group = self._queue.popleft()
            self._slots[best].add([group])
            free[best] = self._slots[best].free
            assigned.setdefault(best, []).append(group)
        self._most_waiting = max(self._most_waiting, len(self._queue))
        return assigned

    def _failed(self, plan: GroupPlan, reason: str) -> Group:
        env, seats = self._envs[plan.component]
        text = f"environment {env!r} on task {safe_repr(plan.task)}: {reason}"
        failure = Failure("env", text)
        episodes = tuple(
            Episode(f"{plan.id}/{index}", env, plan.task, index, (), failure=failure)
            for index in range(plan.size)
        )
        return Group(plan.id, plan.task, episodes, seats)

    # --- what there is -------------------------------------------------------------------------

    def groups_on(self, slot: int) -> Mapping[str, PendingGroup]:
        """What a worker was given that has not ended, by id."""
        return self._slots[slot].groups if slot in self._slots else {}

    @property
    def busy(self) -> set[int]:
        """Workers that have groups, or suspects to play."""
        return {n for n, slot in self._slots.items() if slot.groups or slot.suspects}

    @property
    def waiting_episodes(self) -> int:
        """Episodes of the queue."""
        return sum(group.plan.size for group in self._queue)

    def take_most_waiting(self) -> int:
        """The most groups that waited at once since the last call."""
        most, self._most_waiting = self._most_waiting, len(self._queue)
        return most


def _awaited(groups: Iterable[PendingGroup]) -> list[PendingGroup]:
    return [group for group in groups if not group.request.ended]
