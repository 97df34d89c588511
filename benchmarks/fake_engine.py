"""An engine that computes nothing, for measuring everything around generation."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

from rayrl import Completion, Request, Sampling, VersionSpan

__all__ = ["FakeEngine", "counts_of"]


class FakeEngine:
    """Answer every request with the same ids, immediately or after a delay, with any version.

    Args:
        ids: ids of every answer.
        latency: mean delay in seconds; delays are uniform in [0.5, 1.5] times this.

    Attributes:
        answered: number of answers. A greedy request immediately returns this and `calls`.
        calls: number of calls, each with one or several requests.
    """

    version = 1_000_000
    max_len = 4096

    def __init__(self, ids: tuple[int, ...], latency: float = 0.0) -> None:
        self._ids, self._logprobs = ids, (-0.5,) * len(ids)
        self._latency = latency
        self._rng = random.Random(0)
        self.answered = self.calls = 0
        self._in_call = False

    async def generate(self, request: Request) -> Completion:
        """See the class."""
        if request.sampling.temperature == 0:
            counts = self.answered, self.calls
            return Completion(counts, (0.0, 0.0), (VersionSpan(0, 0, 2),), "stop")
        if not self._in_call:
            self._in_call = True
            self.calls += 1
            asyncio.get_running_loop().call_soon(self._end_call)
        if self._latency:
            await asyncio.sleep(self._latency * self._rng.uniform(0.5, 1.5))
        self.answered += 1
        spans = (VersionSpan(request.min_version, 0, len(self._ids)),)
        return Completion(self._ids, self._logprobs, spans, "stop")

    def _end_call(self) -> None:
        self._in_call = False

    def release(self, sessions: Sequence[str]) -> None:
        """Do nothing: no sessions are kept."""

    async def check(self) -> None:
        """Do nothing: the engine is always healthy."""

    async def close(self) -> None:
        """Do nothing: there are no resources."""


async def counts_of(handle: Any) -> tuple[int, int]:
    """Answers and calls so far of the fake engine behind a Serve handle."""
    asked = Request("count", (1,), Sampling(temperature=0.0), (), 0)
    _, (completion,) = await handle.probe.remote([asked])
    answered, calls = completion.ids
    return answered, calls
