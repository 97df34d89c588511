"""Prompts as one flat batch in which what siblings share appears once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["FlatPrompts", "flatten_prompts"]

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class FlatPrompts:
    """T distinct tokens to compute, and the W places where they belong (W >= T).

    Attributes:
        ids: (T,). positions: (T,) in their conversation. last: flat index of each prompt's last id.
        runs: (slot, position of its first, flat index of its first, how many) of the tokens that
            appear first in that prompt; they follow each other.
        source: (W,) flat index; slots, places: (W,) where in the slab it belongs.
    """

    ids: Ints
    positions: Ints
    last: Ints
    runs: list[tuple[int, int, int, int]]
    source: Ints
    slots: Ints
    places: Ints


def flatten_prompts(prompts: Sequence[tuple[int, Ints, int]]) -> FlatPrompts:
    """The ids of (slot, prompt, how many are cached) that are not cached, each prefix once."""
    # A node is a distinct (all ids before, id) and its number is the token's flat index. Roots are
    # the cached prefixes, numbered below zero.
    nodes: dict[tuple[int, int], int] = {}
    roots: dict[bytes, int] = {}
    ids: list[int] = []
    positions: list[int] = []
    last: list[int] = []
    runs: list[tuple[int, int, int, int]] = []
    source: list[int] = []
    for slot, prompt, cached in prompts:
        node = roots.setdefault(prompt[:cached].tobytes(), -1 - len(roots))
        first = len(ids)
        for position, token in enumerate(prompt[cached:].tolist(), cached):
            node = nodes.setdefault((node, token), len(ids))
            if node == len(ids):
                ids.append(token)
                positions.append(position)
            source.append(node)
        if len(ids) > first:
            runs.append((slot, positions[first], first, len(ids) - first))
        last.append(node)
    each = [(slot, cached, len(prompt) - cached) for slot, prompt, cached in prompts]
    return FlatPrompts(
        np.array(ids),
        np.array(positions),
        np.array(last),
        runs,
        np.array(source),
        np.concatenate([np.full(count, slot) for slot, _, count in each]),
        np.concatenate([np.arange(cached, cached + count) for _, cached, count in each]),
    )
