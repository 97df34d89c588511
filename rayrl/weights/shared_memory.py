"""Weights in memory that another process maps."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["SharedBuffer", "memory_dir"]


def memory_dir() -> str | None:
    """Where files are memory: RAYRL_SHM, else /dev/shm.

    None, which means the usual place of temporary files, where there is no such folder.
    """
    folder = os.environ.get("RAYRL_SHM", "/dev/shm")
    return folder if os.path.isdir(folder) else None


class SharedBuffer:
    """Memory that the worker maps by a name; kept from push to push, because new pages are slow."""

    def __init__(self) -> None:
        self.name = ""
        self._mapped: NDArray[np.uint8] | None = None

    def write(self, flat: NDArray[np.uint8]) -> None:
        """Copy a flat buffer into it; another size than before makes another file."""
        import numpy as np

        if self._mapped is None or len(self._mapped) != len(flat):
            self.close()
            handle, self.name = tempfile.mkstemp(prefix="rayrl-weights-", dir=memory_dir())
            with os.fdopen(handle, "wb") as file:
                file.truncate(len(flat))
            self._mapped = np.memmap(self.name, np.uint8, "r+")
        np.copyto(self._mapped, flat)

    def unlink(self) -> None:
        """Take its name away, once the worker has it mapped: so a killed replica leaves no file."""
        with suppress(FileNotFoundError):
            os.unlink(self.name)

    def close(self) -> None:
        """Delete it; who has it mapped can still read it."""
        self._mapped = None
        self.unlink()
