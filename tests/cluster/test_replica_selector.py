"""Which replica a request goes to, by hand: 8 ids a reply, an id of the prompt is 1/8 of one."""

from __future__ import annotations

import pytest

from rayrl.cluster.serving.replica_selector import PROBE_S, InFlightRequest, ReplicaSelector
from rayrl.types import Request, Sampling


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Road:
    """Two lanes and a clock."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.lanes = ReplicaSelector(2, self.clock)

    def send(self, session: str, prompt: int = 8) -> InFlightRequest:
        sampling = Sampling(max_tokens=8)
        return self.lanes.send(Request(session, tuple(range(prompt)), sampling))

    def answer(self, trip: InFlightRequest, after_s: float, cached: int = 0) -> None:
        self.clock.now += after_s
        self.lanes.answered(trip, 8, cached)

    def paces(self, *of: float, prompt: int = 8) -> list[str]:
        """Give each lane a pace; returns a conversation that is bound to each."""
        trips = [self.send(name, prompt) for name in "ab"]
        trips.sort(key=lambda trip: trip.lane)
        assert [trip.lane for trip in trips] == [0, 1]
        began = self.clock.now
        for trip, pace in sorted(zip(trips, of, strict=True), key=lambda one: one[1]):
            self.clock.now = began + pace * (8 + prompt / 8)
            self.lanes.answered(trip, 8, 0)
        return [trip.request.session for trip in trips]


@pytest.fixture
def road() -> Road:
    return Road()


def test_lanes_of_one_pace_get_the_same(road: Road) -> None:
    first = [road.send(f"s{k}").lane for k in range(20)]
    assert first.count(0) == 10
    assert [road.send(f"s{k}", 80).lane for k in range(20)] == first, "where its KV is"


def test_new_conversations_go_to_a_slow_lane_in_proportion(road: Road) -> None:
    road.paces(10.25, 1.0)
    lanes = [road.send(f"s{k}").lane for k in range(22)]
    assert lanes == [1] * 10 + [0] + [1] * 10 + [0], "10.25 × 1 < 1 × 11, 10.25 × 2 < 1 × 21"


def test_a_conversation_moves_when_waiting_costs_more_than_its_prompt(road: Road) -> None:
    slow, fast = road.paces(1.0, 0.1, prompt=80)
    # stays: 1 × (8 + (160 - 88) / 8) = 17; moves: 0.1 × (8 + 160 / 8) = 2.8
    trip = road.send(slow, 160)
    assert (trip.lane, trip.left) == (1, 0)
    trip = road.send(slow, 176)
    assert (trip.lane, trip.left) == (1, None), "and stays there"
    assert road.lanes.forget(slow) == 1
    assert road.lanes.forget(slow) is None
    assert road.send(fast, 160).lane == 1


def test_a_long_prompt_is_not_computed_again(road: Road) -> None:
    slow, _ = road.paces(1.0, 0.1, prompt=800)
    # stays: 1 × (8 + 8 / 8) = 9; moves: 0.1 × (8 + 816 / 8) = 11
    trip = road.send(slow, 816)
    assert (trip.lane, trip.left) == (0, None)


def test_what_saves_little_is_not_worth_it(road: Road) -> None:
    slow, _ = road.paces(0.01, 0.001)
    assert road.send(slow, 24).lane == 0, "0.01 × 9 s is less than 0.5 s"


def test_a_lane_that_does_not_answer_is_slow(road: Road) -> None:
    stuck, other = road.paces(0.1, 0.1)
    trip = road.send("c")
    hung = road.send("d")
    if trip.lane == 1:
        trip, hung = hung, trip
    road.answer(hung, 0.9)
    assert road.send(stuck, 24).lane == 0, "the pace it had"
    road.clock.now += 10  # 10.9 s for 9 units at most: 1.2 s each
    assert road.send(other, 24).lane == 1
    assert [road.send(f"e{k}").lane for k in range(6)] == [1] * 6
    road.lanes.late(trip)
    assert [road.send(f"f{k}").lane for k in range(6)] == [1] * 6, "it counts as measured"


def test_a_lane_that_recovers_is_found_out(road: Road) -> None:
    road.paces(10.0, 0.1)
    assert road.send("c").lane == 1
    road.clock.now += PROBE_S + 0.1
    probe = road.send("d")
    assert probe.lane == 0
    road.clock.now += PROBE_S + 0.1
    assert road.send("e").lane == 1, "one at a time"
    assert road.lanes.forget("d") == 0
    road.lanes.gone(probe)
    assert road.send("f").lane == 1, "not at once"
    road.clock.now += PROBE_S + 0.1
    assert road.send("g").lane == 0


def test_a_probe_that_is_answered_soon_counts_for_more_than_what_was_long_ago(road: Road) -> None:
    road.paces(10.0, 0.1)
    road.clock.now += 20
    probe = road.send("c")
    assert probe.lane == 0
    road.answer(probe, 0.9)  # 0.1 s a unit; the 10 s before have a weight of e^-(20.9 / 5)
    lanes = [road.send(f"s{k}").lane for k in range(12)]
    assert lanes == [1, 0] * 6, "10^0.0153 × 0.1^0.9847 = 0.107 s a unit, and 0.1"


def test_one_answer_that_is_far_off_does_not_last(road: Road) -> None:
    road.paces(10.0, 0.1)
    lane = road.lanes._lanes[0]
    for _ in range(3):
        trip = InFlightRequest(
            Request("d", (), Sampling(max_tokens=8)), 0, None, road.clock.now, 8.0, 8.0
        )
        road.answer(trip, 0.8)
    assert lane.pace == pytest.approx(10 ** (2 * 0.8**3 - 1)), "0.1 s, a fifth nearer each time"
