"""Named tensors as one flat buffer of bytes: what travels from a learner to the replicas.

One contiguous array goes through shared memory without a copy and without pickling tensors.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rayrl.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

__all__ = ["Entry", "Manifest", "checksum", "flatten", "layout", "put", "unflatten"]

_ALIGN = 64  # bytes; every tensor starts on a cache line, so that its view is aligned for any dtype


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor lies: `dtype` is torch's name ("bfloat16"), `offset` in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a flat buffer holds, in order. Tied parameters appear once, under their first name."""

    entries: tuple[Entry, ...]
    nbytes: int

    def names(self) -> tuple[str, ...]:
        """The tensors' names, in the order they lie in the buffer."""
        return tuple(entry.name for entry in self.entries)


def flatten(
    tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
) -> tuple[NDArray[np.uint8], Manifest]:
    """Copy named tensors into one buffer.

    Args:
        tensors: a state dict or `(name, tensor)` pairs, on any device; tensors that share the same
            memory (tied embeddings) are stored once, under the first name.

    Returns:
        `flat` (nbytes,) uint8, with zeros between aligned tensors, and its manifest.
    """
    import numpy as np

    pairs = list(tensors.items() if isinstance(tensors, Mapping) else tensors)
    kept: list[tuple[str, torch.Tensor]] = []
    seen: set[tuple[object, ...]] = set()
    for name, tensor in pairs:
        tensor = tensor.detach()
        key = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        kept.append((name, tensor))
    manifest = layout((name, tensor.dtype, tuple(tensor.shape)) for name, tensor in kept)
    flat = np.zeros(manifest.nbytes, dtype=np.uint8)
    for entry, (_, tensor) in zip(manifest.entries, kept, strict=True):
        put(flat, entry, tensor)
    return flat, manifest


def layout(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> Manifest:
    """Where tensors of these names, dtypes and shapes lie in a flat buffer."""
    entries = []
    offset = 0
    for name, dtype, shape in tensors:
        entries.append(Entry(name, str(dtype).removeprefix("torch."), shape, offset))
        size = math.prod(shape) * dtype.itemsize
        offset += (size + _ALIGN - 1) // _ALIGN * _ALIGN
    return Manifest(tuple(entries), offset)


def put(flat: NDArray[np.uint8], entry: Entry, tensor: torch.Tensor) -> None:
    """Copy one tensor, from any device, to its place in a flat buffer."""
    import torch

    _view(torch.from_numpy(flat), entry).copy_(tensor)


def unflatten(flat: NDArray[np.uint8], manifest: Manifest) -> dict[str, torch.Tensor]:
    """The tensors as *views* into `flat`, which must stay unchanged while they are in use.

    Raises:
        DataError: the buffer is not as long as the manifest says.
    """
    import torch

    if flat.nbytes != manifest.nbytes:
        raise DataError(
            f"weights buffer of {flat.nbytes} bytes does not belong to its manifest "
            f"({manifest.nbytes} bytes)"
        )
    with warnings.catch_warnings():
        # the object store hands out read-only arrays, and nothing here writes
        warnings.filterwarnings("ignore", message=".*not writable.*")
        source = torch.from_numpy(flat)
    return {entry.name: _view(source, entry) for entry in manifest.entries}


def _view(flat: torch.Tensor, entry: Entry) -> torch.Tensor:
    import torch

    dtype: torch.dtype = getattr(torch, entry.dtype)
    part = flat[entry.offset : entry.offset + math.prod(entry.shape) * dtype.itemsize]
    return part.view(dtype).view(entry.shape)


def checksum(flat: NDArray[np.uint8]) -> str:
    """A 16-digit fingerprint of a flat buffer; equal buffers have equal ones on every machine."""
    return hashlib.blake2b(flat.data, digest_size=8).hexdigest()
