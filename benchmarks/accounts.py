"""CPU seconds by role of a local Ray's processes, which other load barely changes.

Programs are what env workers have started.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping

import psutil

__all__ = ["ROLES", "Accounts", "role_of"]

ROLES = {  # prefix of a process's title, as Ray sets it -> role
    "ray::EnvWorker": "env worker",
    "ray::ServeReplica": "replica",
    "ray::Replica": "replica",
    "ray::ServeController": "controller",
    "ray::Recorder": "recorder",
    "ray::WeightStore": "store",
    "ray::LearnerRank": "learner",
    "VLLM::": "engine",
}


def role_of(process: psutil.Process, own: int, workers: set[int]) -> str:
    """What a process is.

    Args:
        own: id of the driver.
        workers: ids of env workers, and of what they have started.
    """
    if process.pid == own:
        return "driver"
    line = process.cmdline()
    title = line[0] if line else ""
    for prefix, role in ROLES.items():
        if title.startswith(prefix):
            return role
    if process.ppid() in workers:
        return "programs"
    name = title.rpartition("/")[2]
    return {"raylet": "raylet", "gcs_server": "gcs"}.get(name, "other Ray processes")


class Accounts:
    """CPU seconds of this process and its descendants since the object was created."""

    def __init__(self) -> None:
        self._own = psutil.Process()
        self._before, self._idle = self._now(), _idle()
        self._began = time.perf_counter()

    def _now(self) -> dict[tuple[str, int], float]:
        now = {}
        workers: set[int] = set()  # env workers, and what they have started
        for process in (self._own, *self._own.children(recursive=True)):
            try:
                times = process.cpu_times()
                role = role_of(process, self._own.pid, workers)
                now[role, process.pid] = times.user + times.system
                if role in ("env worker", "programs"):
                    workers.add(process.pid)
                    ended = times.children_user + times.children_system
                    now["programs", -process.pid] = ended
            except psutil.Error:  # the process has ended
                continue
        return now

    def spent(self) -> Mapping[str, float]:
        """Return CPU seconds by role, of processes that ended meanwhile only those of programs."""
        by_role: Counter[str] = Counter()
        for key, seconds in self._now().items():
            by_role[key[0]] += seconds - self._before.get(key, 0.0)
        return dict(by_role)

    def cores(self) -> float:
        """Return the mean number of available cores: those used by us and idle ones."""
        free = _idle() - self._idle + sum(self.spent().values())
        return min(free / (time.perf_counter() - self._began), float(os.cpu_count() or 1))


def _idle() -> float:
    now = psutil.cpu_times()
    return float(now.idle + getattr(now, "iowait", 0.0))
