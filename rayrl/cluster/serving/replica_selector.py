"""Selects the replica for a request: the one that is expected to be the first to answer.

Each client (one per env worker) measures for itself how long its replicas take, waiting included;
no replica is asked, and none has to know that it is slow. A completion depends on the request's
seed and not on the replica, so the selection does not change what is sampled.

Work is counted in units of one sampled id. A replica's pace is its seconds per unit.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

from rayrl.types import Request

__all__ = ["InFlightRequest", "ReplicaSelector"]

PROMPT_WORK = 1 / 8  # of a prompt id that is not in the KV cache; a sampled id is 1
NEWEST = 0.2  # least weight of the newest measurement in a replica's pace
MIN_PACE = 1e-9  # seconds per unit
MEMORY_S = 5.0  # after which an earlier measurement hardly counts
SLOWER = 3.0  # a conversation leaves a replica that would take this many times as long as another,
SAVES_S = 0.5  # if that saves this much: equal replicas differ by chance, and the KV cache is lost
PROBE_S = 5.0  # a slow replica that was idle for this long gets a new conversation


@dataclass(eq=False, slots=True)
class InFlightRequest:
    """A request that has been sent to a replica and has no result yet.

    Attributes:
        replica: index of the selected replica.
        moved_from: index of the replica that its conversation has just left, if any.
        sent_at: seconds, by the selector's clock.
        expected_work: units of work, if the completion is as long as others were of late.
        max_work: units of work, if it is as long as it may be.
    """

    request: Request
    replica: int
    moved_from: int | None
    sent_at: float
    expected_work: float
    max_work: float


@dataclass(slots=True)
class _ReplicaState:
    """What the client knows of a replica.

    Attributes:
        pace: seconds per unit of work; None until measured.
        work: expected units in flight.
        in_flight: by identity, the oldest first.
    """

    pace: float | None = None
    measured_at: float = -math.inf
    idle_since: float = -math.inf
    work: float = 0.0
    in_flight: dict[int, InFlightRequest] = field(default_factory=dict)

    def best_possible_pace(self, now: float) -> float:
        """What the age of the oldest request without a result allows."""
        oldest = next(iter(self.in_flight.values()), None)
        return (now - oldest.sent_at) / oldest.max_work if oldest else 0.0


@dataclass(slots=True)
class _Conversation:
    """Where a conversation is: index of the replica, and how many ids its KV cache holds there."""

    replica: int
    cached: int


class ReplicaSelector:
    """Selects replicas by index, and measures how long they take.

    A new conversation goes to the replica that would be the first to finish it together with what
    is in flight there. It stays there, with its KV cache, until another replica would answer in a
    third of the time although it has to compute the whole prompt.

    Args:
        count: how many replicas there are.
        clock: monotonic, in seconds.
    """

    def __init__(self, count: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._replicas = [_ReplicaState() for _ in range(count)]
        self._clock = clock
        self._conversations: dict[str, _Conversation] = {}
        self._mean_sampled: float | None = None  # ids per completion, of late

    def select(self, request: Request) -> InFlightRequest:
        """Select a replica for a request, and count the request as in flight there."""
        now = self._clock()
        before = self._conversations.get(request.session)
        if before is None:
            replica = self._for_new(request, now)
        else:
            replica = self._for_known(request, before, now)
        stays = before is not None and before.replica == replica
        cached = before.cached if before is not None and stays else 0
        prompt_work = PROMPT_WORK * max(0, len(request.prompt_ids) - cached)
        in_flight = InFlightRequest(
            request,
            replica,
            None if before is None or stays else before.replica,
            now,
            self._expected_ids(request) + prompt_work,
            request.sampling.max_tokens + prompt_work,
        )
        self._conversations[request.session] = _Conversation(replica, cached)
        self._replicas[replica].in_flight[id(in_flight)] = in_flight
        self._replicas[replica].work += in_flight.expected_work
        return in_flight

    def completed(self, in_flight: InFlightRequest, sampled: int, cached: int) -> None:
        """Measure by a completion of `sampled` ids; `cached` prompt ids were in the KV cache."""
        prompt = len(in_flight.request.prompt_ids)
        self._measure(in_flight, sampled + PROMPT_WORK * max(0, prompt - cached))
        mean = self._mean_sampled
        self._mean_sampled = sampled if mean is None else mean + NEWEST * (sampled - mean)
        if in_flight.request.session in self._conversations:
            self._conversations[in_flight.request.session] = _Conversation(
                in_flight.replica, prompt + sampled
            )
        self.discard(in_flight)

    def timed_out(self, in_flight: InFlightRequest) -> None:
        """Measure by a deadline that passed without a result."""
        self._measure(in_flight, in_flight.max_work)
        self.discard(in_flight)

    def discard(self, in_flight: InFlightRequest) -> None:
        """Count a request as in flight no more, without measuring; again does no harm."""
        state = self._replicas[in_flight.replica]
        if state.in_flight.pop(id(in_flight), None) is not None:
            state.work = state.work - in_flight.expected_work if state.in_flight else 0.0
            state.idle_since = self._clock()

    def release(self, session: str) -> int | None:
        """Drop a conversation that is over; returns the index of the replica that has its KV."""
        conversation = self._conversations.pop(session, None)
        return conversation.replica if conversation else None

    def _measure(self, in_flight: InFlightRequest, work: float) -> None:
        state, now = self._replicas[in_flight.replica], self._clock()
        pace = max((now - in_flight.sent_at) / max(work, 1.0), MIN_PACE)
        if state.pace is None:
            state.pace = pace
        else:  # a geometric mean, so that an outlier, as the first call is, does not last
            weight = max(NEWEST, 1 - math.exp((state.measured_at - now) / MEMORY_S))
            state.pace *= (pace / state.pace) ** weight
        state.measured_at = now

    def _expected_ids(self, request: Request) -> float:
        limit = request.sampling.max_tokens
        return float(limit) if self._mean_sampled is None else min(self._mean_sampled, limit)

    def _paces(self, now: float) -> list[float]:
        """Of all replicas; one that was never measured counts as the best."""
        measured = [state.pace for state in self._replicas if state.pace is not None]
        best = min(measured, default=0.0)
        return [
            max(best if state.pace is None else state.pace, state.best_possible_pace(now), MIN_PACE)
            for state in self._replicas
        ]

    def _for_new(self, request: Request, now: float) -> int:
        paces = self._paces(now)
        for index, state in enumerate(self._replicas):
            slow = paces[index] > SLOWER * min(paces)
            if slow and not state.in_flight and now - state.idle_since > PROBE_S:
                return index
        return self._first_to_finish(request, paces)

    def _first_to_finish(
        self, request: Request, paces: list[float], *, exclude: int | None = None
    ) -> int:
        """The replica that would be first; of equals, one that depends on the session."""
        n, start = len(self._replicas), zlib.crc32(request.session.encode())
        order = [(start + k) % n for k in range(n) if (start + k) % n != exclude]
        own = self._expected_ids(request) + PROMPT_WORK * len(request.prompt_ids)
        return min(order, key=lambda index: paces[index] * (self._replicas[index].work + own))

    def _for_known(self, request: Request, conversation: _Conversation, now: float) -> int:
        current = conversation.replica
        if len(self._replicas) == 1:
            return current
        paces = self._paces(now)
        other = self._first_to_finish(request, paces, exclude=current)
        prompt, sampled = len(request.prompt_ids), self._expected_ids(request)
        stay_s = paces[current] * (sampled + PROMPT_WORK * max(0, prompt - conversation.cached))
        move_s = paces[other] * (sampled + PROMPT_WORK * prompt)
        return other if stay_s > max(SLOWER * move_s, move_s + SAVES_S) else current
