"""What passes between event loops and the step thread."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from rayrl.types import Alternatives, Completion, Delta, Request
    from rayrl.weights.flat import Manifest

__all__ = ["Answer", "DeltaStream", "EngineRequest", "Release", "WeightUpdate", "deliver"]

Answer = tuple["asyncio.Future[Any] | DeltaStream", Any]
"""Who waits, and the result (of `DeltaStream`: the next one), or the exception it fails with."""


class DeltaStream:
    """A completion that is read while it is made; belongs to the event loop it was made on."""

    __slots__ = ("_loop", "_queue")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Delta | Exception] = asyncio.Queue()

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """As a future's."""
        return self._loop

    def put(self, part: Delta | Exception) -> None:
        """To be called on its loop."""
        self._queue.put_nowait(part)

    async def get(self) -> Delta:
        """The next part; raises what the generation failed with."""
        part = await self._queue.get()
        if isinstance(part, Exception):
            raise part
        return part


@dataclass(slots=True, eq=False)
class EngineRequest:
    """A request on its way; `prompt` is (n,), `slot` and `cached` are set when it is admitted.

    Attributes:
        reader: gets the completion, or its parts.
        told: ids that the reader of parts has.
        alternatives: one per id sampled, if the request wants them.
    """

    request: Request
    prompt: NDArray[np.int64]
    reader: asyncio.Future[Completion] | DeltaStream
    slot: int = -1
    cached: int = 0
    cancelled: bool = False
    told: int = 0
    alternatives: list[Alternatives] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class WeightUpdate:
    """New weights on their way; `flat` and `manifest` as in `rayrl.weights.flat`."""

    version: int
    flat: NDArray[np.uint8]
    manifest: Manifest
    future: asyncio.Future[str]


@dataclass(slots=True, eq=False)
class Release:
    """Conversations that are over."""

    sessions: Sequence[str]


def deliver(answers: Sequence[Answer]) -> None:
    """Tell who waits, on the event loops where they do, in one call for each loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Answer]] = {}
    for answer in answers:
        by_loop.setdefault(answer[0].get_loop(), []).append(answer)
    for loop, batch in by_loop.items():
        try:
            loop.call_soon_threadsafe(_settle, batch)
        except RuntimeError:  # that loop is closed: nobody waits there any more
            continue


def _settle(answers: Sequence[Answer]) -> None:
    for reader, result in answers:
        if isinstance(reader, DeltaStream):
            reader.put(result)
        elif reader.done():
            continue
        elif isinstance(result, Exception):
            reader.set_exception(result)
        else:
            reader.set_result(result)
