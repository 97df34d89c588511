"""An environment's code within a wall time, whatever that code does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import TypeVar

from rayrl.errors import EnvError, described
from rayrl.rollout.agent import Agent

__all__ = ["Late", "Stopped", "within"]

T = TypeVar("T")

_GRACE_S = 1.0  # for a cancelled environment to clean up after itself


class Late(Exception):
    """The deadline passed; `on_player` says who was being waited for."""

    def __init__(self, on_player: bool) -> None:
        super().__init__()
        self.on_player = on_player


class Stopped(Exception):
    """It was ended from outside."""


async def within(
    running: asyncio.Future[T],
    deadline_s: float | None,
    agents: Sequence[Agent],
    stop: asyncio.Future[None] | None = None,
) -> T:
    """What `running` returns, or Late or Stopped; it is cancelled then, and with us.

    Args:
        running: the environment's coroutine, in a task of its own.
        deadline_s: None is no limit. The time a player held its requests back is not counted.
        agents: closed where it is cancelled.
        stop: ends it once it is done.
    """
    began = time.monotonic()
    left = deadline_s
    ends = (running,) if stop is None else (running, stop)
    try:
        while not running.done() and (left is None or left > 0):
            await asyncio.wait(ends, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if stop is not None and stop.done() and not running.done():
                await _stop(running, agents)
                raise Stopped
            if deadline_s is not None:
                held = sum(agent.held_s for agent in agents)
                left = began + deadline_s + held - time.monotonic()
    except asyncio.CancelledError:
        await _stop(running, agents)
        raise
    if running.done():
        if running.cancelled():  # nobody here did: its own code did
            raise EnvError("the environment cancelled itself")
        error = running.exception()
        if error is not None and not isinstance(error, Exception):  # it would end the program
            raise EnvError(described(error)) from error
        return running.result()
    on_player = any(agent.waiting for agent in agents)
    await _stop(running, agents)
    raise Late(on_player)


async def _stop(running: asyncio.Future[T], agents: Sequence[Agent]) -> None:
    for agent in agents:
        agent.closed = True
    for _ in range(3):
        running.cancel()
        await asyncio.wait((running,), timeout=_GRACE_S)
        if running.done():
            break
    if running.done() and not running.cancelled():
        running.exception()  # looked at, so that it is not reported as lost
