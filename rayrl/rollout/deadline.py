"""Run an environment's coroutine with a wall-time limit that it cannot evade."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import TypeVar

from rayrl.errors import EnvError, describe_error
from rayrl.rollout.agent import Agent

__all__ = ["DeadlinePassed", "EpisodeCancelled", "run_with_deadline"]

T = TypeVar("T")

_GRACE_S = 1.0  # for a cancelled environment to clean up after itself


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
    cancelled: asyncio.Future[None] | None = None,
) -> T:
    """Return the result of `running`; cancel it if the deadline passes or the caller is cancelled.

    Args:
        running: the environment's coroutine, in its own task.
        deadline_s: wall time, excluding time that players spent on rate limits; None is no limit.
        agents: the episode's agents; closed if `running` is cancelled.
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
                throttled = sum(agent.throttled_s for agent in agents)
                left = began + deadline_s + throttled - time.monotonic()
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
    on_player = any(agent.waiting for agent in agents)
    await _cancel(running, agents)
    raise DeadlinePassed(on_player)


async def _cancel(running: asyncio.Future[T], agents: Sequence[Agent]) -> None:
    for agent in agents:
        agent.closed = True
    for _ in range(3):
        running.cancel()
        await asyncio.wait((running,), timeout=_GRACE_S)
        if running.done():
            break
    if running.done() and not running.cancelled():
        running.exception()  # retrieve it, so that asyncio does not log it
