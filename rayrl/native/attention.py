"""Attention of tokens over keys and values that lie anywhere in a table; see `attention.cpp`."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from rayrl.native.library import load

__all__ = ["Contexts", "attend", "attend_trie", "lanes"]

THREAD_WORK = 1 << 15  # products of a query head and a key for which another thread is started


class _Context(ctypes.Structure):
    """`Context` in attention.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("rows", "slots", "positions")),
        *((name, ctypes.c_int64) for name in ("columns", "kv_heads", "group", "width")),
        ("scale", ctypes.c_float),
    ]


@dataclass(frozen=True, slots=True, eq=False)
class Contexts:
    """What each of T tokens sees.

    Attributes:
        rows: (conversations, columns) where in a table the tokens of each conversation are.
        slots: (T,) whose conversation each token belongs to.
        positions: (T,) its place there; it sees all up to its own.
        seen: keys that all of them see together.
    """

    rows: NDArray[np.int32]
    slots: NDArray[np.int64]
    positions: NDArray[np.int64]
    seen: int

    @classmethod
    def of(cls, rows: NDArray[Any], slots: NDArray[Any], positions: NDArray[Any]) -> Contexts:
        """From arrays of any integers."""
        return cls(
            np.ascontiguousarray(rows, np.int32),
            np.ascontiguousarray(slots, np.int64),
            np.ascontiguousarray(positions, np.int64),
            int(positions.sum()) + len(positions),
        )

    def pointer(self, kv_heads: int, group: int, width: int, scale: float) -> Any:
        """As C++ takes it; valid while this exists."""
        arrays = (self.rows.ctypes.data, self.slots.ctypes.data, self.positions.ctypes.data)
        shape = (self.rows.shape[1], kv_heads, group, width)
        return ctypes.byref(_Context(*arrays, *shape, scale))

    def threads(self, heads: int, most: int) -> int:
        """Of at most `most`, how many are worth starting."""
        return max(1, min(most, self.seen * heads // THREAD_WORK))


@functools.cache
def lanes() -> int:
    """Numbers that a vector has here: a head's width must be a multiple.

    Raises:
        Unavailable: the library is.
    """
    return int(load().rayrl_lanes())


def attend(
    contexts: Contexts,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    threads: int,
    normalizers: Tensor | None = None,
) -> Tensor:
    """Softmax attention of each token over what it sees.

    Args:
        query: (T, heads, D) in fp32.
        keys, values: (n, kv_heads, D) in fp32 or bf16; `contexts.rows` are rows of these.
        scale: of the products of queries and keys.
        threads: how many to use at most.
        normalizers: (T, heads) for the logarithms of the sums of exponentials.

    Returns:
        (T, heads, D) in fp32.
    """
    tokens, heads, width = query.shape
    out = torch.empty(query.shape, dtype=torch.float32)
    if tokens:
        load().rayrl_attend(
            contexts.pointer(keys.shape[1], heads // keys.shape[1], width, scale),
            *(_address(x) for x in (query, keys, values)),
            ctypes.c_int(keys.dtype == torch.bfloat16),
            _address(out),
            None if normalizers is None else _address(normalizers),
            ctypes.c_int64(tokens),
            ctypes.c_int64(contexts.threads(heads, threads)),
        )
    return out


def attend_trie(
    contexts: Contexts, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> Tensor:
    """Attention of a trie's tokens over the paths that lead to them, with gradients; in fp32.

    Args:
        contexts: of the U tokens, whose rows are the tokens themselves.
        query: (U, heads, D).
        key: (U, kv_heads, D).
        value: (U, kv_heads, D or another width).

    Returns:
        (U, heads, the values' width).
    """
    width = value.shape[2]
    # zeros in a head change neither its scores nor what is kept of it
    common = -(-max(width, query.shape[2]) // lanes()) * lanes()
    query, key, value = (
        F.pad(x, (0, common - x.shape[2])) if x.shape[2] < common else x.contiguous()
        for x in (query, key, value)
    )
    out: Tensor = _AttendTrie.apply(query, key, value, contexts, scale)  # type: ignore[no-untyped-call]
    return out[..., :width]


class _AttendTrie(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, contexts: Contexts, scale: float
    ) -> Tensor:
        normalizers = torch.empty(query.shape[:2])
        threads = torch.get_num_threads()
        out = attend(contexts, query, key, value, scale, threads, normalizers)
        ctx.save_for_backward(query, key, value, out, normalizers)
        ctx.contexts, ctx.scale = contexts, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, normalizers = ctx.saved_tensors
        of_out = of_out.contiguous()
        of_query = torch.empty_like(query)
        of_key, of_value = torch.zeros_like(key), torch.zeros_like(value)
        tokens, heads, width = query.shape
        contexts: Contexts = ctx.contexts
        load().rayrl_attend_backward(
            contexts.pointer(key.shape[1], heads // key.shape[1], width, ctx.scale),
            *(_address(x) for x in (query, key, value, out, normalizers, of_out)),
            *(_address(x) for x in (of_query, of_key, of_value)),
            ctypes.c_int64(tokens),
            ctypes.c_int64(len(key)),
            ctypes.c_int64(contexts.threads(heads, torch.get_num_threads())),
        )
        return of_query, of_key, of_value, None, None


def _address(tensor: Tensor) -> ctypes.c_void_p:
    if not tensor.is_contiguous():
        raise ValueError(f"a tensor of {tuple(tensor.shape)} is not contiguous")
    return ctypes.c_void_p(tensor.data_ptr())
