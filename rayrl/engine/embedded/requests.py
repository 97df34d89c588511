"""Messages between event loops and the engine's step thread, and its counters."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rayrl.errors import InfraError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from rayrl.types import Alternatives, Completion, Delta, Request
    from rayrl.weights.flat import Manifest

__all__ = [
    "Answer",
    "DeltaStream",
    "EngineRequest",
    "Inbox",
    "Message",
    "Release",
    "Sleep",
    "Stats",
    "WeightUpdate",
    "deliver",
]

Answer = tuple["asyncio.Future[Any] | DeltaStream", Any]
"""A future or delta stream, and the result (a stream's next delta) or exception for it."""


class DeltaStream:
    """Deltas of one completion, for a reader on the event loop that created the stream."""

    __slots__ = ("_loop", "_queue")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Delta | Exception] = asyncio.Queue()

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """Return the reader's event loop, as `asyncio.Future.get_loop` does."""
        return self._loop

    def put(self, result: Delta | Exception) -> None:
        """Add a delta, or the error that ended the generation. Call on the reader's loop only."""
        self._queue.put_nowait(result)

    async def get(self) -> Delta:
        """Wait for the next delta; raises the error if the generation failed."""
        result = await self._queue.get()
        if isinstance(result, Exception):
            raise result
        return result


@dataclass(slots=True, eq=False)
class EngineRequest:
    """A request in flight.

    Attributes:
        prompt: (n,) prompt ids.
        reader: receives the completion, or its deltas.
        row: its row of the decode state, set on admission.
        cached: prompt ids whose keys and values were reused, set on admission.
        delivered: sampled ids already sent to a delta stream.
        alternatives: top alternatives per sampled id, if requested.
    """

    request: Request
    prompt: NDArray[np.int64]
    reader: asyncio.Future[Completion] | DeltaStream
    row: int = -1
    cached: int = 0
    cancelled: bool = False
    delivered: int = 0
    alternatives: list[Alternatives] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class WeightUpdate:
    """New weights to load; `flat` and `manifest` as in `rayrl.weights.flat`."""

    version: int
    flat: NDArray[np.uint8]
    manifest: Manifest
    future: asyncio.Future[str]


@dataclass(slots=True, eq=False)
class Sleep:
    """Give the memory of keys and values back, until there are new ones."""

    future: asyncio.Future[None]


@dataclass(slots=True, eq=False)
class Release:
    """Sessions that have ended."""

    sessions: Sequence[str]


Message = EngineRequest | WeightUpdate | Sleep | Release


class Inbox:
    """Messages from event loops to the step thread, which alone takes them out."""

    def __init__(self) -> None:
        self._messages: deque[Message] = deque()
        self._event = threading.Event()
        self._lock = threading.Lock()  # so that nothing is added once it is closed
        self.closed = False

    def __bool__(self) -> bool:
        return bool(self._messages)

    def put(self, message: Message) -> None:
        """Add a message, and wake the step thread.

        Raises:
            InfraError: the inbox was closed.
        """
        with self._lock:
            if self.closed:
                raise InfraError("the engine is closed")
            self._messages.append(message)
        self._event.set()

    def close(self) -> None:
        """Refuse further messages, and wake the step thread."""
        with self._lock:
            self.closed = True
        self._event.set()

    def wait(self) -> None:
        """Wait for a message, or for its end."""
        self._event.wait()
        self._event.clear()

    def take(self) -> Message:
        """Take out the oldest message; there must be one."""
        return self._messages.popleft()


def deliver(answers: Sequence[Answer]) -> None:
    """Pass results to their readers, with one call into each reader's event loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Answer]] = {}
    for answer in answers:
        by_loop.setdefault(answer[0].get_loop(), []).append(answer)
    for loop, batch in by_loop.items():
        try:
            loop.call_soon_threadsafe(_resolve, batch)
        except RuntimeError:  # the loop is closed, so are its readers
            continue


def _resolve(answers: Sequence[Answer]) -> None:
    for reader, result in answers:
        if isinstance(reader, DeltaStream):
            reader.put(result)
        elif reader.done():
            continue
        elif isinstance(result, Exception):
            reader.set_exception(result)
        else:
            reader.set_result(result)


@dataclass(slots=True)
class Stats:
    """Totals since the engine started; seconds are those of the step thread."""

    prompt_tokens: int = 0
    computed_tokens: int = 0
    sampled_tokens: int = 0
    decoded_tokens: int = 0
    completions: int = 0
    prefill_steps: int = 0
    decode_steps: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    load_seconds: float = 0.0
