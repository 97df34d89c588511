"""A file in shared memory through which another process maps weights."""

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
