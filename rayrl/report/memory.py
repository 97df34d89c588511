"""Peak memory of this process and its descendants, sampled by a thread."""

from __future__ import annotations

import os
import threading

import psutil

__all__ = ["PeakMemory", "memory_of", "memory_of_tree"]


class PeakMemory:
    """Sample memory while the `with` block runs.

    Memory is the proportional set size, which counts memory that processes share, such as the
    object store, once; on systems that do not report it the resident set size, which counts shared
    memory in every process.

    Attributes:
        peak: largest sample so far in bytes.
    """

    def __init__(self, every_s: float = 2.0) -> None:
        self.peak = 0
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="peak-memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        self._sample()  # so that short blocks have a peak
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            self._sample()

    def _sample(self) -> None:
        self.peak = max(self.peak, memory_of_tree(os.getpid()))


def memory_of_tree(root: int) -> int:
    """Memory of process `root` and its descendants in bytes; 0 if there is no such process."""
    try:
        process = psutil.Process(root)
        return sum(map(memory_of, [process, *process.children(recursive=True)]))
    except psutil.NoSuchProcess:
        return 0


def memory_of(process: psutil.Process) -> int:
    """Memory of one process in bytes; 0 if it has ended."""
    try:
        full = process.memory_full_info()
        return int(getattr(full, "pss", full.rss))
    except psutil.AccessDenied:  # of another user, as with sudo
        return int(process.memory_info().rss)
    except (psutil.NoSuchProcess, psutil.ZombieProcess):  # it has ended
        return 0
