"""The weights store: a small actor that knows the newest version. Imports little, to stay small."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rayrl.weights.flat import Manifest

__all__ = ["NAMESPACE", "Published", "WeightStore", "store_name"]

NAMESPACE = "rayrl"  # of our named actors; a replica's own is Serve's or whatever the driver had


@dataclass(frozen=True, slots=True)
class Published:
    """One version of the weights.

    Attributes:
        buffer: one reference to the flat buffer, in a tuple so that Ray passes it on unfetched;
            none if it was streamed to the replicas that were there.
    """

    version: int
    buffer: tuple[Any, ...]
    manifest: Manifest
    checksum: str


class WeightStore:
    """Holds the newest version; the buffer of the one before is freed when it forgets it."""

    def __init__(self) -> None:
        self._newest: Published | None = None
        self._missed = False
        self._stacks: dict[str, str] = {}

    def publish(self, published: Published) -> None:
        """Make this the newest version."""
        self._newest = published
        self._missed = False
        self._stacks = {}  # of a push that was late and came through all the same

    def miss(self) -> None:
        """A replica needs the newest version, which was streamed before it came."""
        self._missed = True

    def is_missed(self) -> bool:
        """Whether one does."""
        return self._missed

    def hang(self, who: str, stack: str) -> None:
        """A rank is past its deadline, and where it is then."""
        self._stacks[who] = stack

    def stacks(self) -> str:
        """Where ranks hang that were past their deadline since this was asked last."""
        found, self._stacks = self._stacks, {}
        return "\n".join(f"{who} is at\n{stack}" for who, stack in sorted(found.items()))

    def newest(self) -> Published | None:
        """The newest version, or None before the first push."""
        return self._newest


def store_name(run: str) -> str:
    """The actor's name, by which replicas find it."""
    return f"{run}-weights"
