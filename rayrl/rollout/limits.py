"""Limits on episodes: how many are live, how long one may take, and cancelling them early."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from rayrl.errors import EnvError, describe_error
from rayrl.rollout.agent import Agent
from rayrl.rollout.conversation import Throttling

__all__ = [
    "ConcurrencyLimit",
    "DeadlinePassed",
    "EpisodeCancelled",
    "GroupCanceller",
    "run_with_deadline",
]

_GRACE_S = 1.0  # for a cancelled environment to clean up after itself
T = TypeVar("T")


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


class DeadlinePassed(Exception):
    """The deadline passed; `on_player` says whether a player was being waited for."""

    def __init__(self, on_player: bool) -> None:
        super().__init__()
        self.on_player = on_player


class EpisodeCancelled(Exception):
    """The episode was cancelled from outside."""


async def run_with_deadline(
    running: asyncio.Future[T],
    deadline_s: float | None,
    agents: Sequence[Agent],
    throttling: Throttling,
    cancelled: asyncio.Future[None] | None = None,
) -> T:
    """Return the result of `running`; cancel it if the deadline passes or the caller is cancelled.

    Args:
        running: the environment's coroutine, in its own task.
        deadline_s: wall time, excluding time that players spent on rate limits; None is no limit.
        agents: the episode's agents; closed if `running` is cancelled.
        throttling: theirs.
        cancelled: cancels the episode when done.

    Raises:
        DeadlinePassed: the deadline passed.
        EpisodeCancelled: `cancelled` was done first.
        EnvError: the environment cancelled itself or raised something that would end the program.
    """
    began = time.monotonic()
    left = deadline_s
    waited = (running,) if cancelled is None else (running, cancelled)
    try:
        while not running.done() and (left is None or left > 0):
            await asyncio.wait(waited, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if cancelled is not None and cancelled.done() and not running.done():
                await _cancel(running, agents)
                raise EpisodeCancelled
            if deadline_s is not None:
                left = began + deadline_s + throttling.seconds - time.monotonic()
    except asyncio.CancelledError:
        await _cancel(running, agents)
        raise
    if running.done():
        if running.cancelled():  # not by this function
            raise EnvError("the environment cancelled itself")
        error = running.exception()
        if error is not None and not isinstance(error, Exception):  # would end the program
            raise EnvError(describe_error(error)) from error
        return running.result()
    on_player = any(agent.activity.waiting for agent in agents)
    await _cancel(running, agents)
    raise DeadlinePassed(on_player)


async def _cancel(running: asyncio.Future[T], agents: Sequence[Agent]) -> None:
    for agent in agents:
        agent.activity.closed = True
    for _ in range(3):
        running.cancel()
        await asyncio.wait((running,), timeout=_GRACE_S)
        if running.done():
            break
    if running.done() and not running.cancelled():
        running.exception()  # retrieve it, so that asyncio does not log it
