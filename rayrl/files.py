"""Files that a power cut or a full disk leaves whole."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

__all__ = ["disk_is_full", "sync", "write_atomic"]


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


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
