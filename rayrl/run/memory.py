"""Peak memory of this process and its descendants, sampled by a thread."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

__all__ = ["PeakMemory", "memory_of_tree"]


class PeakMemory:
    """Sample memory while the `with` block runs.

    Memory is the proportional set size, which counts memory that processes share, such as the
    object store, once. Where the kernel does not report it, the resident set size is used instead,
    which counts shared memory in every process.

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
    """Memory of process `root` and its descendants in bytes; 0 without /proc."""
    total, pending = 0, [root]
    while pending:
        process = pending.pop()
        total += _memory(process)
        for listing in Path(f"/proc/{process}/task").glob("*/children"):
            with contextlib.suppress(OSError):  # the process has ended
                pending += map(int, listing.read_text().split())
    return total


def _memory(process: int) -> int:
    for file, key in (("smaps_rollup", "Pss:"), ("status", "VmRSS:")):
        try:
            for line in Path(f"/proc/{process}/{file}").read_text().splitlines():
                if line.startswith(key):
                    return int(line.split()[1]) * 1024
        except OSError:
            continue
    return 0
