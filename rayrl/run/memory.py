"""Peak memory of this process and everything it started, sampled in a thread."""

from __future__ import annotations

import os
import threading
from pathlib import Path

__all__ = ["PeakMemory", "memory_of_tree"]


class PeakMemory:
    """Samples memory while its `with` block runs.

    Memory is proportional set size: what processes share, such as the object store, is counted
    once. Where the kernel does not tell it, resident size is used, which counts it in each.

    Attributes:
        peak: bytes, the most seen so far.
    """

    def __init__(self, every_s: float = 2.0) -> None:
        self.peak = 0
        self._every_s = every_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        self._sample()  # so that a short block has a peak too
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(self._every_s):
            self._sample()

    def _sample(self) -> None:
        self.peak = max(self.peak, memory_of_tree(os.getpid()))


def memory_of_tree(root: int) -> int:
    """Bytes of process `root` and its descendants; 0 where /proc does not exist."""
    total, left = 0, [root]
    while left:
        process = left.pop()
        total += _memory(process)
        left += _children(process)
    return total


def _children(process: int) -> list[int]:
    found: list[int] = []
    for listing in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            found += map(int, listing.read_text().split())
        except OSError:  # it ended meanwhile
            continue
    return found


def _memory(process: int) -> int:
    for file, key in (("smaps_rollup", "Pss:"), ("status", "VmRSS:")):
        try:
            for line in Path(f"/proc/{process}/{file}").read_text().splitlines():
                if line.startswith(key):
                    return int(line.split()[1]) * 1024
        except OSError:
            continue
    return 0
