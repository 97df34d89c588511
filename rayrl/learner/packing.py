"""Prefix-trie packing: every distinct (prefix, token) of a set of rows is computed once.

Rows of a batch share prompts, and siblings of a group often share whole turns. A causal model gives
equal hidden states for equal prefixes, so a forward pass over the *trie* of the rows gives exactly
what a pass over each row would, and its gradient (summed over the rows that share a token) too.

Sorted lexicographically, a row shares with the rows before it exactly what it shares with its
predecessor. So row `i` *owns* the suffix `[starts[i], lengths[i])`, all earlier positions belong to
rows above it, and the distinct tokens are the owned suffixes laid end to end. Numpy only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Bucket", "IntArray", "Packed", "buckets", "common_prefixes", "lexicographic", "pack"]

IntArray = NDArray[np.int64]

BUCKET = 32  # owned lengths are padded up to a multiple of this; 8 to 64 measured alike


@dataclass(frozen=True, slots=True, eq=False)
class Bucket:
    """Rows whose owned suffixes are of similar length, as one rectangle of attention.

    Attributes:
        queries: (b, s) index into U of each owned token; padded with the row's last one.
        keys: (b, k) index into U of each token of the row up to its end; padded with its last one.
        starts: (b,) position of the first query. Query `j` sees keys `[0, starts + j]`.
        valid: (m,) index into the flattened (b, s) of the queries that are not padding.
        owned: (m,) index into U of those queries.
    """

    queries: IntArray
    keys: IntArray
    starts: IntArray
    valid: IntArray
    owned: IntArray


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """Rows as a trie. U distinct tokens, B rows, L longest row, S distinct sources, N loss tokens.

    Attributes:
        ids: (U,) token ids.
        positions: (U,) depth of each token in its row.
        path: (B, L) index into U of each row's tokens; 0 past the row's end.
        lengths: (B,) ids of each row.
        starts: (B,) first position the row owns; earlier ones belong to rows above.
        order: (B,) index of each packed row in the rows given to `pack`.
        sources: (S,) distinct indices into U whose logits are needed, ascending.
        slot: (N,) index into `sources` of the token before each loss token.
        target: (N,) id of each loss token.
        row: (N,) packed row of each loss token.
        position: (N,) position of each loss token in its row.
        ends: (U,) where the subtree of each distinct token ends: as U is in the order of the sorted
            rows, token i is on the path to token j exactly if i <= j < ends[i].
    """

    ids: IntArray
    positions: IntArray
    path: IntArray
    lengths: IntArray
    starts: IntArray
    order: IntArray
    sources: IntArray
    slot: IntArray
    target: IntArray
    row: IntArray
    position: IntArray
    ends: IntArray


def lexicographic(rows: Sequence[NDArray[Any]]) -> list[int]:
    """Indices of `rows` (ids) in lexicographic order; equal rows keep their order."""
    keys = [row.astype(">u4").tobytes() for row in rows]
    return sorted(range(len(rows)), key=keys.__getitem__)


def _padded(rows: Sequence[NDArray[Any]]) -> tuple[IntArray, IntArray]:
    """Rows as (B, L), right-padded with -1, and their lengths (B,)."""
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    width = int(lengths.max(initial=0))
    out = np.full((len(rows), width), -1, np.int64)
    out[np.arange(width) < lengths[:, None]] = np.concatenate(rows) if rows else ()
    return out, lengths


def _shared(padded: IntArray, lengths: IntArray) -> IntArray:
    """(B,) ids each row shares with the row above it."""
    starts = np.zeros(len(lengths), np.int64)
    if len(lengths) > 1:
        differ = padded[1:] != padded[:-1]
        first = np.where(differ.any(1), differ.argmax(1), padded.shape[1])
        starts[1:] = np.minimum(first, np.minimum(lengths[1:], lengths[:-1]))
    return starts


def common_prefixes(rows: Sequence[NDArray[Any]]) -> IntArray:
    """(B,) ids each row of `rows` (already in lexicographic order) shares with the one above it."""
    return _shared(*_padded(rows))


def pack(rows: Sequence[NDArray[Any]], masks: Sequence[NDArray[np.bool_]]) -> Packed:
    """The trie of `rows`: ids (T,) each, with `masks` (T,) True on loss tokens.

    A loss token at position 0 has nothing before it to be predicted from.

    Raises:
        ValueError: there are no rows, a row is empty, or a loss token is at position 0.
    """
    if not rows or min(map(len, rows)) == 0:
        raise ValueError("pack needs at least one row, and no row may be empty")
    order = np.array(lexicographic(rows), np.int64)
    padded, lengths = _padded([rows[i] for i in order])
    starts = _shared(padded, lengths)
    n_rows, width = padded.shape
    column = np.arange(width)
    offsets = np.concatenate(([0], np.cumsum(lengths - starts)))  # (B+1,) into U
    # The owner of (i, t) is the nearest row at or above i that starts at or before t.
    reaches = starts[:, None] <= column
    owner = np.maximum.accumulate(np.where(reaches, np.arange(n_rows)[:, None], 0), axis=0)
    path = (offsets[:-1] - starts)[owner] + column
    inside = column < lengths[:, None]
    path[~inside] = 0
    owned = inside & reaches
    row, position = np.nonzero(_padded_masks([masks[i] for i in order], width))
    if len(position) and position.min() == 0:
        raise ValueError("a loss token at position 0 has nothing before it to be predicted from")
    sources, slot = np.unique(path[row, position - 1], return_inverse=True)
    return Packed(
        ids=padded[owned],
        positions=np.nonzero(owned)[1],
        path=path,
        lengths=lengths,
        starts=starts,
        order=order,
        sources=sources,
        slot=slot.reshape(-1),
        target=padded[row, position],
        row=row,
        position=position,
        ends=_ends(lengths, starts, offsets),
    )


def _ends(lengths: IntArray, starts: IntArray, offsets: IntArray) -> IntArray:
    """(U,): a token's subtree ends with the last row that shares it."""
    ends = np.empty(offsets[-1], np.int64)
    # by depth, the first token of the rows below that is not in the subtree
    after = np.full(int(lengths.max()), offsets[-1])
    for row in range(len(lengths) - 1, -1, -1):
        start = starts[row]
        ends[offsets[row] : offsets[row + 1]] = after[start : lengths[row]]
        after[start:] = offsets[row]
    return ends


def _padded_masks(masks: Sequence[NDArray[np.bool_]], width: int) -> NDArray[np.bool_]:
    lengths = np.fromiter(map(len, masks), np.int64, len(masks))
    out = np.zeros((len(masks), width), np.bool_)
    out[np.arange(width) < lengths[:, None]] = np.concatenate(masks)
    return out


def buckets(packed: Packed) -> tuple[Bucket, ...]:
    """The attention of a trie as rectangles, which together own every token once.

    Rows are grouped by owned length; those that own nothing need no attention.
    """
    path, lengths, starts = packed.path, packed.lengths, packed.starts
    own = lengths - starts
    offsets = np.cumsum(own) - own  # (B,) into U
    size = -(-own // BUCKET)
    out = []
    for wanted in np.unique(size[own > 0]):
        rows = np.flatnonzero(size == wanted)
        s, k = int(own[rows].max()), int(lengths[rows].max())
        step = np.arange(s)
        real = step < own[rows, None]
        queries = offsets[rows, None] + np.minimum(step, own[rows, None] - 1)
        keys = path[rows[:, None], np.minimum(np.arange(k), lengths[rows, None] - 1)]
        valid = np.flatnonzero(real)
        out.append(Bucket(queries, keys, starts[rows], valid, queries.reshape(-1)[valid]))
    return tuple(out)
