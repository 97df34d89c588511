"""How many env workers there should be: two clocks, and nothing cleverer."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["GROW_AFTER_S", "Growth", "Load"]

GROW_AFTER_S = 5.0  # of waiting for room on all workers, before another one is asked for


@dataclass(frozen=True, slots=True)
class Load:
    """What the workers have to do.

    Attributes:
        workers: that can play.
        asked: workers that were requested and have not started yet.
        waiting: groups that waited for room on all workers, the most at once since the last look.
    """

    workers: int
    asked: int
    waiting: int


class Growth:
    """When to ask for more workers, and for how many.

    Once episodes have waited for room on all workers for `GROW_AFTER_S` without a pause: as many as
    have room for those that wait, workers that were asked for before included.

    Args:
        most: workers in all, those asked for included.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._since: float | None = None  # when they began to wait

    def more(self, now: float, *, waiting: int, room: int, workers: int, asked: int) -> int:
        """How many more to ask for.

        Args:
            now: seconds of a clock that only grows.
            waiting: episodes that no worker has room for.
            room: of one worker, in episodes.
            workers: that can play.
            asked: that are not there yet.
        """
        if not waiting:
            self._since = None
            return 0
        if self._since is None:
            self._since = now
        if now - self._since < GROW_AFTER_S:
            return 0
        wanted = math.ceil(waiting / room) - asked
        return max(0, min(wanted, self._most - workers - asked))
