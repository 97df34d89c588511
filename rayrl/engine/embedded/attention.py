"""Attention of flat tokens over a pool of keys and values, through transformers' own interface.

A step runs the tokens of many conversations as one row of a batch, (1, T), so the linear layers see
almost no padding; only the attention below knows which token belongs to which conversation.
transformers passes it q, k and v after the rotary embedding; it writes k and v to the pool and
attends to rows of the pool, wherever they are. So conversations share the keys and values of what
they have in common, and none of it is copied.

On a CPU with a C++ compiler that is `rayrl.native` (`CompiledStep`). Without one, a step is a
sparse matrix (`SparseStep`): a row for each query head of a token, an entry for each key that it
sees. torch has kernels for its two products, which compute nothing else and need no keys side by
side: q kᵀ at the entries ("sampled" in SDDMM, as in Hong et al. 2019,
https://doi.org/10.1145/3293883.3295712), and the entries times v, a weighted sum of rows as of an
embedding table (torch's CSR product takes two to five times as long for the same bits). The way for
GPUs, in `gpu.py`, promises no bits.

**Every token's result has the same bits, whatever else is in the step**, and whether its context
was computed in the same step or long ago: both ways on the CPU work entry by entry and row by row,
in the order of the context. The linear layers add a condition, as measured on torch's CPU kernels:
in fp32 (MKL) a row does not depend on the others once there are at least 16, and 8 per thread where
rows are split across threads; hence the padding in `model.py`. In bf16 (oneDNN with AVX512-BF16) it
never did.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rayrl.errors import ConfigError
from rayrl.native import Contexts, attend

__all__ = [
    "NAME",
    "PAD",
    "CompiledStep",
    "Geometry",
    "KVPool",
    "SparseStep",
    "Step",
    "attention",
]

NAME = "rayrl_pool"  # under which `attention` is registered with transformers
PAD = 16  # on a GPU contexts are padded to a multiple of this: masks must be aligned

Ints = NDArray[np.int64]
Rows = NDArray[np.int32]

with warnings.catch_warnings():  # torch says once per process that these matrices are in beta
    warnings.simplefilter("ignore", UserWarning)
    torch.sparse_csr_tensor([0, 0], [], [], (1, 1), check_invariants=False)


@dataclass(frozen=True, slots=True)
class Geometry:
    """Shapes of a model's attention."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.heads // self.kv_heads

    def token_bytes(self, itemsize: int) -> int:
        """Bytes of one token's keys and values of `itemsize` bytes each."""
        return self.layers * 2 * self.kv_heads * self.head_dim * itemsize


class Step(Protocol):
    """The tokens of one forward pass."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k, v (T, kv_heads, D) and attend with scaled q (T, heads, D); same shape as q."""
        ...


class KVPool:
    """Keys and values of `tokens` tokens: per layer (tokens + 1, kv_heads * D).

    The last row takes what the padding of a decode graph writes (`gpu.py`).
    """

    def __init__(
        self, geometry: Geometry, tokens: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.geometry = geometry
        self.tokens = tokens
        self._device, self._dtype = device, dtype
        self.keys: Tensor
        self.values: Tensor
        self.clear()

    def clear(self) -> None:
        """Forget everything; on a CPU the system has the memory back until it is written again."""
        g = self.geometry
        shape = (2, g.layers, self.tokens + 1, g.kv_heads * g.head_dim)
        if self._device.type == "cpu":  # as numpy, which takes no memory before it is written
            same_size = {4: np.float32, 2: np.int16}[self._dtype.itemsize]
            both = torch.from_numpy(np.zeros(shape, same_size)).view(self._dtype)
        else:
            both = torch.zeros(shape, device=self._device, dtype=self._dtype)
        self.keys, self.values = both[0], both[1]

    def write(self, layer: int, rows: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write keys and values (n, kv_heads, D) to `rows` (n,)."""
        for pool, new in ((self.keys, keys), (self.values, values)):
            pool[layer].index_copy_(0, rows, new.flatten(1).to(pool.dtype))


class CompiledStep:
    """Tokens that attend to contexts of any lengths, on the CPU in C++; the pool is fp32 or bf16.

    Args:
        rows, slots, positions: as `SparseStep`'s.
        threads: how many to use at most.
    """

    def __init__(
        self, pool: KVPool, rows: Rows, slots: Ints, positions: Ints, threads: int
    ) -> None:
        self._pool = pool
        self._threads = threads
        self._contexts = Contexts.of(rows, slots, positions)
        self._write_at = torch.from_numpy(rows[slots, positions].astype(np.int64))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Step.attend`."""
        self._pool.write(layer, self._write_at, k, v)
        keys, values = (
            x[layer].view(-1, *k.shape[1:]) for x in (self._pool.keys, self._pool.values)
        )
        query = q.float().contiguous()
        return attend(self._contexts, query, keys, values, 1.0, self._threads).to(q.dtype)


class SparseStep:
    """Tokens that attend to contexts of any lengths, on the CPU in torch; the pool is fp32.

    Its matrix has a row for each query head of a token, and an entry for each key that it sees.

    Args:
        rows: (slots, columns) where in the pool the tokens of each conversation are.
        slots: (T,) whose conversation each token belongs to.
        positions: (T,) its place there; it attends to all up to its own.
    """

    def __init__(self, pool: KVPool, rows: Rows, slots: Ints, positions: Ints) -> None:
        self._pool = pool
        g = pool.geometry
        self._write_at = torch.from_numpy(rows[slots, positions].astype(np.int64))
        seen = positions + 1
        starts = seen.cumsum() - seen
        offsets = np.arange(seen.sum()) - np.repeat(starts, seen)
        context = rows[np.repeat(slots, seen), offsets] * np.int32(g.kv_heads)
        by_head = context + np.arange(g.kv_heads, dtype=np.int32)[:, None]  # (kv_heads, keys)
        key_head = np.arange(g.heads) // g.group
        begins = (starts[:, None] + key_head * len(context)).reshape(-1)  # of rows, in `by_head`
        lengths = np.repeat(seen, g.heads)  # of rows
        ends = lengths.cumsum()
        taken = np.arange(ends[-1]) - np.repeat(ends - lengths - begins, lengths)
        columns = torch.from_numpy(by_head.reshape(-1)[taken])
        self._row = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))
        self._offsets = torch.from_numpy(np.concatenate([[0], ends]))
        self._weights = torch.zeros(len(columns))  # worked in, without meaning in between
        self._matrix = torch.sparse_csr_tensor(
            self._offsets.int(),
            columns,
            self._weights,
            (len(lengths), (pool.tokens + 1) * g.kv_heads),
            check_invariants=False,
        )

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Step.attend`."""
        self._pool.write(layer, self._write_at, k, v)
        width = q.shape[-1]
        keys = self._pool.keys[layer].view(-1, width)
        values = self._pool.values[layer].view(-1, width)
        query = q.reshape(-1, width).float()
        matrix, weights = self._matrix, self._weights
        torch.sparse.sampled_addmm(matrix, query, keys.T, beta=0.0, out=matrix)
        largest = torch.full((len(query),), -torch.inf)
        largest.scatter_reduce_(0, self._row, weights, "amax")
        weights.sub_(largest.index_select(0, self._row)).exp_()
        total = torch.segment_reduce(weights, "sum", offsets=self._offsets)
        attended = torch.nn.functional.embedding_bag(
            matrix.col_indices(),
            values,
            matrix.crow_indices(),
            mode="sum",
            per_sample_weights=weights,
            include_last_offset=True,
        ).div_(total[:, None])
        return attended.view(q.shape).to(q.dtype)


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
