"""What passes between event loops and the step thread."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from rayrl.types import Completion, Request
    from rayrl.weights import Manifest

__all__ = ["Answer", "Job", "Load", "Release", "deliver"]

Answer = tuple["asyncio.Future[Any]", Any]
"""A future and its result, or the exception it fails with."""


@dataclass(slots=True, eq=False)
class Job:
    """A request on its way; `prompt` is (n,), `slot` and `cached` are set when it is admitted."""

    request: Request
    prompt: NDArray[np.int64]
    future: asyncio.Future[Completion]
    slot: int = -1
    cached: int = 0
    cancelled: bool = False


@dataclass(slots=True, eq=False)
class Load:
    """New weights on their way; `flat` and `manifest` as in `rayrl.weights`."""

    version: int
    flat: NDArray[np.uint8]
    manifest: Manifest
    future: asyncio.Future[str]


@dataclass(slots=True, eq=False)
class Release:
    """Conversations that are over."""

    sessions: Sequence[str]


def deliver(answers: Sequence[Answer]) -> None:
    """Settle futures on the event loops they are awaited on, in one call for each loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Answer]] = {}
    for answer in answers:
        by_loop.setdefault(answer[0].get_loop(), []).append(answer)
    for loop, batch in by_loop.items():
        try:
            loop.call_soon_threadsafe(_settle, batch)
        except RuntimeError:  # that loop is closed: nobody waits there any more
            continue


def _settle(answers: Sequence[Answer]) -> None:
    for future, result in answers:
        if future.done():
            continue
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)
