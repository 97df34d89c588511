"""Named tensors as one flat buffer of bytes, the form in which replicas receive weights.

One contiguous array goes through shared memory without a copy and without pickling tensors.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rayrl.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

__all__ = [
    "Entry",
    "Manifest",
    "SharedBuffer",
    "buckets",
    "checksum",
    "flatten",
    "layout",
    "memory_dir",
    "put",
    "read_checksum",
    "unflatten",
    "views",
]

_BLOCK = 8192  # 32-bit words hashed into one sum; their keys fit a core's cache
_ROWS = 256  # blocks a GPU widens to 64 bits at once: 16 MiB
_READ = 4 * _BLOCK * _ROWS  # bytes of a file read at once: 8 MiB
_ALIGN = 64  # bytes; every tensor starts on a cache line, so its view is aligned for any dtype


@dataclass(frozen=True, slots=True)
class Entry:
    """Layout of one tensor: `dtype` is torch's name ("bfloat16"), `offset` in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """Layout of a flat buffer. Tied parameters appear once, under their first name."""

    entries: tuple[Entry, ...]
    nbytes: int

    def names(self) -> tuple[str, ...]:
        """The tensors' names, in buffer order."""
        return tuple(entry.name for entry in self.entries)


def flatten(
    tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
) -> tuple[NDArray[np.uint8], Manifest]:
    """Copy named tensors into one buffer.

    Args:
        tensors: a state dict or `(name, tensor)` pairs, on any device. Tensors that share memory
            (tied embeddings) are stored once, under the first name.

    Returns:
        `flat` (nbytes,) uint8, with zeros between the aligned tensors, and its manifest.
    """
    import numpy as np

    pairs = list(tensors.items() if isinstance(tensors, Mapping) else tensors)
    unique: list[tuple[str, torch.Tensor]] = []
    seen: set[tuple[object, ...]] = set()
    for name, tensor in pairs:
        tensor = tensor.detach()
        key = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        unique.append((name, tensor))
    manifest = layout((name, tensor.dtype, tuple(tensor.shape)) for name, tensor in unique)
    flat = np.zeros(manifest.nbytes, dtype=np.uint8)
    for entry, (_, tensor) in zip(manifest.entries, unique, strict=True):
        put(flat, entry, tensor)
    return flat, manifest


def layout(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> Manifest:
    """Lay out tensors of these names, dtypes and shapes in one flat buffer."""
    return next(iter(buckets(tensors, math.inf)), Manifest((), 0))


def buckets(
    tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], limit: float
) -> tuple[Manifest, ...]:
    """Lay out tensors in buffers of at most `limit` bytes; a larger tensor gets its own buffer."""
    manifests: list[Manifest] = []
    entries: list[Entry] = []
    offset = 0
    for name, dtype, shape in tensors:
        size = math.prod(shape) * dtype.itemsize
        size = (size + _ALIGN - 1) // _ALIGN * _ALIGN
        if entries and offset + size > limit:
            manifests.append(Manifest(tuple(entries), offset))
            entries, offset = [], 0
        entries.append(Entry(name, str(dtype).removeprefix("torch."), tuple(shape), offset))
        offset += size
    if entries:
        manifests.append(Manifest(tuple(entries), offset))
    return tuple(manifests)


def put(flat: NDArray[np.uint8] | torch.Tensor, entry: Entry, tensor: torch.Tensor) -> None:
    """Copy one tensor into a flat buffer; each may be on any device."""
    import torch

    target = flat if isinstance(flat, torch.Tensor) else torch.from_numpy(flat)
    _view(target, entry).copy_(tensor)


def unflatten(flat: NDArray[np.uint8], manifest: Manifest) -> dict[str, torch.Tensor]:
    """Return the tensors as *views* of `flat`, which must not change while they are in use.

    Raises:
        DataError: the buffer's length differs from the manifest's.
    """
    import torch

    if flat.nbytes != manifest.nbytes:
        raise DataError(
            f"weights buffer of {flat.nbytes} bytes does not match its manifest "
            f"({manifest.nbytes} bytes)"
        )
    with warnings.catch_warnings():
        # Ray's object store returns read-only arrays, and nothing here writes
        warnings.filterwarnings("ignore", message=".*not writable.*")
        source = torch.from_numpy(flat)
    return dict(views(source, manifest))


def views(flat: torch.Tensor, manifest: Manifest) -> list[tuple[str, torch.Tensor]]:
    """Return names and tensors as views of a flat buffer, itself a tensor on any device."""
    return [(entry.name, _view(flat, entry)) for entry in manifest.entries]


def _view(flat: torch.Tensor, entry: Entry) -> torch.Tensor:
    import torch

    dtype: torch.dtype = getattr(torch, entry.dtype)
    part = flat[entry.offset : entry.offset + math.prod(entry.shape) * dtype.itemsize]
    return part.view(dtype).view(entry.shape)


def checksum(flat: NDArray[np.uint8] | torch.Tensor) -> str:
    """Compute a 16-digit checksum of bytes, the same on every machine and device.

    A block of 8,192 32-bit words x is hashed as sum(key * x) modulo 2**64 with fixed random keys
    (Lemire and Kaser, "Strongly universal string hashing is fast", 2014: MULTILINEAR); the length
    and the blocks' sums, in order, go through BLAKE2b. This is five times as fast as BLAKE2b alone,
    and uses integer arithmetic only, so that a GPU computes the same.

    Args:
        flat: (nbytes,) uint8, contiguous; an array, or a tensor on any device.
    """
    import numpy as np

    count = len(flat)
    whole = count // (4 * _BLOCK) * (4 * _BLOCK)
    rest = np.zeros(4 * _BLOCK, np.uint8)
    if not isinstance(flat, np.ndarray):
        import torch

        rest[: count - whole] = flat[whole:].cpu().numpy()
        keys = torch.from_numpy(_keys()).to(flat.device)
        rows = flat[:whole].view(-1, 4 * _BLOCK)
        parts = [
            (rows[at : at + _ROWS].view(torch.int32) * keys).sum(1)
            for at in range(0, len(rows), _ROWS)
        ]
        sums = torch.cat(parts).cpu().numpy() if parts else np.zeros(0, np.int64)
    else:
        rest[: count - whole] = flat[whole:]
        sums = _block_sums(flat[:whole])
    return _digest(count, [sums], rest)


def read_checksum(file: Path) -> tuple[int, str]:
    """Compute a file's size in bytes and its `checksum`, without holding or mapping all of it."""
    import numpy as np

    count, sums, rest = 0, [], np.zeros(4 * _BLOCK, np.uint8)
    with file.open("rb") as source:
        while data := source.read(_READ):
            part = np.frombuffer(data, np.uint8)
            whole = len(part) // (4 * _BLOCK) * (4 * _BLOCK)
            sums.append(_block_sums(part[:whole]))
            rest[: len(part) - whole] = part[whole:]
            count += len(part)
    return count, _digest(count, sums, rest)


def _block_sums(flat: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Hash whole blocks."""
    import numpy as np

    words = flat.view(np.int32).reshape(-1, _BLOCK)
    sums: NDArray[np.int64] = np.einsum("ij,j->i", words, _keys(), dtype=np.int64)
    return sums


def _digest(count: int, sums: Sequence[NDArray[np.int64]], rest: NDArray[np.uint8]) -> str:
    """Combine the sums of all whole blocks with the padded rest of `count` bytes."""
    import numpy as np

    last = np.einsum("j,j->", rest.view(np.int32), _keys(), dtype=np.int64)
    digest = hashlib.blake2b(count.to_bytes(8, "little"), digest_size=8)
    for part in sums:
        digest.update(part.astype("<i8").tobytes())
    digest.update(last.astype("<i8").tobytes())
    return digest.hexdigest()


@functools.cache
def _keys() -> NDArray[np.int64]:
    """(_BLOCK,) fixed random keys, from BLAKE2b so that no library version changes them."""
    import numpy as np

    drawn = (hashlib.blake2b(k.to_bytes(2, "little")).digest() for k in range(_BLOCK // 8))
    return np.frombuffer(b"".join(drawn), "<i8").astype(np.int64) | 1


def memory_dir() -> str | None:
    """Return the folder of the in-memory file system: RAYRL_SHM, else /dev/shm.

    None, which means the default folder for temporary files, if that folder does not exist.
    """
    folder = os.environ.get("RAYRL_SHM", "/dev/shm")
    return folder if os.path.isdir(folder) else None


class SharedBuffer:
    """Memory that a worker maps by file name; reused for every push, because new pages are slow."""

    def __init__(self) -> None:
        self.name = ""
        self._mapped: NDArray[np.uint8] | None = None

    def write(self, flat: NDArray[np.uint8]) -> None:
        """Copy a flat buffer into the file; a new size needs a new file."""
        import numpy as np

        if self._mapped is None or len(self._mapped) != len(flat):
            self.close()
            handle, self.name = tempfile.mkstemp(prefix="rayrl-weights-", dir=memory_dir())
            with os.fdopen(handle, "wb") as file:
                file.truncate(len(flat))
            self._mapped = np.memmap(self.name, np.uint8, "r+")
        np.copyto(self._mapped, flat)

    def unlink(self) -> None:
        """Unlink the file once the worker has mapped it, so that a killed replica leaves none."""
        with suppress(FileNotFoundError):
            os.unlink(self.name)

    def close(self) -> None:
        """Delete the file; processes that have it mapped can still read it."""
        self._mapped = None
        self.unlink()
