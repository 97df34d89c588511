"""A limit on live episodes, and early cancellation of a group's episodes."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable

__all__ = ["ConcurrencyLimit", "GroupCanceller"]


class ConcurrencyLimit:
    """Slots for live episodes, shared by all `play_groups` calls on one event loop.

    Attributes:
        size: number of slots.
        free: number of free slots.
    """

    def __init__(self, size: int) -> None:
        self.size = self.free = size
        self._waiters: deque[Callable[[], None]] = deque()

    def try_acquire(self, on_free: Callable[[], None]) -> bool:
        """Take a slot; if none is free, call `on_free` once when one may be."""
        if self.free > 0:
            self.free -= 1
            return True
        if on_free not in self._waiters:
            self._waiters.append(on_free)
        return False

    def release(self) -> None:
        """Return a slot."""
        self.free += 1
        if self._waiters:
            self._waiters.popleft()()

    def remove_waiter(self, on_free: Callable[[], None]) -> None:
        """Cancel a pending `on_free` callback, if there is one."""
        if on_free in self._waiters:
            self._waiters.remove(on_free)


class GroupCanceller:
    """Cancels the live episodes of groups. Belongs to one event loop.

    Args:
        version: returns the weights version that episodes starting now are played with.
    """

    def __init__(self, version: Callable[[], int]) -> None:
        self._version = version
        self._groups: dict[str, tuple[int, asyncio.Future[None]]] = {}

    def cancelled(self, group: str) -> asyncio.Future[None]:
        """Return a future that is done once the group is cancelled.

        The first call, when the group's first episode starts, records its weights version.
        """
        if group not in self._groups:
            self._groups[group] = self._version(), asyncio.get_running_loop().create_future()
        return self._groups[group][1]

    def cancel(self, groups: Iterable[str], min_version: int) -> None:
        """Cancel those that started with weights older than `min_version`; ignore unknown ones."""
        for group in groups:
            if group in self._groups:
                version, future = self._groups[group]
                if version < min_version and not future.done():
                    future.set_result(None)

    def remove(self, group: str) -> None:
        """Drop a group that has ended."""
        self._groups.pop(group, None)
