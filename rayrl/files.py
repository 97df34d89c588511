"""Files that a power cut or a full disk leaves whole."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rayrl.errors import RunFailed

__all__ = ["disk_is_full", "size_of", "sync", "told_if_full", "write_atomic"]


def write_atomic(file: Path, data: bytes) -> None:
    """Write a file that is there whole, or as it was before, whatever happens meanwhile."""
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with partial.open("wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        os.replace(partial, file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(file.parent)


def disk_is_full(error: Exception, path: Path) -> bool:
    """Whether `error` comes from a full disk; libraries wrap it in errors of their own."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return "No space left" in str(error) or shutil.disk_usage(path).free < 1 << 20


@contextmanager
def told_if_full(path: Path, what: str, then: str, needed: int = 0) -> Iterator[None]:
    """While within, a full disk is an error that says what to do.

    Args:
        path: something on that disk.
        what: is written, as "the checkpoint of step 4".
        then: what the same command does once there is space.
        needed: about how many bytes it takes, where that is known.

    Raises:
        RunFailed: the disk is full.
    """
    try:
        yield
    except Exception as error:
        if not disk_is_full(error, path):
            raise
        free = shutil.disk_usage(path).free
        needs = f"it needs about {_mib(needed)}, and " if needed else ""
        raise RunFailed(
            f"{path}: the disk is full, so {what} was not kept ({needs}{_mib(free)} is free). "
            f"Free some space and run the same command again: {then}."
        ) from error


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
