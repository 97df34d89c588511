"""Episodes that are being played: how many at once, and an early end for those of a plan."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable

__all__ = ["ConcurrencyLimit", "GroupCanceller"]


class ConcurrencyLimit:
    """Places for live episodes, shared by all who play on one event loop.

    Attributes:
        most: places.
        left: of them that are free.
    """

    def __init__(self, most: int) -> None:
        self.most = self.left = most
        self._waiting: deque[Callable[[], None]] = deque()

    def take(self, wake: Callable[[], None]) -> bool:
        """Take a place; if there is none, `wake` is called once when there may be one."""
        if self.left > 0:
            self.left -= 1
            return True
        if wake not in self._waiting:
            self._waiting.append(wake)
        return False

    def give(self) -> None:
        """Give a place back."""
        self.left += 1
        if self._waiting:
            self._waiting.popleft()()

    def forget(self, wake: Callable[[], None]) -> None:
        """Who waited does not want a place any more."""
        if wake in self._waiting:
            self._waiting.remove(wake)


class GroupCanceller:
    """Ends the episodes of a plan before their time. Belongs to one event loop.

    Args:
        version: gives the weights version that who begins now plays with.
    """

    def __init__(self, version: Callable[[], int]) -> None:
        self._version = version
        self._of: dict[str, tuple[int, asyncio.Future[None]]] = {}

    def of(self, plan: str) -> asyncio.Future[None]:
        """Done once the plan is to be stopped; asked when its first episode begins, and later."""
        if plan not in self._of:
            self._of[plan] = self._version(), asyncio.get_running_loop().create_future()
        return self._of[plan][1]

    def stop(self, plans: Iterable[str], oldest: int) -> None:
        """Stop those that began with weights older than `oldest`; unknown ones are fine."""
        for plan in plans:
            if plan in self._of:
                version, future = self._of[plan]
                if version < oldest and not future.done():
                    future.set_result(None)

    def forget(self, plan: str) -> None:
        """The plan is over."""
        self._of.pop(plan, None)
