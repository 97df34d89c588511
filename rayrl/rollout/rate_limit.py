"""How fast a server may be asked: two buckets, and what the server itself says."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

__all__ = ["LONGEST_HOLD_S", "Limiter", "retry_after", "seconds"]

LONGEST_HOLD_S = 60.0  # a server that asks for more is asked again after this
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|h|m|s)")
_UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


class Limiter:
    """Token buckets of requests and of tokens. It says how long to wait and never sleeps itself.

    Requests are spread evenly: a burst is one second's worth, so that a minute never has more than
    that above its number. What a request will cost is not guessed: its tokens are taken when the
    server has counted them, and requests wait until what was taken too much has flowed back.

    Args:
        requests_per_minute: 0 is no limit.
        tokens_per_minute: 0 is no limit.
        clock: seconds that only grow.
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
        self._open_at = now

    def reserve(self) -> float:
        """Seconds to wait before the next request, which is counted by this call."""
        now = self._clock()
        return max(self._requests.take(1, now), self._tokens.debt_s(now), self.held_s())

    def held_s(self) -> float:
        """Seconds until requests may go out again; those that waited their turn ask as well."""
        return max(self._open_at - self._clock(), 0.0)

    def spent(self, tokens: int) -> None:
        """Take the tokens an answered request cost."""
        self._tokens.take(tokens, self._clock())

    def hold(self, seconds: float) -> None:
        """Let nothing out for so long: the server said so."""
        self._open_at = max(self._open_at, self._clock() + min(seconds, LONGEST_HOLD_S))

    def heed(self, headers: Mapping[str, str]) -> None:
        """Hold where `x-ratelimit-*` headers say that nothing is left."""
        for kind in ("requests", "tokens"):
            left = headers.get(f"x-ratelimit-remaining-{kind}", "")
            wait = seconds(headers.get(f"x-ratelimit-reset-{kind}", ""))
            if left.strip() == "0" and wait is not None:
                self.hold(wait)


class _Bucket:
    """What flows in at `rate` a second, at most a second's worth (and one), and may be owed."""

    def __init__(self, rate: float, now: float) -> None:
        self.rate, self.level, self.at = rate, max(rate, 1.0), now

    def take(self, amount: float, now: float) -> float:
        """Take it; returns the seconds until it has flowed in."""
        if not self.rate:
            return 0.0
        self._flow(now)
        self.level -= amount
        return max(-self.level / self.rate, 0.0)

    def debt_s(self, now: float) -> float:
        """Seconds until nothing is owed."""
        return self.take(0, now)

    def _flow(self, now: float) -> None:
        self.level = min(self.level + (now - self.at) * self.rate, max(self.rate, 1.0))
        self.at = now


def seconds(text: str) -> float | None:
    """`"6m0s"`, `"20ms"` or `"1.5"` as seconds; None for anything else."""
    text = text.strip()
    try:
        return max(float(text), 0.0)
    except ValueError:
        found = _DURATION.findall(text)
    if not found or "".join(number + unit for number, unit in found) != text:
        return None
    return sum(float(number) * _UNITS[unit] for number, unit in found)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds a `Retry-After` header asks to wait (RFC 9110, a number or a date)."""
    value = headers.get("retry-after", "")
    try:
        return max(float(value), 0.0)
    except ValueError:
        pass
    try:
        return max((parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds(), 0.0)
    except (ValueError, TypeError):
        return None
