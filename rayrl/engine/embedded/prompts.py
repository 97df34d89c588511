"""Prompts as one flat batch in which a shared prefix appears once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["FlatPrompts", "Run", "flatten_prompts"]

Ints = NDArray[np.int64]


class Run(NamedTuple):
    """`length` tokens of a slot from `position` on, which are the flat batch's from `token` on."""

    slot: int
    position: int
    token: int
    length: int


@dataclass(frozen=True, slots=True)
class FlatPrompts:
    """T distinct tokens to compute, and the W >= T slab entries that they are written to.

    Attributes:
        ids: (T,) token ids.
        positions: (T,) positions in their conversation.
        slots: (T,) slot of a conversation that they belong to.
        last: (prompts,) flat index of each prompt's last id.
        runs: the tokens that no earlier prompt has, for each prompt with such tokens.
        source: (W,) flat index of the token for each slab entry.
        target_slots, target_positions: (W,) slot and position of each slab entry.
    """

    ids: Ints
    positions: Ints
    slots: Ints
    last: Ints
    runs: list[Run]
    source: Ints
    target_slots: Ints
    target_positions: Ints


def flatten_prompts(prompts: Sequence[tuple[int, Ints, int]]) -> FlatPrompts:
    """Flatten the uncached ids of (slot, prompt, cached ids) triples, each shared prefix once."""
    # A trie: a node is a distinct (all ids before, id), numbered by the token's flat index. Roots
    # are the cached prefixes, numbered below zero.
    nodes: dict[tuple[int, int], int] = {}
    roots: dict[bytes, int] = {}
    ids: list[int] = []
    positions: list[int] = []
    last: list[int] = []
    runs: list[Run] = []
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
            runs.append(Run(slot, positions[first], first, len(ids) - first))
        last.append(node)
    spans = [(slot, cached, len(prompt) - cached) for slot, prompt, cached in prompts]
    return FlatPrompts(
        np.array(ids),
        np.array(positions),
        np.repeat([run.slot for run in runs], [run.length for run in runs]),
        np.array(last),
        runs,
        np.array(source),
        np.concatenate([np.full(count, slot) for slot, _, count in spans]),
        np.concatenate([np.arange(cached, cached + count) for _, cached, count in spans]),
    )
