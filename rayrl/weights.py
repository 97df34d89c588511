"""Named tensors as one flat buffer of bytes: what travels from a learner to the replicas.

One contiguous array goes through shared memory without a copy and without pickling tensors.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rayrl.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

__all__ = ["Entry", "Manifest", "checksum", "flatten", "unflatten"]

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
    import torch

    pairs = list(tensors.items() if isinstance(tensors, Mapping) else tensors)
    kept: list[tuple[Entry, torch.Tensor]] = []
    seen: set[tuple[object, ...]] = set()
    offset = 0
    for name, tensor in pairs:
        tensor = tensor.detach()
        key = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        dtype = str(tensor.dtype).removeprefix("torch.")
        kept.append((Entry(name, dtype, tuple(tensor.shape), offset), tensor))
        size = tensor.numel() * tensor.element_size()
        offset += (size + _ALIGN - 1) // _ALIGN * _ALIGN
    flat = np.zeros(offset, dtype=np.uint8)
    target = torch.from_numpy(flat)
    for entry, tensor in kept:
        _view(target, entry).copy_(tensor)
    return flat, Manifest(tuple(entry for entry, _ in kept), offset)


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
    count = 1
    for size in entry.shape:
        count *= size
    part = flat[entry.offset : entry.offset + count * dtype.itemsize]
    return part.view(dtype).view(entry.shape)


def checksum(flat: NDArray[np.uint8]) -> str:
    """A 16-digit fingerprint of a flat buffer; equal buffers have equal ones on every machine."""
    return hashlib.blake2b(flat.data, digest_size=8).hexdigest()
