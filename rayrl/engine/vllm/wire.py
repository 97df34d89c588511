"""The weights' layout as plain lists, for messages to vLLM's worker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rayrl.weights.flat import Entry, Manifest

__all__ = ["MISMATCH", "from_wire", "to_wire"]

MISMATCH = "these weights do not match"
"""Marks the worker's error for another model's weights; only an error's text reaches the engine."""


def to_wire(plan: Sequence[Manifest]) -> list[list[Any]]:
    """Convert manifests to lists."""
    return [
        [manifest.nbytes, [[e.name, e.dtype, list(e.shape), e.offset] for e in manifest.entries]]
        for manifest in plan
    ]


def from_wire(plan: list[list[Any]]) -> tuple[Manifest, ...]:
    """Convert the lists of `to_wire` back to manifests."""
    return tuple(
        Manifest(
            tuple(
                Entry(name, dtype, tuple(shape), offset) for name, dtype, shape, offset in entries
            ),
            nbytes,
        )
        for nbytes, entries in plan
    )
