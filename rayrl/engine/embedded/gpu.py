"""Attention and decode graphs of the embedded engine on a GPU.

A step's conversations are rectangles, padded to the longest: a product on a GPU wants few large
kernels, where the CPU's (`attention.py`) computes entry by entry. Query heads that share a key head
are folded into the query length, so that no key is copied for them. Results depend on the rest of
the batch in their last bits: cuBLAS chooses kernels by shape.

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

from rayrl.engine.embedded.attention import PAD, KVPool, Rows, Step
from rayrl.engine.embedded.prompts import FlatPrompts, Run

__all__ = ["DecodeGraphs", "PaddedDecode", "PaddedPrefill"]

SCORES = 1 << 27  # (queries, keys) pairs in one prefill product
SIZES = 64  # sizes of graphs: powers of two up to this, then its multiples

Ints = NDArray[np.int64]

_log = logging.getLogger(__name__)


class _PaddedStep:
    """Attention to contexts that are gathered from the pool and padded to the longest."""

    def __init__(self, pool: KVPool) -> None:
        self.pool = pool

    def mask(self, last: Tensor, context: int) -> Tensor:
        """Hide the keys after `last` (n, m), the last visible position of each query.

        Returns:
            (n, 1, group * m, context), as `attend_to` takes it.
        """
        device, dtype = self.pool.keys.device, self.pool.keys.dtype
        visible = torch.arange(context, device=device) <= last[..., None]
        hidden = torch.zeros(visible.shape, device=device, dtype=dtype)
        hidden.masked_fill_(~visible, float("-inf"))
        return hidden.repeat(1, self.pool.geometry.group, 1)[:, None]

    def attend_to(self, layer: int, query: Tensor, contexts: Tensor, mask: Tensor) -> Tensor:
        """Attend with scaled queries.

        Args:
            query: (n, m, heads, D), m tokens of each conversation.
            contexts: (n, L) the conversations' rows of the pool.
            mask: (n, 1, group * m, L), added to the scores; the same for each query head of a key
                head.

        Returns:
            (n, m, heads, D).
        """
        g = self.pool.geometry
        n, m = query.shape[:2]

        def gathered(pool: Tensor) -> Tensor:
            rows = pool[layer].index_select(0, contexts.flatten())
            return rows.view(n, -1, g.kv_heads, g.head_dim).transpose(1, 2)

        folded = query.view(n, m, g.kv_heads, g.group, g.head_dim).permute(0, 2, 3, 1, 4)
        out = F.scaled_dot_product_attention(
            folded.reshape(n, g.kv_heads, g.group * m, g.head_dim),
            gathered(self.pool.keys),
            gathered(self.pool.values),
            attn_mask=mask,
            scale=1.0,
        )
        out = out.view(n, g.kv_heads, g.group, m, g.head_dim).permute(0, 3, 1, 2, 4)
        return out.reshape(n, m, g.heads, g.head_dim)


class PaddedDecode(_PaddedStep):
    """One token of each conversation.

    Args:
        contexts: (n, L) the conversations' rows of the pool, on its device; of what lies after
            `positions` (n,) anything.
    """

    def __init__(self, pool: KVPool, contexts: Tensor, positions: Tensor) -> None:
        super().__init__(pool)
        self._contexts = contexts
        self._write_at = contexts.gather(1, positions[:, None])[:, 0]
        self._mask = self.mask(positions[:, None], contexts.shape[1])

    @classmethod
    def of(cls, pool: KVPool, rows: Rows, positions: Ints) -> PaddedDecode:
        """Prepare a token at `positions` (n,) of conversations with `rows` (n, columns)."""
        contexts = torch.from_numpy(rows[:, : _context(positions)].astype(np.int64))
        device = pool.keys.device
        return cls(pool, contexts.to(device), torch.from_numpy(positions).to(device))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `attention.Step`."""
        self.pool.write(layer, self._write_at, k, v)
        return self.attend_to(layer, q[:, None], self._contexts, self._mask)[:, 0]


@dataclass(frozen=True, slots=True)
class _Rectangle:
    """Prompts of similar length in one product: n rows of m tokens, padded with their last one."""

    tokens: Tensor  # (n, m) flat index of each token
    unpadded: Tensor  # indices into (n * m,) that are not padding
    targets: Tensor  # their flat indices
    contexts: Tensor  # (n, L)
    mask: Tensor


class PaddedPrefill(_PaddedStep):
    """New tokens of several conversations, which have `rows` (slots, columns) of the pool."""

    def __init__(self, pool: KVPool, rows: Rows, flat: FlatPrompts) -> None:
        super().__init__(pool)
        self._write_at = self._tensor(rows[flat.slots, flat.positions])
        self._rectangles = [self._rectangle(rows, part) for part in _similar(flat.runs)]

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(self.pool.keys.device)

    def _rectangle(self, rows: Rows, runs: Sequence[Run]) -> _Rectangle:
        slot, position, token, count = np.array(runs, dtype=np.int64).T
        m = int(count.max())
        step = np.minimum(np.arange(m), count[:, None] - 1)  # (n, m)
        tokens = token[:, None] + step
        unpadded = np.flatnonzero(np.arange(m) < count[:, None])
        last = position[:, None] + step
        context = _context(last)
        return _Rectangle(
            self._tensor(tokens),
            self._tensor(unpadded),
            self._tensor(tokens.reshape(-1)[unpadded]),
            self._tensor(rows[slot, :context]),
            self.mask(self._tensor(last), context),
        )

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `attention.Step`."""
        self.pool.write(layer, self._write_at, k, v)
        out = torch.empty_like(q)
        for r in self._rectangles:
            mixed = self.attend_to(layer, q[r.tokens], r.contexts, r.mask)
            out.index_copy_(0, r.targets, mixed.flatten(0, 1)[r.unpadded])
        return out


def _context(last: Ints) -> int:
    """Return to how many positions contexts are padded of which `last` are the last ones."""
    return -(-(int(last.max()) + 1) // PAD) * PAD


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

    def __init__(
        self, pool: KVPool, max_len: int, forward: Callable[[Step, Tensor, Tensor], Tensor]
    ) -> None:
        self._pool = pool
        self._max_len = max_len
        self._forward = forward
        self._memory: Any = None  # that all graphs share
        self._graphs: dict[tuple[int, int], tuple[Any, Tensor, Tensor, Tensor]] = {}

    def logits(self, rows: Rows, positions: Ints, ids: Ints) -> Tensor:
        """Compute one token of each conversation; see `PaddedDecode.of`.

        Returns:
            (n, vocabulary), overwritten by the next call.
        """
        n = len(ids)
        size = graph_size(n, self._pool.tokens)
        context = max(PAD, graph_size(int(positions.max()) + 1, self._max_len))
        if (size, context) not in self._graphs:
            self._graphs[size, context] = self._capture(size, context)
        graph, tokens, contexts, logits = self._graphs[size, context]
        new = np.zeros((2, size), np.int64)
        new[:, :n] = positions, ids
        tokens.copy_(torch.from_numpy(new))
        padded = np.full((size, context), self._pool.tokens)  # what padding writes goes there
        padded[:n] = rows[:, :context]
        contexts.copy_(torch.from_numpy(padded))
        graph.replay()
        return logits[:n]

    def _capture(self, size: int, context: int) -> tuple[Any, Tensor, Tensor, Tensor]:
        pool = self._pool
        device = pool.keys.device
        tokens = torch.zeros((2, size), dtype=torch.int64, device=device)
        contexts = torch.full((size, context), pool.tokens, device=device)

        def run() -> Tensor:
            step = PaddedDecode(pool, contexts, tokens[0])
            return self._forward(step, tokens[1], tokens[0])

        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()  # libraries initialize themselves, which cannot be captured
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # another thread of the process may use the GPU meanwhile
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            logits = run()
        self._memory = self._memory or graph.pool()
        _log.debug("captured a decode step of %d conversations, %d positions", size, context)
        return graph, tokens, contexts, logits
