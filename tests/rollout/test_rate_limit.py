from __future__ import annotations

import pytest

from rayrl.rollout.rate_limit import LONGEST_HOLD_S, Limiter, retry_after, seconds


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_requests_are_spread_over_the_minute() -> None:
    clock = Clock()
    limiter = Limiter(requests_per_minute=120, clock=clock)  # 2 a second, a burst of 2
    assert [limiter.reserve() for _ in range(5)] == [0, 0, 0.5, 1, 1.5]
    clock.now += 1.5  # the last of them may go now
    assert limiter.reserve() == 0.5
    clock.now += 60  # a quiet minute is not saved up
    assert [limiter.reserve() for _ in range(3)] == [0, 0, 0.5]


def test_a_slow_limit_starts_with_one_request() -> None:
    limiter = Limiter(requests_per_minute=6, clock=Clock())
    assert [limiter.reserve() for _ in range(3)] == [0, 10, 20]


def test_tokens_are_paid_for_afterwards() -> None:
    clock = Clock()
    limiter = Limiter(tokens_per_minute=600, clock=clock)  # 10 a second
    assert limiter.reserve() == 0
    limiter.spent(110)  # 10 were there
    assert limiter.reserve() == 10
    clock.now += 4
    assert limiter.reserve() == 6
    limiter.spent(0)  # a server that does not count
    assert limiter.reserve() == 6


def test_no_limit_never_waits() -> None:
    limiter = Limiter()
    limiter.spent(10**9)
    assert {limiter.reserve() for _ in range(1000)} == {0}


def test_what_the_server_says_holds_everything() -> None:
    clock = Clock()
    limiter = Limiter(clock=clock)
    limiter.heed({"x-ratelimit-remaining-requests": "3", "x-ratelimit-reset-requests": "9s"})
    assert limiter.reserve() == 0
    limiter.heed({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "1m2.5s"})
    assert limiter.reserve() == LONGEST_HOLD_S  # not longer, whatever it asks for
    limiter.hold(5)  # a shorter one does not open it
    assert limiter.held_s() == 60
    clock.now += 60
    assert limiter.reserve() == 0


@pytest.mark.parametrize(
    ("text", "value"),
    [("6m0s", 360), ("20ms", 0.02), ("1.5", 1.5), ("1h1s", 3601), ("", None), ("soon", None)],
)
def test_durations(text: str, value: float | None) -> None:
    assert seconds(text) == value


def test_retry_after() -> None:
    assert retry_after({"retry-after": "7"}) == 7
    assert retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    assert retry_after({"retry-after": "later"}) is None
    assert retry_after({}) is None
