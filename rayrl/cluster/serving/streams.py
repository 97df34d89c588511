"""Many calls, one stream of answers: what makes a turn through Serve cheap.

A message on a Serve stream costs about as much as a call, so a stream for each call, with answers
that come one by one, costs as much as a call for each request. Here the answers to all calls of one
caller travel on the stream of one of them, the carrier, in lists; a call that finds a carrier ends
at once and says which it is. The carrier ends when nothing is left to answer.

Both sides wait for company, `Pace` says how long: a small share of what an answer takes anyway.

What workers send to one process, the driver or the recorder, waits the longer the more workers
there are: `PAUSE_S` for each. So there are as many messages per second from many workers as from
one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from rayrl.errors import InfraError
from rayrl.types import Completion

__all__ = [
    "PAUSE_S",
    "Answer",
    "Carried",
    "CarrierGone",
    "Inbox",
    "Lines",
    "Mailbox",
    "Pace",
    "Running",
]

Answer = tuple[int, Completion | Exception]
"""Number of the request, and what came of it."""

T = TypeVar("T")
Running = asyncio.Task[Completion | Exception]

PAUSE_S = 0.01  # for each worker, between what one of them sends to the driver or the recorder
LEAST_S, MOST_S = 0.001, 0.02
SHARE = 0.01  # of the time of an answer: each side may make it that much later
MEMORY = 0.05  # weight of the newest answer in the mean


@dataclass(frozen=True, slots=True)
class Carried:
    """The only item of a call whose answers travel with another call's.

    Attributes:
        by: number of that call.
    """

    by: int


class CarrierGone(Exception):
    """The call that was to bring the answers ended without them."""


class Pace:
    """How long a message may wait for others to travel with.

    Attributes:
        wait_s: seconds; a hundredth of what answers took of late, within bounds.
    """

    def __init__(self, least_s: float = LEAST_S, most_s: float = MOST_S) -> None:
        self.wait_s = least_s
        self._least_s, self._most_s, self._mean_s = least_s, most_s, 0.0

    def took(self, seconds: float) -> None:
        """An answer took that long."""
        self._mean_s += MEMORY * (seconds - self._mean_s)
        self.wait_s = min(max(SHARE * self._mean_s, self._least_s), self._most_s)


class Mailbox:
    """A replica's side: answers to one caller.

    Args:
        carrier: number of the call that carries them.

    Attributes:
        carrier: likewise.
        pace: of its messages.
    """

    def __init__(self, carrier: int) -> None:
        self.carrier = carrier
        self.pace = Pace()
        self._ready: list[Answer] = []
        self._some = asyncio.Event()
        self._tasks: set[Running] = set()
        self._left = 0  # requests whose answers have not been carried off

    def expect(self, number: int, answer: Coroutine[Any, Any, Completion | Exception]) -> Running:
        """Have a request answered; returns the task, which may be cancelled."""
        self._left += 1
        task = asyncio.create_task(answer)
        self._tasks.add(task)
        task.add_done_callback(partial(self._put, number, asyncio.get_running_loop().time()))
        return task

    def _put(self, number: int, began: float, task: Running) -> None:
        self._tasks.discard(task)
        gone = task.cancelled()  # the rest of its call goes on
        self._ready.append((number, InfraError("it was cancelled") if gone else task.result()))
        self._some.set()
        self.pace.took(asyncio.get_running_loop().time() - began)

    async def carry(self) -> AsyncIterator[list[Answer]]:
        """Answers in lists, until nothing is left; more may be expected meanwhile."""
        loop = asyncio.get_running_loop()
        next_at = 0.0
        while self._left:
            await self._some.wait()
            if (wait := next_at - loop.time()) > 0:
                await asyncio.sleep(wait)
            else:
                await asyncio.sleep(0)  # what finished in the same engine step comes along
            self._some.clear()
            answers, self._ready = self._ready, []
            self._left -= len(answers)
            next_at = loop.time() + self.pace.wait_s
            yield answers

    def close(self) -> None:
        """Nobody listens any more."""
        for task in self._tasks:
            task.cancel()


class Inbox:
    """The caller's side of one call: answers that come on another's stream."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[list[Answer] | None] = asyncio.Queue()

    def put(self, answers: list[Answer] | None) -> None:
        """None: nothing comes any more."""
        self._queue.put_nowait(answers)

    async def get(self) -> list[Answer]:
        """The next list.

        Raises:
            CarrierGone: there is none.
        """
        answers = await self._queue.get()
        if answers is None:
            raise CarrierGone
        return answers


@dataclass(slots=True)
class _Line:
    """A call: numbers of its requests, how many are unanswered, and who rides on its stream."""

    numbers: range
    left: int
    inbox: Inbox
    riders: set[Inbox]


class Lines:
    """The caller's side: numbers the requests of all calls, and hands answers to their call."""

    def __init__(self) -> None:
        self._next = 0
        self._of: dict[int, _Line] = {}  # by number of an unanswered request
        self._open: dict[int, _Line] = {}  # calls whose stream is open, by number

    def number(self, requests: int) -> int:
        """A number for a call, which is that of its first request."""
        first, self._next = self._next, self._next + requests
        return first

    async def answers(
        self, first: int, requests: int, stream: AsyncIterator[Sequence[Answer] | Carried]
    ) -> AsyncIterator[list[Answer]]:
        """The answers to a call, by index of the request in it.

        Args:
            first: of `number`.
            requests: how many it has.
            stream: its own.

        Raises:
            CarrierGone: a stream ended without all of them.
            Exception: of its own stream.
        """
        line = _Line(range(first, first + requests), requests, Inbox(), set())
        self._of |= dict.fromkeys(line.numbers, line)
        self._open[first] = line
        try:
            by: int | None = None
            try:
                async for item in stream:
                    if isinstance(item, Carried):
                        by = item.by
                    elif own := self._hand_out(line, item):
                        yield own
            finally:
                del self._open[first]
                for rider in line.riders:
                    rider.put(None)
            if by is not None:
                async for answers in self._ride(line, by):
                    yield answers
        finally:
            for number in line.numbers:
                self._of.pop(number, None)
        if line.left:
            raise CarrierGone

    async def _ride(self, line: _Line, by: int) -> AsyncIterator[list[Answer]]:
        carrier = self._open.get(by)
        if carrier is None:
            line.inbox.put(None)
        else:
            carrier.riders.add(line.inbox)
        try:
            while line.left:
                answers = await line.inbox.get()
                line.left -= len(answers)
                yield answers
        finally:
            if carrier is not None:
                carrier.riders.discard(line.inbox)

    def _hand_out(self, line: _Line, answers: Sequence[Answer]) -> list[Answer]:
        """Put the answers of other calls into their inboxes; returns those of this one."""
        own: list[Answer] = []
        others: dict[int, tuple[_Line, list[Answer]]] = {}
        for number, answer in answers:
            of = self._of.pop(number, None)
            if of is None:  # its call was given up
                continue
            index = number - of.numbers.start
            if of is line:
                own.append((index, answer))
            else:
                others.setdefault(of.numbers.start, (of, []))[1].append((index, answer))
        for of, theirs in others.values():
            of.inbox.put(theirs)
        line.left -= len(own)
        return own
