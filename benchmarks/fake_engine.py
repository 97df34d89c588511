"""An engine that computes nothing, for measuring what is around generation."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

from rayrl import Completion, Request, Sampling, VersionSpan

__all__ = ["FakeEngine", "counts_of"]


class FakeEngine:
    """Answers with the same ids as ever, at once or after a while; has whatever version is asked.

    Args:
        ids: of every answer.
        latency: seconds; an answer takes half to one and a half of it.

    Attributes:
        answered: answers so far. A greedy request is told this number, at once, and `calls`.
        calls: times that requests came, one or several together.
    """

    version = 1_000_000
    max_len = 4096

    def __init__(self, ids: tuple[int, ...], latency: float = 0.0) -> None:
        self._ids, self._logprobs = ids, (-0.5,) * len(ids)
        self._latency = latency
        self._rng = random.Random(0)
        self.answered = self.calls = 0
        self._coming = False

    async def generate(self, request: Request) -> Completion:
        """See the class."""
        if request.sampling.temperature == 0:
            counts = self.answered, self.calls
            return Completion(counts, (0.0, 0.0), (VersionSpan(0, 0, 2),), "stop")
        if not self._coming:
            self._coming = True
            self.calls += 1
            asyncio.get_running_loop().call_soon(self._came)
        if self._latency:
            await asyncio.sleep(self._latency * self._rng.uniform(0.5, 1.5))
        self.answered += 1
        spans = (VersionSpan(request.min_version, 0, len(self._ids)),)
        return Completion(self._ids, self._logprobs, spans, "stop")

    def _came(self) -> None:
        self._coming = False

    def release(self, sessions: Sequence[str]) -> None:
        """Keeps nothing."""

    async def check(self) -> None:
        """Always works."""

    async def close(self) -> None:
        """Holds nothing."""


async def counts_of(handle: Any) -> tuple[int, int]:
    """Answers and calls so far of the fake engine behind a Serve handle."""
    asked = Request("count", (1,), Sampling(temperature=0.0), (), 0)
    _, (completion,) = await handle.probe.remote([asked])
    answered, calls = completion.ids
    return answered, calls
