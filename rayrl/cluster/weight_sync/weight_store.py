"""The weights store, a small actor that holds the newest version; it imports little."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rayrl.weights.flat import Manifest

__all__ = ["NAMESPACE", "Published", "WeightStore", "store_name"]

NAMESPACE = "rayrl"  # of named actors; replicas run in Serve's namespace or the driver's


@dataclass(frozen=True, slots=True)
class Published:
    """One version of the weights.

    Attributes:
        buffer: one reference to the flat buffer, in a tuple so that Ray does not fetch it; empty
            if the weights were broadcast to the running replicas.
    """

    version: int
    buffer: tuple[Any, ...]
    manifest: Manifest
    checksum: str


class WeightStore:
    """Hold the newest version; replacing the previous one frees its buffer."""

    def __init__(self) -> None:
        self._newest: Published | None = None
        self._missed = False
        self._stacks: dict[str, str] = {}

    def publish(self, published: Published) -> None:
        """Make this the newest version."""
        self._newest = published
        self._missed = False
        self._stacks = {}  # of a push that succeeded after its deadline

    def miss(self) -> None:
        """Note that a replica needs the newest version, which was broadcast before it started."""
        self._missed = True

    def is_missed(self) -> bool:
        """Tell whether a replica has missed the newest version."""
        return self._missed

    def report_hang(self, name: str, stack: str) -> None:
        """Record the stack of rank `name`, which has exceeded its deadline."""
        self._stacks[name] = stack

    def stacks(self) -> str:
        """Return the stacks of the ranks reported as hanging since the last call."""
        stacks, self._stacks = self._stacks, {}
        return "\n".join(f"{name} is at\n{stack}" for name, stack in sorted(stacks.items()))

    def newest(self) -> Published | None:
        """Return the newest version; None before the first push."""
        return self._newest


def store_name(run: str) -> str:
    """Name of the store's actor, by which replicas find it."""
    return f"{run}-weights"
