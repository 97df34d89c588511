"""Client-side rate limiting: token buckets, and the limits a server reports."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

__all__ = ["MAX_PAUSE_S", "RateLimiter", "parse_duration", "retry_after"]

MAX_PAUSE_S = 60.0  # cap on the wait that a server asks for
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|h|m|s)")
_UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


class RateLimiter:
    """Token buckets for requests and tokens. It returns waiting times and never sleeps itself.

    Requests are spread evenly: bursts are limited to one second's worth, so a minute exceeds its
    limit by at most that. The tokens of a request are not estimated: they are taken once the
    server has counted them, and further requests wait until the bucket is no longer in debt.

    Args:
        requests_per_minute: 0 is no limit.
        tokens_per_minute: 0 is no limit.
        clock: monotonic time in seconds.
    """

    def __init__(
        self,
        requests_per_minute: float = 0.0,
        tokens_per_minute: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        now = clock()
        self._requests = _Bucket(requests_per_minute / 60, now)
        self._tokens = _Bucket(tokens_per_minute / 60, now)
        self._paused_until = now

    def reserve(self) -> float:
        """Count the next request; return the seconds to wait before sending it."""
        now = self._clock()
        return max(self._requests.take(1, now), self._tokens.take(0, now), self.paused_s())

    def paused_s(self) -> float:
        """Return the seconds until the server's pause ends; check it again after waiting."""
        return max(self._paused_until - self._clock(), 0.0)

    def take_tokens(self, tokens: int) -> None:
        """Take the tokens of an answered request."""
        self._tokens.take(tokens, self._clock())

    def pause(self, seconds: float) -> None:
        """Pause all requests, as the server asked, for at most `MAX_PAUSE_S`."""
        self._paused_until = max(self._paused_until, self._clock() + min(seconds, MAX_PAUSE_S))

    def read_headers(self, headers: Mapping[str, str]) -> None:
        """Pause if `x-ratelimit-*` headers say that the quota is used up."""
        for kind in ("requests", "tokens"):
            left = headers.get(f"x-ratelimit-remaining-{kind}", "")
            wait = parse_duration(headers.get(f"x-ratelimit-reset-{kind}", ""))
            if left.strip() == "0" and wait is not None:
                self.pause(wait)


class _Bucket:
    """Refills at `rate` per second up to one second's worth (at least 1); may go negative."""

    def __init__(self, rate: float, now: float) -> None:
        self.rate, self.level, self.at = rate, max(rate, 1.0), now

    def take(self, amount: float, now: float) -> float:
        """Take `amount`; return the seconds until the level is no longer negative."""
        if not self.rate:
            return 0.0
        self.level = min(self.level + (now - self.at) * self.rate, max(self.rate, 1.0)) - amount
        self.at = now
        return max(-self.level / self.rate, 0.0)


def parse_duration(text: str) -> float | None:
    """Parse `"6m0s"`, `"20ms"` or `"1.5"` to seconds; return None for anything else."""
    text = text.strip()
    try:
        return max(float(text), 0.0)
    except ValueError:
        parts = _DURATION.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        return None
    return sum(float(number) * _UNITS[unit] for number, unit in parts)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that a `Retry-After` header (RFC 9110, a number or a date) asks for."""
    value = headers.get("retry-after", "")
    try:
        return max(float(value), 0.0)
    except ValueError:
        pass
    try:
        return max((parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds(), 0.0)
    except (ValueError, TypeError):
        return None
