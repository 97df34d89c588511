"""The processes in a sandbox: which there are, what they use, and their end."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

__all__ = ["Processes", "threads_of_this_user"]

_PAGE = os.sysconf("SC_PAGE_SIZE")
_GONE = (FileNotFoundError, ProcessLookupError)


class Processes:
    """All processes but the supervisor, which is this one.

    Args:
        alone: the supervisor is the first of a PID namespace of their own; else they are its
            descendants, of which it is the reaper.
    """

    def __init__(self, alone: bool) -> None:
        self._alone = alone

    def ids(self) -> list[int]:
        """Their PIDs."""
        if self._alone:
            return [int(name) for name in os.listdir("/proc") if name.isdigit() and name != "1"]
        found: list[int] = []
        waiting = [os.getpid()]
        while waiting:
            children = list(_children(waiting.pop()))
            found += children
            waiting += children
        return found

    def excess(self, processes: int, memory: int) -> str:
        """Which of the two limits they are beyond: "processes", "memory", or "" for neither.

        Args:
            processes: most processes and threads together.
            memory: most bytes that they use together.
        """
        pids = self.ids()
        if len(pids) > processes or _threads(pids) > processes:
            return "processes"
        resident = {}
        for pid in pids:
            with contextlib.suppress(*_GONE), open(f"/proc/{pid}/statm") as file:
                resident[pid] = int(file.read().split()[1]) * _PAGE
        if sum(resident.values()) <= memory:
            return ""
        # pages that several share, as after a fork, were counted several times
        used = sum(_proportional(pid, most) for pid, most in resident.items())
        return "memory" if used > memory else ""

    def kill(self) -> None:
        """Kill them all and wait for their end; none can be started in between."""
        if self._alone:
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)
        else:
            stopped: set[int] = set()
            while moving := set(self.ids()) - stopped:  # who is stopped starts no other
                _signal(moving, signal.SIGSTOP)
                stopped |= moving
            _signal(stopped, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while True:
                os.waitpid(-1, 0)


def _threads(pids: list[int]) -> int:
    count = 0
    for pid in pids:
        with contextlib.suppress(*_GONE), open(f"/proc/{pid}/stat") as file:
            count += int(file.read().rpartition(")")[2].split()[17])
    return count


def threads_of_this_user() -> int:
    """How many threads this process's user has, which is what the kernel's limit counts."""
    count = 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(*_GONE):
            if os.stat(f"/proc/{pid}").st_uid == os.getuid():
                count += len(os.listdir(f"/proc/{pid}/task"))
    return count


def _signal(pids: set[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def _children(pid: int) -> Iterator[int]:
    with contextlib.suppress(*_GONE):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(*_GONE), open(f"/proc/{pid}/task/{thread}/children") as file:
                yield from map(int, file.read().split())


def _proportional(pid: int, resident: int) -> int:
    """Its memory, with what n processes share counted as 1/n; `resident` if that is not known."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            for line in file:
                if line.startswith("Pss:"):
                    return int(line.split()[1]) << 10
    except OSError:
        return resident
    return resident
