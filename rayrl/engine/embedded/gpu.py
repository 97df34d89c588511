"""Attention and decode graphs of the embedded engine on a GPU.

A step's conversations are rectangles, padded to the longest: a product on a GPU wants few large
kernels, where the CPU's (`attention.py`) wants blocks that fit a core's cache. Query heads that
share a key head are folded into the query length, so that no key is copied for them. Results depend
on the rest of the batch in their last bits: cuBLAS chooses kernels by shape.

A decode step of a small model is bound by the launches of its kernels, some thirty per layer, and
not by what they do. `DecodeGraphs` therefore captures the step as a CUDA graph for each pair of
(conversations, context) out of a short ladder of sizes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from rayrl.engine.embedded.attention import Geometry, Step
from rayrl.engine.embedded.prompts import FlatPrompts, Run

__all__ = ["DecodeGraphs", "GpuSlab"]

PAD = 16  # contexts are padded to a multiple of this: masks must be aligned
SCORES = 1 << 27  # (queries, keys) pairs in one prefill product
SIZES = 64  # sizes of graphs: powers of two up to this, then its multiples

Ints = NDArray[np.int64]

_log = logging.getLogger(__name__)


class GpuSlab:
    """Keys and values of every conversation: per layer (slots + 1, max_len, kv_heads * D).

    The last slot takes what the padding of a decode graph writes.
    """

    def __init__(
        self,
        geometry: Geometry,
        slots: int,
        max_len: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.geometry = geometry
        self.slots = slots
        self.max_len = -(-max_len // PAD) * PAD
        shape = (2, geometry.layers, slots + 1, self.max_len, geometry.kv_heads * geometry.head_dim)
        self.device = device
        both = torch.zeros(shape, device=device, dtype=dtype)
        self.keys, self.values = both[0], both[1]

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot to another, in all layers."""
        for slab in (self.keys, self.values):
            slab[:, target, :length].copy_(slab[:, source, :length])

    def write(self, layer: int, rows: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write keys and values (n, kv_heads, D) to `rows` (n,): slot * max_len + position."""
        width = self.keys.shape[-1]
        for slab, new in ((self.keys, keys), (self.values, values)):
            slab[layer].view(-1, width).index_copy_(0, rows, new.reshape(-1, width))

    def attend(
        self, layer: int, query: Tensor, slots: Tensor, context: int, mask: Tensor
    ) -> Tensor:
        """Attend with scaled queries to the first `context` positions of `slots` (n,).

        Args:
            query: (n, m, heads, D), m tokens of each conversation.
            mask: (n, 1, group * m, context), added to the scores; the same for each query head of
                a key head.

        Returns:
            (n, m, heads, D).
        """
        g = self.geometry
        n, m = query.shape[:2]

        def gathered(slab: Tensor) -> Tensor:
            rows = slab[layer, :, :context].index_select(0, slots)
            return rows.view(n, context, g.kv_heads, g.head_dim).transpose(1, 2)

        folded = query.view(n, m, g.kv_heads, g.group, g.head_dim).permute(0, 2, 3, 1, 4)
        out = F.scaled_dot_product_attention(
            folded.reshape(n, g.kv_heads, g.group * m, g.head_dim),
            gathered(self.keys),
            gathered(self.values),
            attn_mask=mask,
            scale=1.0,
        )
        out = out.view(n, g.kv_heads, g.group, m, g.head_dim).permute(0, 3, 1, 2, 4)
        return out.reshape(n, m, g.heads, g.head_dim)

    def mask(self, last: Tensor, context: int) -> Tensor:
        """Hide the keys after `last` (n, m), the last visible position of each query.

        Returns:
            (n, 1, group * m, context), as `attend` takes it.
        """
        visible = torch.arange(context, device=self.device) <= last[..., None]
        hidden = torch.zeros(visible.shape, device=self.device, dtype=self.keys.dtype)
        hidden.masked_fill_(~visible, float("-inf"))
        return hidden.repeat(1, self.geometry.group, 1)[:, None]

    def prefill(self, flat: FlatPrompts) -> _Prefill:
        """Prepare the computation of prompts."""
        return _Prefill(self, flat)

    def decode(self, slots: Ints, positions: Ints) -> _Decode:
        """Prepare the computation of one token, at `positions`, for each of `slots`."""
        context = min(-(-int(positions.max() + 1) // PAD) * PAD, self.max_len)
        inputs = torch.from_numpy(np.stack([slots, positions])).to(self.device)
        return _Decode(self, inputs[0], inputs[1], context)


class _Decode:
    def __init__(self, slab: GpuSlab, slots: Tensor, positions: Tensor, context: int) -> None:
        self.slab, self.slots, self.context = slab, slots, context
        self.write_at = slots * slab.max_len + positions
        self.mask = slab.mask(positions[:, None], context)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `attention.Step`."""
        self.slab.write(layer, self.write_at, k, v)
        return self.slab.attend(layer, q[:, None], self.slots, self.context, self.mask)[:, 0]


@dataclass(frozen=True, slots=True)
class _Rectangle:
    """Prompts of similar length in one product: n rows of m tokens, padded with their last one."""

    tokens: Tensor  # (n, m) flat index of each token
    unpadded: Tensor  # indices into (n * m,) that are not padding
    targets: Tensor  # their flat indices
    slots: Tensor  # (n,)
    context: int
    mask: Tensor


class _Prefill:
    def __init__(self, slab: GpuSlab, flat: FlatPrompts) -> None:
        self.slab = slab
        write_at = flat.target_slots * slab.max_len + flat.target_positions
        self.source = torch.from_numpy(flat.source).to(slab.device)
        self.write_at = torch.from_numpy(write_at).to(slab.device)
        self.rectangles = [self._rectangle(part) for part in _similar(flat.runs)]

    def _rectangle(self, runs: Sequence[Run]) -> _Rectangle:
        slab = self.slab
        slot, position, token, count = np.array(runs, dtype=np.int64).T
        m = int(count.max())
        step = np.minimum(np.arange(m), count[:, None] - 1)  # (n, m)
        tokens = token[:, None] + step
        unpadded = np.flatnonzero(np.arange(m) < count[:, None])
        context = min(-(-int((position + count).max()) // PAD) * PAD, slab.max_len)

        def tensor(array: Ints) -> Tensor:
            return torch.from_numpy(array).to(slab.device)

        return _Rectangle(
            tensor(tokens),
            tensor(unpadded),
            tensor(tokens.reshape(-1)[unpadded]),
            tensor(slot),
            context,
            slab.mask(tensor(position[:, None] + step), context),
        )

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `attention.Step`."""
        self.slab.write(layer, self.write_at, k[self.source], v[self.source])
        out = torch.empty_like(q)
        for r in self.rectangles:
            mixed = self.slab.attend(layer, q[r.tokens], r.slots, r.context, r.mask)
            out.index_copy_(0, r.targets, mixed.flatten(0, 1)[r.unpadded])
        return out


def _similar(runs: Sequence[Run]) -> list[list[Run]]:
    """Group runs of similar length, at most `SCORES` scores together."""
    parts: list[list[Run]] = []
    shortest = longest = 0
    for run in sorted(runs, key=lambda run: (run.length, run.position)):
        end = run.position + run.length
        rows = len(parts[-1]) + 1 if parts else 1
        longest = max(longest, end)
        if not parts or run.length > 2 * shortest or rows * run.length * longest > SCORES:
            parts.append([])
            shortest, longest = max(run.length, PAD), end
        parts[-1].append(run)
    return parts


def graph_size(n: int, largest: int) -> int:
    """Round up to the ladder of sizes for which a graph is captured."""
    size = -(-n // SIZES) * SIZES if n > SIZES else 1 << (n - 1).bit_length()
    return min(size, largest)


class DecodeGraphs:
    """Decode steps as CUDA graphs, captured when a size is first needed.

    Args:
        forward: runs a step on ids and positions (n,) on the device; logits (n, vocabulary).
    """

    def __init__(self, slab: GpuSlab, forward: Callable[[Step, Tensor, Tensor], Tensor]) -> None:
        self._slab = slab
        self._forward = forward
        self._pool: Any = None
        self._graphs: dict[tuple[int, int], tuple[Any, Tensor, Tensor]] = {}

    def logits(self, slots: Ints, positions: Ints, ids: Ints) -> Tensor:
        """Compute one token per slot; (n, vocabulary), overwritten by the next call."""
        slab, n = self._slab, len(slots)
        size = graph_size(n, slab.slots)
        context = max(PAD, graph_size(int(positions.max()) + 1, slab.max_len))
        if (size, context) not in self._graphs:
            self._graphs[size, context] = self._capture(size, context)
        graph, inputs, logits = self._graphs[size, context]
        new = np.zeros((3, size), np.int64)
        new[0, n:] = slab.slots  # what padding writes goes there
        new[:, :n] = slots, positions, ids
        inputs.copy_(torch.from_numpy(new))
        graph.replay()
        return logits[:n]

    def _capture(self, size: int, context: int) -> tuple[Any, Tensor, Tensor]:
        slab = self._slab
        inputs = torch.zeros((3, size), dtype=torch.int64, device=slab.device)
        inputs[0] = slab.slots

        def run() -> Tensor:
            step = _Decode(slab, inputs[0], inputs[1], context)
            return self._forward(step, inputs[2], inputs[1])

        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()  # libraries initialize themselves, which cannot be captured
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # another thread of the process may use the GPU meanwhile
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = run()
        self._pool = self._pool or graph.pool()
        _log.debug("captured a decode step of %d conversations, %d positions", size, context)
        return graph, inputs, logits
