"""Many calls on one stream, without Serve between: a replica's side joined to a caller's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

import pytest

from rayrl.cluster.serving.streams import Answer, Carried, CarrierGone, Lines, Mailbox, Pace
from rayrl.errors import InfraError
from rayrl.types import Completion


def completion(k: int) -> Completion:
    return Completion((k,), (0.0,), (), "stop")


class Far:
    """A replica: answers request k once `let[k]` is set; `calls` are the items of each call."""

    def __init__(self) -> None:
        self.box: Mailbox | None = None
        self.let = {k: asyncio.Event() for k in range(10)}
        self.calls: list[list[Any]] = []

    async def answer(self, k: int) -> Completion | Exception:
        await self.let[k].wait()
        return completion(k)

    async def call(self, first: int, n: int) -> AsyncIterator[Sequence[Answer] | Carried]:
        items: list[Any] = []
        self.calls.append(items)
        carried = self.box is not None
        box = self.box = self.box or Mailbox(first)
        for k in range(first, first + n):
            box.expect(k, self.answer(k))
        if carried:
            items.append(Carried(box.carrier))
            yield items[-1]
            return
        async for answers in box.carry():
            items.append(answers)
            yield answers
        self.box = None


class Near:
    """A caller: what each call of it was answered, by index."""

    def __init__(self, far: Far) -> None:
        self.far, self.lines = far, Lines()

    def call(self, n: int) -> asyncio.Task[dict[int, Any]]:
        first = self.lines.number(n)
        return asyncio.create_task(self._read(first, n, self.far.call(first, n)))

    async def _read(self, first: int, n: int, stream: Any) -> dict[int, Any]:
        found: dict[int, Any] = {}
        async with aclosing(stream):
            async for answers in self.lines.answers(first, n, stream):
                found |= dict(answers)
        return found


async def settle() -> None:
    await asyncio.sleep(0.01)


async def test_one_stream_carries_the_answers_of_all_calls() -> None:
    far = Far()
    near = Near(far)
    first = near.call(2)  # requests 0 and 1
    await settle()
    second, third = near.call(1), near.call(2)  # 2; 3 and 4
    await settle()
    for k in (3, 0):
        far.let[k].set()
    await settle()
    assert far.calls == [[[(3, completion(3)), (0, completion(0))]], [Carried(0)], [Carried(0)]]
    far.let[1].set()  # the first call has all of its own now, and goes on carrying
    await settle()
    assert not first.done()
    for k in (2, 4):
        far.let[k].set()
    assert await first == {0: completion(0), 1: completion(1)}
    assert await second == {0: completion(2)}
    assert await third == {0: completion(3), 1: completion(4)}
    far.let[5].set()
    assert await near.call(1) == {0: completion(5)}  # the next one carries itself
    assert not near.lines._of
    assert not near.lines._open


async def test_who_rides_on_a_stream_that_breaks_is_told() -> None:
    far = Far()
    near = Near(far)
    first = near.call(1)
    await settle()
    second = near.call(2)
    await settle()
    far.let[1].set()
    await settle()
    first.cancel()  # its stream is gone, with the answer to request 2
    with pytest.raises(CarrierGone):
        await second
    assert not near.lines._of


async def test_a_carrier_that_ended_before_its_rider_looked() -> None:
    lines = Lines()
    late = asyncio.Event()

    async def carrier() -> AsyncIterator[Any]:
        yield [(0, completion(0)), (1, completion(1))]

    async def rider() -> AsyncIterator[Any]:
        await late.wait()
        yield Carried(0)

    async def read(first: int, stream: Any) -> dict[int, Any]:
        return {k: a async for answers in lines.answers(first, 1, stream) for k, a in answers}

    second = asyncio.create_task(read(1, rider()))
    await settle()
    assert await read(0, carrier()) == {0: completion(0)}
    late.set()
    assert await second == {0: completion(1)}


async def test_a_cancelled_request_is_an_answer() -> None:
    box = Mailbox(0)
    running = [box.expect(k, Far().answer(k)) for k in range(2)]
    running[1].cancel()  # before it began
    carried = box.carry()
    ((number, answer),) = await anext(carried)
    assert number == 1
    assert isinstance(answer, InfraError)
    box.close()
    await settle()
    assert running[0].cancelled()


def test_waiting_for_company_is_a_share_of_what_answers_take() -> None:
    pace = Pace(least_s=0.001, most_s=0.02)
    assert pace.wait_s == 0.001
    for _ in range(200):
        pace.took(0.5)
    assert pace.wait_s == pytest.approx(0.005, rel=1e-3)  # a hundredth
    for _ in range(200):
        pace.took(10.0)
    assert pace.wait_s == 0.02
    for _ in range(200):
        pace.took(0.0)
    assert pace.wait_s == 0.001
