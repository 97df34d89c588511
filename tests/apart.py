"""What keeps test runs and their workers out of each other's way on one machine.

Temporary files, shared memory and Ray's folder are a worker's own (`own_folders`), ports that have
to be known beforehand are locked for as long as the worker lives (`free_port`), and what is costly
to make and only read is made once for all workers (`Shared`).
"""

from __future__ import annotations

import fcntl
import itertools
import os
import shutil
import socket
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

__all__ = ["Shared", "free_port", "own_folders"]

LOCKS = Path("/tmp") / f"rayrl-test-ports-{os.getuid()}"  # for all runs on this machine
PORTS = range(21_000, 32_000)  # below those that the kernel gives away
_held: list[int] = []  # locks, until this process ends


def own_folders() -> Callable[[], None]:
    """Give this process temporary files and shared memory of its own; returns what removes them.

    The names are short: a Unix socket in Ray's folder may have 107 characters.
    """
    # What torch has compiled is found by its content, and may be anybody's.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"/tmp/rayrl-test-compiled-{os.getuid()}")
    folders = [Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))]
    os.environ["TMPDIR"] = tempfile.tempdir = str(folders[0])
    if os.path.isdir("/dev/shm"):
        folders.append(Path(tempfile.mkdtemp(prefix="rayrl-test-", dir="/dev/shm")))
        os.environ["RAYRL_SHM"] = str(folders[1])

    def remove() -> None:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)

    return remove


def free_port() -> int:
    """A port that nobody listens at, and that no other test run is given while this process lives.

    A port that the kernel chooses and that is closed again may be somebody else's by the time it is
    used.
    """
    LOCKS.mkdir(exist_ok=True)
    first = os.getpid() * 97 % len(PORTS)
    for port in itertools.chain(PORTS[first:], PORTS[:first]):
        lock = os.open(LOCKS / str(port), os.O_CREAT | os.O_RDWR, 0o600)
        with suppress(OSError), socket.socket() as probe:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
            _held.append(lock)
            return port
        os.close(lock)
    raise AssertionError(f"no port of {PORTS} is free")


class Shared:
    """Folders that are made once and read by all workers of a test run.

    Args:
        base: the same for all of them.
    """

    def __init__(self, base: Path) -> None:
        self.base = base

    def __call__(self, name: str, make: Callable[[Path], None]) -> Path:
        """The folder `name`, made by whoever asks for it first; the others wait."""
        folder, done = self.base / name, self.base / f"{name}.done"
        with FileLock(self.base / f"{name}.lock"):
            if not done.exists():
                make(folder)
                done.touch()
        return folder
