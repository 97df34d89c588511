"""Attention of flat tokens over a slab of keys and values, through transformers' own interface.

A step runs the tokens of many conversations as one row of a batch, (1, T), so the linear layers see
almost no padding; only the attention below knows which token belongs to which conversation.
transformers passes it q, k and v after the rotary embedding; it writes k and v to the slab
(`KVSlab`) and attends there. A step is a prefill (several new tokens per conversation) or a
decode (one each). This is the CPU's way; the one for GPUs, in `gpu.py`, promises no bits.

**Every token's result has the same bits in both, whatever else is in the step.** As measured on
torch's CPU kernels (MKL, fp32), each of these conditions is necessary and together they suffice:

- a matrix product's row does not depend on the other rows once there are at least 4 of them in a
  batched product and 16 in a linear layer (below that, other kernels are used); 8 per thread where
  rows are split across threads. Hence `_min_rows`, and the flat batch's padding in `model.py`. Some
  CPUs need more for wide rows (an Intel of model 167: width / 24), which `_fewest_rows` measures;
- scores reduce over the head dimension in order, so zeros before and after a head change nothing,
  and `_Decode` may fold several heads into one product (below) where `_Prefill` does not;
- softmax and values reduce over the context, padded with exact zeros to a multiple of 16; the
  product with the values is computed in blocks of 128 keys, because the library splits longer ones
  at a point that depends on their total length.

**Folding.** One decode token and head is a (1, D) by (D, L) product: 3 us of call overhead for
0.3 us of memory traffic, and the wrong kernel. `fold` key heads become one (fold * group, fold * D)
product with a block-diagonal query: more multiplications, by exact zeros, in a quarter of the time.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rayrl.engine.embedded.prompts import FlatPrompts, Run
from rayrl.errors import ConfigError

__all__ = ["NAME", "Geometry", "KVSlab", "Slab", "Step", "attention"]

NAME = "rayrl_slab"  # under which `attention` is registered with transformers
MIN_ROWS = 4
MANY_ROWS = 64  # enough rows for a product to use the kernel for large ones
PAD = 16  # contexts are padded to a multiple of this
KEY_BLOCK = 128
TILE = 32  # new tokens of one conversation in one prefill product
TILES = 16  # tiles in one prefill product
NEIGHBOURS = 4  # adjacent slots from which a prefill product without a copy pays off
SLOTS = 32  # conversations in one decode product: their keys fit a core's cache
GAP = 3  # largest step between the slots of a decode block; computing the idle ones beats a split

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Geometry:
    """Shapes of a model's attention; `fold` key heads share one decode product."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.heads // self.kv_heads

    @property
    def fold(self) -> int:
        """Fewest key heads that give a decode product `MIN_ROWS` query rows; all if none do."""
        for fold in range(1, self.kv_heads + 1):
            if self.kv_heads % fold == 0 and fold * self.group >= MIN_ROWS:
                return fold
        return self.kv_heads

    @property
    def folds(self) -> int:
        """Products per token: key heads / fold."""
        return self.kv_heads // self.fold

    def slot_bytes(self, max_len: int, itemsize: int = 4) -> int:
        """Bytes of one conversation's keys and values of `itemsize` bytes each."""
        return self.layers * 2 * self.kv_heads * self.head_dim * itemsize * max_len


class Step(Protocol):
    """The conversations of one forward pass."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k, v (T, kv_heads, D) and attend with scaled q (T, heads, D); same shape as q."""
        ...


class Slab(Protocol):
    """Keys and values of `slots` conversations of up to `max_len` ids."""

    slots: int
    max_len: int

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot to another, in all layers."""
        ...

    def prefill(self, flat: FlatPrompts) -> Step:
        """Prepare the computation of prompts."""
        ...

    def decode(self, slots: Ints, positions: Ints) -> Step:
        """Prepare the computation of one token, at `positions`, for each of ascending `slots`."""
        ...


class KVSlab:
    """Keys and values of every conversation: per layer (slots, folds, max_len, fold * D) fp32.

    The system allocates memory when it is first written, not when the slab is created.
    """

    def __init__(self, geometry: Geometry, slots: int, max_len: int) -> None:
        self.geometry = geometry
        self.slots = slots
        self.max_len = _padded(max_len)
        g = geometry
        shape = (2, g.layers, slots, g.folds, self.max_len, g.fold * g.head_dim)
        count = int(np.prod(shape))
        self._memory = mmap.mmap(-1, count * 4)
        both = torch.frombuffer(self._memory, dtype=torch.float32, count=count).view(shape)
        self.keys, self.values = both[0], both[1]

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot to another, in all layers."""
        for slab in (self.keys, self.values):
            slab[:, target, :, :length].copy_(slab[:, source, :, :length])

    def prefill(self, flat: FlatPrompts) -> Step:
        """See `Slab`."""
        return _Prefill(self, flat)

    def decode(self, slots: Ints, positions: Ints) -> Step:
        """See `Slab`."""
        return _Decode(self, slots, positions)

    def rows(self, slots: Ints, positions: Ints) -> Tensor:
        """Return the rows (n * folds,) of positions in a layer viewed as rows of fold * D."""
        folds = self.geometry.folds
        heads = slots[:, None] * folds + np.arange(folds)  # (n, folds)
        return torch.from_numpy((heads * self.max_len + positions[:, None]).reshape(-1))

    def write(self, layer: int, rows: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write keys and values (n, kv_heads, D) to the rows returned by `rows`."""
        width = self.keys.shape[-1]
        for slab, new in ((self.keys, keys), (self.values, values)):
            slab[layer].view(-1, width).index_copy_(0, rows, new.reshape(-1, width))


def _values(probs: Tensor, values: Tensor) -> Tensor:
    """Multiply `probs` (B, M, L) and `values` (B, L, D) in key blocks: the same bits for any L."""
    length = values.shape[1]
    first = min(KEY_BLOCK, length)
    total = torch.bmm(probs[:, :, :first], values[:, :first])
    for start in range(first, length, KEY_BLOCK):
        stop = min(start + KEY_BLOCK, length)
        total.baddbmm_(probs[:, :, start:stop], values[:, start:stop])
    return total


def _padded(length: int) -> int:
    return -(-length // PAD) * PAD


@cache
def _fewest_rows(width: int, threads: int) -> int:
    """Measure from how many query rows on a product has the same bits as one with many rows."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(threads, MANY_ROWS, width, generator=generator)
    key = torch.randn(threads, 4 * PAD, width, generator=generator).transpose(1, 2)
    many = torch.bmm(query, key)
    for rows in range(MANY_ROWS - 1, MIN_ROWS - 1, -1):
        if not torch.equal(torch.bmm(query[:, :rows].contiguous(), key), many[:, :rows]):
            return rows + 1
    return MIN_ROWS


def _min_rows(batches: int, width: int) -> int:
    """Return the query rows a product needs; torch splits the rows of one with few batches."""
    threads = torch.get_num_threads()
    rows = _fewest_rows(width, threads)
    return rows if batches >= threads else max(rows, 8) * threads


class _Decode:
    """Blocks of nearby slots are attended to as views of the slab: nothing is gathered."""

    def __init__(self, slab: KVSlab, slots: Ints, positions: Ints) -> None:
        self.slab = slab
        g = slab.geometry
        self._write_at = slab.rows(slots, positions)
        self._blocks: list[tuple[int, int, int, int]] = []  # first slot, rows [a, b), context
        starts = [0]
        for i in range(1, len(slots)):
            if slots[i] - slots[i - 1] > GAP or slots[i] - slots[starts[-1]] >= SLOTS:
                starts.append(i)
        rows = np.empty(len(slots), dtype=np.int64)  # each token's row among the blocks' slots
        size = 0
        for start, stop in zip(starts, [*starts[1:], len(slots)], strict=True):
            first, last = int(slots[start]), int(slots[stop - 1])
            rows[start:stop] = size + slots[start:stop] - first
            context = _padded(int(positions[start:stop].max()) + 1)
            self._blocks.append((first, size, size + last - first + 1, context))
            size += last - first + 1
        self._token_rows = torch.from_numpy(rows)
        row_positions = np.zeros(size, dtype=np.int64)
        row_positions[rows] = positions
        longest = max(context for *_, context in self._blocks)
        hidden = np.arange(longest) > row_positions[:, None]  # (size, L)
        mask = np.where(hidden, np.float32(-np.inf), np.float32(0)).repeat(g.folds, axis=0)
        self._mask = torch.from_numpy(mask)[:, None]  # (size * folds, 1, L)
        fewest = min(stop - start for _, start, stop, _ in self._blocks) * g.folds
        width = g.fold * g.head_dim
        self._query_rows = max(g.fold * g.group, _min_rows(fewest, width))
        self._q = torch.zeros(size, g.folds, self._query_rows, width)
        self._out = torch.empty(size * g.folds, self._query_rows, width)

    def _diagonal(self, folded: Tensor) -> Tensor:
        """View the diagonal blocks of (n, folds, rows, fold * D) as (n, folds, group, D, fold)."""
        g = self.slab.geometry
        heads = folded[:, :, : g.fold * g.group]
        parts = heads.view(len(folded), g.folds, g.fold, g.group, g.fold, g.head_dim)
        return parts.diagonal(dim1=2, dim2=4)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Step.attend`."""
        slab, g = self.slab, self.slab.geometry
        slab.write(layer, self._write_at, k, v)
        count = len(q)
        query = q.reshape(count, g.folds, g.fold, g.group, g.head_dim).permute(0, 1, 3, 4, 2)
        self._diagonal(self._q)[self._token_rows] = query
        folded = self._q.view(-1, self._query_rows, self._q.shape[-1])
        keys, values = slab.keys[layer], slab.values[layer]
        for first, start, stop, context in self._blocks:
            part = slice(start * g.folds, stop * g.folds)
            block = slice(first, first + stop - start)
            key = keys[block, :, :context].flatten(0, 1)  # (B, L, fold * D), a view
            value = values[block, :, :context].flatten(0, 1)
            mask = self._mask[part, :, :context].expand(-1, self._query_rows, -1)
            probs = torch.baddbmm(mask, folded[part], key.transpose(1, 2)).softmax(-1)
            self._out[part] = _values(probs, value)
        out = self._diagonal(self._out.view(-1, g.folds, self._query_rows, self._q.shape[-1]))
        return out[self._token_rows].permute(0, 1, 4, 2, 3).reshape(count, g.heads, g.head_dim)


@dataclass(frozen=True, slots=True)
class _Tiles:
    """One prefill product: n pieces, each at most TILE new tokens of one conversation."""

    tokens: Tensor  # (n, tile) flat index of each token; padding repeats the piece's last one
    unpadded: Tensor  # indices into (n * tile,) that are not padding
    targets: Tensor  # their flat indices
    slots: slice | Tensor  # adjacent slots of the slab, or (n,)
    context: int
    mask: Tensor  # (n * folds, tile * group, L)


def _group_pieces(pieces: list[Run]) -> list[list[Run]]:
    """Group pieces into products: adjacent slots, which need no copy, then the remaining ones."""
    products: list[list[Run]] = []
    scattered: list[Run] = []
    run: list[Run] = []
    for piece in [*sorted(pieces), None]:
        if run and (piece is None or piece.slot != run[-1].slot + 1 or len(run) == TILES):
            if len(run) >= NEIGHBOURS:
                products.append(run)
            else:
                scattered += run
            run = []
        if piece is not None:
            run.append(piece)
    scattered.sort(
        key=lambda piece: piece.position + piece.length
    )  # similar contexts need less padding
    return products + [scattered[at : at + TILES] for at in range(0, len(scattered), TILES)]


class _Prefill:
    """New tokens of several conversations, each computed once even if several share it."""

    def __init__(self, slab: KVSlab, flat: FlatPrompts) -> None:
        self.slab = slab
        self._source = torch.from_numpy(flat.source)
        self._write_at = slab.rows(flat.target_slots, flat.target_positions)
        size = max(TILE // slab.geometry.group, MIN_ROWS)
        pieces = [
            Run(slot, position + done, token + done, min(size, count - done))
            for slot, position, token, count in flat.runs
            for done in range(0, count, size)
        ]
        self._products = [self._tiles(part) for part in _group_pieces(pieces)]

    def _tiles(self, pieces: list[Run]) -> _Tiles:
        g = self.slab.geometry
        slot, position, token, count = np.array(pieces, dtype=np.int64).T
        tile = max(int(count.max()), _min_rows(len(pieces) * g.folds, g.head_dim))
        step = np.minimum(np.arange(tile), count[:, None] - 1)  # (n, tile)
        unpadded = np.flatnonzero(np.arange(tile) < count[:, None])
        tokens = token[:, None] + step
        context = _padded(int((position + count).max()))
        hidden = np.arange(context) > (position[:, None] + step)[..., None]  # (n, tile, L)
        mask = np.where(hidden, np.float32(-np.inf), np.float32(0))
        mask = mask.repeat(g.group, axis=1).repeat(g.folds, axis=0)
        adjacent = bool((np.diff(slot) == 1).all())
        return _Tiles(
            torch.from_numpy(tokens),
            torch.from_numpy(unpadded),
            torch.from_numpy(tokens.reshape(-1)[unpadded]),
            slice(int(slot[0]), int(slot[-1]) + 1) if adjacent else torch.from_numpy(slot),
            context,
            torch.from_numpy(mask),
        )

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Step.attend`."""
        slab, g = self.slab, self.slab.geometry
        slab.write(layer, self._write_at, k[self._source], v[self._source])
        out = torch.empty(len(q), g.heads, g.head_dim)
        for t in self._products:
            n, tile = t.tokens.shape
            # head by head, each (n * folds, tile * group, D)
            query = q[t.tokens].view(n, tile, g.folds, g.fold, g.group, g.head_dim)
            query = query.permute(3, 0, 2, 1, 4, 5).reshape(
                g.fold, n * g.folds, tile * g.group, g.head_dim
            )
            key = slab.keys[layer, :, :, : t.context][t.slots].flatten(0, 1)
            value = slab.values[layer, :, :, : t.context][t.slots].flatten(0, 1)
            mixed = torch.empty(g.fold, n * g.folds, tile * g.group, g.head_dim)
            for head in range(g.fold):
                part = slice(head * g.head_dim, (head + 1) * g.head_dim)
                scores = torch.baddbmm(t.mask, query[head], key[:, :, part].transpose(1, 2))
                mixed[head] = _values(scores.softmax(-1), value[:, :, part])
            mixed = mixed.view(g.fold, n, g.folds, tile, g.group, g.head_dim)
            mixed = mixed.permute(1, 3, 2, 0, 4, 5).reshape(n * tile, g.heads, g.head_dim)
            out[t.targets] = mixed[t.unpadded]
        return out


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    rayrl_step: Step | None = None,
    rayrl_tokens: int = 0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend with q (1, heads, T, D), k and v (1, kv_heads, T, D), as transformers calls it.

    Rows from `rayrl_tokens` on are padding of the batch, and get zeros.

    Raises:
        ConfigError: the model needs an attention feature that this function lacks.
    """
    unsupported = [n for n in ("sliding_window", "softcap", "s_aux") if options.get(n) is not None]
    if rayrl_step is None or attention_mask is not None or unsupported:
        raise ConfigError(
            f"model.path: {type(module).__name__} needs attention the embedded engine lacks"
            + (f" ({', '.join(unsupported)})" if unsupported else "")
            + "; choose a model with plain causal attention in every layer, such as a Llama"
        )
    q, k, v = (x[0].transpose(0, 1)[:rayrl_tokens] for x in (query, key, value))
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    attended = rayrl_step.attend(module.layer_idx, q * scale, k, v)
    out = attended.new_zeros(1, query.shape[2], *attended.shape[1:])
    out[0, :rayrl_tokens] = attended
    return out, None
