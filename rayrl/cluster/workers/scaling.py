"""When to start more env workers, and how many."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["GROW_AFTER_S", "Growth", "Load"]

GROW_AFTER_S = 5.0  # with episodes waiting for capacity, before more workers are requested


@dataclass(frozen=True, slots=True)
class Load:
    """What the workers have to do.

    Attributes:
        workers: number of workers that can play.
        asked: number of workers that were requested and have not started yet.
        waiting: the most groups that waited for capacity at once since the last `Load`.
    """

    workers: int
    asked: int
    waiting: int


class Growth:
    """Decides how many more workers to request.

    Once episodes have waited for capacity for `GROW_AFTER_S` without a pause: as many workers as
    they need, less those that were requested before and have not started.

    Args:
        most: the most workers in all, requested ones included.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._since: float | None = None  # when episodes began to wait

    def more(self, now: float, *, waiting: int, capacity: int, workers: int, asked: int) -> int:
        """Return how many more workers to request.

        Args:
            now: seconds, of a monotonic clock.
            waiting: episodes for which no worker has capacity.
            capacity: of one worker, in episodes.
            workers: number that can play.
            asked: number that were requested and have not started.
        """
        if not waiting:
            self._since = None
            return 0
        if self._since is None:
            self._since = now
        if now - self._since < GROW_AFTER_S:
            return 0
        wanted = math.ceil(waiting / capacity) - asked
        return max(0, min(wanted, self._most - workers - asked))
