"""Results of many requests on one stream: what makes a request through Serve cheap.

A client submits requests in batches and reads their results, as they finish, from one stream per
replica:

    client                                   replica
    submit(batch 1)  ─────────────────────►  starts generating; returns its id
    results()        ─────────────────────►  opens the stream
    submit(batch 2)  ─────────────────────►  starts generating too
                     ◄─────────────────────  results of both batches, in lists

A message costs a Serve process 1 to 3 ms whatever it carries, so a stream per batch, on which
results come one by one, would cost as much as a call per request. Both sides therefore hold a
message back for a moment so that others can go with it (`BatchingDelay`). Measured side by side
(`benchmarks/RESULTS.md`), this costs 0.93 times the CPU per turn of an earlier design, in which
each batch was a streaming call and one of those calls carried the results of all.

Env workers do the same with what they send to the driver and to the recorder: each of n workers
waits n × `PAUSE_S` between two messages, so that the receiver gets at most 1 / `PAUSE_S` messages
per second from all of them together.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from functools import partial
from typing import Any

from rayrl.errors import InfraError
from rayrl.types import Completion, Request

__all__ = ["PAUSE_S", "BatchingDelay", "NoStream", "Outcome", "Result", "ResultStream"]

Outcome = Completion | Exception
"""The completion of a request, or the error that ended it."""

Result = tuple[int, Outcome]
"""The number of a request, and its outcome."""

PAUSE_S = 0.01  # per worker, between its messages to the driver or the recorder
LEAST_S, MOST_S = 0.001, 0.02  # bounds of the batching delay
SHARE = 0.01  # of a request's latency that each side may add to it
NEWEST = 0.05  # weight of the newest latency in the mean
IDLE_S = 1.0  # a stream without requests stays open: a single conversation needs one all the time


class NoStream(InfraError):
    """A replica has no requests of this client, or already sends their results to it."""


class BatchingDelay:
    """How long to hold a message back so that others can go with it.

    Attributes:
        seconds: a hundredth of the mean latency of late, between `least_s` and `most_s`.
    """

    def __init__(self, least_s: float = LEAST_S, most_s: float = MOST_S) -> None:
        self.seconds = least_s
        self._least_s, self._most_s, self._mean_s = least_s, most_s, 0.0

    def observe(self, latency_s: float) -> None:
        """Count the latency of a request that has finished."""
        self._mean_s += NEWEST * (latency_s - self._mean_s)
        self.seconds = min(max(SHARE * self._mean_s, self._least_s), self._most_s)


class ResultStream:
    """The requests of one client at one replica, and the stream of their results.

    Args:
        generate: returns the completion of a request, or the error that ended it.

    Attributes:
        opened: whether the client has begun to read.
    """

    def __init__(self, generate: Callable[[Request], Coroutine[Any, Any, Outcome]]) -> None:
        self.opened = False
        self._generate = generate
        self._delay = BatchingDelay()
        self._running: dict[int, asyncio.Task[Outcome]] = {}
        self._finished: list[Result] = []
        self._any_finished = asyncio.Event()

    def start(self, number: int, request: Request) -> None:
        """Generate in a task of its own; does nothing for a number that is being generated."""
        if number not in self._running:
            self._running[number] = task = asyncio.create_task(self._generate(request))
            started = asyncio.get_running_loop().time()
            task.add_done_callback(partial(self._finish, number, started))

    def _finish(self, number: int, started: float, task: asyncio.Task[Outcome]) -> None:
        del self._running[number]
        outcome = InfraError("the request was cancelled") if task.cancelled() else task.result()
        self._finished.append((number, outcome))
        self._any_finished.set()
        self._delay.observe(asyncio.get_running_loop().time() - started)

    def cancel(self, numbers: Iterable[int]) -> None:
        """Stop generating for these requests; each of them still gets a result, an error."""
        for number in numbers:
            if (task := self._running.get(number)) is not None:
                task.cancel()

    async def read(self) -> AsyncIterator[list[Result]]:
        """Yield results in lists, until there has been no request without one for `IDLE_S`."""
        loop = asyncio.get_running_loop()
        not_before = 0.0
        while True:
            try:
                async with asyncio.timeout(None if self._running else IDLE_S):
                    await self._any_finished.wait()
            except TimeoutError:
                if self._running or self._finished:  # a request came while this waited
                    continue
                return
            # at least one iteration of the event loop: what finished in the same engine step
            await asyncio.sleep(max(not_before - loop.time(), 0))
            self._any_finished.clear()
            results, self._finished = self._finished, []
            not_before = loop.time() + self._delay.seconds
            yield results

    def close(self) -> None:
        """Stop generating: the client is gone."""
        self.cancel(self._running)
