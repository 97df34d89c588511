"""Which replica answers a request: the one that is expected to be first.

A lane is a replica as one client sees it (`router.LaneRouter`). Each client measures for itself how
long its lanes take; nobody is asked, and no replica has to know that it is slow. An answer depends
on the request's seed and not on who gives it, so nothing here changes what is played.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

from rayrl.types import Request

__all__ = ["InFlightRequest", "ReplicaSelector"]

PROMPT_WORK = 1 / 8  # of an id of the prompt that has no KV yet; a sampled id is 1
NEWEST = 0.2  # the least weight that the newest measurement has in a lane's pace
LEAST = 1e-9  # pace, in seconds
FORGET_S = 5.0  # after which what was measured before hardly counts
SLOWER = 3.0  # a conversation leaves a lane that would take so many times as long as another,
SAVES_S = 0.5  # if that saves so much: lanes that are alike differ by chance, and KV is lost
PROBE_S = 5.0  # a slow lane that had nothing to do for so long gets a new conversation


@dataclass(eq=False, slots=True)
class InFlightRequest:
    """A request under way.

    Attributes:
        lane: which it took.
        left: the lane that its conversation was in before, if it has moved.
        began: when.
        work: that it probably is.
        most: work that it can be.
    """

    request: Request
    lane: int
    left: int | None
    began: float
    work: float
    most: float


@dataclass(slots=True)
class _Lane:
    """What is known of a lane; its pace is in seconds per unit of work, queueing included."""

    pace: float | None = None
    measured_at: float = -math.inf
    idle_since: float = -math.inf
    work: float = 0.0  # under way
    trips: dict[int, InFlightRequest] = field(default_factory=dict)  # the oldest first

    def overdue(self, now: float) -> float:
        """The pace it has at best, by the oldest request that it has not answered."""
        oldest = next(iter(self.trips.values()), None)
        return (now - oldest.began) / oldest.most if oldest else 0.0


class ReplicaSelector:
    """Chooses lanes, and learns from how long they take.

    A new conversation goes where the work that is under way, with its own, would be done first. It
    stays there, where its KV is, until another lane would answer in a third of the time although it
    has to compute the whole prompt.

    Args:
        n: lanes.
        clock: seconds that only grow.
    """

    def __init__(self, n: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._lanes = [_Lane() for _ in range(n)]
        self._clock = clock
        self._homes: dict[str, tuple[int, int]] = {}  # session -> lane, ids that have KV there
        self._sampled: float | None = None  # ids an answer, lately

    def send(self, request: Request) -> InFlightRequest:
        """Choose a lane for a request, and count it as under way."""
        now = self._clock()
        home = self._homes.get(request.session)
        lane = self._new(request, now) if home is None else self._bound(request, *home, now)
        has = home[1] if home is not None and home[0] == lane else 0
        new = PROMPT_WORK * max(0, len(request.prompt_ids) - has)
        trip = InFlightRequest(
            request,
            lane,
            home[0] if home is not None and home[0] != lane else None,
            now,
            self._expected(request) + new,
            request.sampling.max_tokens + new,
        )
        self._homes[request.session] = (lane, has)
        self._lanes[lane].trips[id(trip)] = trip
        self._lanes[lane].work += trip.work
        return trip

    def answered(self, trip: InFlightRequest, sampled: int, cached: int) -> None:
        """It has been answered, with so many ids; so many of the prompt's had KV."""
        prompt = len(trip.request.prompt_ids)
        self._measure(trip, sampled + PROMPT_WORK * max(0, prompt - cached))
        old = self._sampled
        self._sampled = sampled if old is None else old + NEWEST * (sampled - old)
        if trip.request.session in self._homes:
            self._homes[trip.request.session] = (trip.lane, prompt + sampled)
        self.gone(trip)

    def late(self, trip: InFlightRequest) -> None:
        """It was waited for in vain."""
        self._measure(trip, trip.most)
        self.gone(trip)

    def gone(self, trip: InFlightRequest) -> None:
        """It is under way no more, and says nothing about its lane."""
        lane = self._lanes[trip.lane]
        if lane.trips.pop(id(trip), None) is not None:
            lane.work = lane.work - trip.work if lane.trips else 0.0
            lane.idle_since = self._clock()

    def forget(self, session: str) -> int | None:
        """A conversation is over; returns the lane that has its KV."""
        home = self._homes.pop(session, None)
        return home[0] if home else None

    def _measure(self, trip: InFlightRequest, work: float) -> None:
        lane, now = self._lanes[trip.lane], self._clock()
        pace = max((now - trip.began) / max(work, 1.0), LEAST)
        if lane.pace is None:
            lane.pace = pace
        else:  # by ratios, so that one that is far off, as the first call is, does not last
            weight = max(NEWEST, 1 - math.exp((lane.measured_at - now) / FORGET_S))
            lane.pace *= (pace / lane.pace) ** weight
        lane.measured_at = now

    def _expected(self, request: Request) -> float:
        most = request.sampling.max_tokens
        return float(most) if self._sampled is None else min(self._sampled, most)

    def _paces(self, now: float) -> list[float]:
        """Of all lanes; one that was never measured counts as the best."""
        best = min((one.pace for one in self._lanes if one.pace is not None), default=0.0)
        return [
            max(best if one.pace is None else one.pace, one.overdue(now), LEAST)
            for one in self._lanes
        ]

    def _new(self, request: Request, now: float) -> int:
        paces = self._paces(now)
        for index, lane in enumerate(self._lanes):
            slow = paces[index] > SLOWER * min(paces)
            if slow and not lane.trips and now - lane.idle_since > PROBE_S:
                return index
        return self._first(request, paces)

    def _first(self, request: Request, paces: list[float], *, but: int | None = None) -> int:
        """The lane that would be done first; equals are taken in an order of the session's own."""
        n, start = len(self._lanes), zlib.crc32(request.session.encode())
        order = [(start + k) % n for k in range(n) if (start + k) % n != but]
        own = self._expected(request) + PROMPT_WORK * len(request.prompt_ids)
        return min(order, key=lambda index: paces[index] * (self._lanes[index].work + own))

    def _bound(self, request: Request, home: int, has: int, now: float) -> int:
        if len(self._lanes) == 1:
            return home
        paces = self._paces(now)
        other = self._first(request, paces, but=home)
        whole, sampled = len(request.prompt_ids), self._expected(request)
        stay_s = paces[home] * (sampled + PROMPT_WORK * max(0, whole - has))
        move_s = paces[other] * (sampled + PROMPT_WORK * whole)
        return other if stay_s > max(SLOWER * move_s, move_s + SAVES_S) else home
