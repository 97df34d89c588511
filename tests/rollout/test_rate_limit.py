from __future__ import annotations

import pytest

from rayrl.rollout.rate_limit import MAX_PAUSE_S, RateLimiter, parse_duration, retry_after


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_requests_are_spread_over_the_minute() -> None:
    clock = Clock()
    limiter = RateLimiter(requests_per_minute=120, clock=clock)  # 2 per second, bursts of 2
    assert [limiter.reserve() for _ in range(5)] == [0, 0, 0.5, 1, 1.5]
    clock.now += 1.5  # the last of them may be sent now
    assert limiter.reserve() == 0.5
    clock.now += 60  # an idle minute does not accumulate
    assert [limiter.reserve() for _ in range(3)] == [0, 0, 0.5]


def test_a_slow_limit_starts_with_one_request() -> None:
    limiter = RateLimiter(requests_per_minute=6, clock=Clock())
    assert [limiter.reserve() for _ in range(3)] == [0, 10, 20]


def test_tokens_are_taken_after_the_answer() -> None:
    clock = Clock()
    limiter = RateLimiter(tokens_per_minute=600, clock=clock)  # 10 per second
    assert limiter.reserve() == 0
    limiter.take_tokens(110)  # of which 10 were in the bucket
    assert limiter.reserve() == 10
    clock.now += 4
    assert limiter.reserve() == 6
    limiter.take_tokens(0)  # a server that does not count tokens
    assert limiter.reserve() == 6


def test_no_limit_never_waits() -> None:
    limiter = RateLimiter()
    limiter.take_tokens(10**9)
    assert {limiter.reserve() for _ in range(1000)} == {0}


def test_a_pause_asked_for_by_the_server() -> None:
    clock = Clock()
    limiter = RateLimiter(clock=clock)
    limiter.read_headers(
        {"x-ratelimit-remaining-requests": "3", "x-ratelimit-reset-requests": "9s"}
    )
    assert limiter.reserve() == 0
    limiter.read_headers(
        {"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "1m2.5s"}
    )
    assert limiter.reserve() == MAX_PAUSE_S  # not longer, whatever it asks for
    limiter.pause(5)  # a shorter one does not end it
    assert limiter.paused_s() == 60
    clock.now += 60
    assert limiter.reserve() == 0


@pytest.mark.parametrize(
    ("text", "value"),
    [("6m0s", 360), ("20ms", 0.02), ("1.5", 1.5), ("1h1s", 3601), ("", None), ("soon", None)],
)
def test_durations(text: str, value: float | None) -> None:
    assert parse_duration(text) == value


def test_retry_after() -> None:
    assert retry_after({"retry-after": "7"}) == 7
    assert retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    assert retry_after({"retry-after": "later"}) is None
    assert retry_after({}) is None
