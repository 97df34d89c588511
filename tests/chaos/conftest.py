"""After each of these tests nothing is left of what ran in it."""

from __future__ import annotations

import ctypes
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from rayrl.cluster.session import private_folder
from rayrl.weights.flat import memory_dir

PR_SET_CHILD_SUBREAPER = 36
PATIENCE_S = 300.0  # Ray's own processes end a while after their driver, or their head, was killed
# These would tell a head of their raylet's end, for a minute, that died with it.
MESSENGERS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")


@pytest.fixture(scope="session", autouse=True)
def orphans_are_ours() -> Iterator[None]:
    """Processes whose parent was killed become children of this one, where they are found."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    yield
    libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@pytest.fixture(autouse=True)
def nothing_is_left(orphans_are_ours: None) -> Iterator[None]:
    """No process, no shared memory, no temporary file; orphans among Ray's messengers are ended."""
    before = _processes(), _files()
    yield
    end = time.monotonic() + PATIENCE_S
    while (left := _left(before)) and time.monotonic() < end:
        time.sleep(0.2)
    assert left == []


def _left(before: tuple[set[psutil.Process], set[Path]]) -> list[str]:
    processes, files = before
    left = [str(path) for path in _files() - files]
    for process in _processes() - processes:
        with suppress(psutil.NoSuchProcess):
            ours = process.ppid() == os.getpid()
            if process.status() == psutil.STATUS_ZOMBIE:  # it has no words any more
                if ours:
                    with suppress(ChildProcessError):
                        os.waitpid(process.pid, os.WNOHANG)
                continue
            words = " ".join(process.cmdline())[:200]
            if ours and words.startswith(MESSENGERS):
                process.kill()
            else:
                left.append(words)
    return left


def _processes() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def _files() -> set[Path]:
    """Ours, in memory and among temporary files; Ray leaves its logs in a folder that stays."""
    folders = [tempfile.gettempdir(), *filter(None, [memory_dir()])]
    found = {path for folder in folders for path in Path(folder).glob("rayrl*")}
    return found - {Path(private_folder()).parent}
