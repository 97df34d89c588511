"""The layout of weights as vLLM's message channel carries it, plain lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rayrl.weights.flat import Entry, Manifest

__all__ = ["MISFIT", "from_wire", "to_wire"]

MISFIT = "these weights are not those of"
"""In the worker's error where they are another model's; only the text of an error is carried."""


def to_wire(plan: Sequence[Manifest]) -> list[list[Any]]:
    """The buffers' manifests, as lists."""
    return [
        [one.nbytes, [[e.name, e.dtype, list(e.shape), e.offset] for e in one.entries]]
        for one in plan
    ]


def from_wire(plan: list[list[Any]]) -> tuple[Manifest, ...]:
    """What `to_wire` was given."""
    return tuple(
        Manifest(tuple(Entry(n, dtype, tuple(shape), at) for n, dtype, shape, at in entries), size)
        for size, entries in plan
    )
