"""Compiles `attention.cpp` for this machine's CPU, once, and loads it.

The library lies in the user's cache, under a name that has everything it depends on, so another
source, compiler or CPU gets another one. `CXX` names the compiler, as it does elsewhere;
`CXX=false` does without.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from rayrl.errors import RayrlError

__all__ = ["Unavailable", "compile_to", "find_compiler", "load", "missing"]

SOURCE = Path(__file__).with_name("attention.cpp")
FLAGS = ["-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-pthread"]
COMPILERS = ["c++", "g++", "clang++"]
TIMEOUT_S = 120.0
CPU = ("model name", "flags", "CPU part", "Features")  # in /proc/cpuinfo, on x86 and ARM


class Unavailable(RayrlError):
    """There is no library on this machine; the message says why."""


def load() -> ctypes.CDLL:
    """The library, compiled if it is not there yet (a second or two).

    Raises:
        Unavailable: there is no C++ compiler, or it fails.
    """
    found = _find()
    if isinstance(found, Unavailable):
        raise found
    return found


def missing() -> str | None:
    """Why there is no library here, or None where there is one."""
    found = _find()
    return str(found) if isinstance(found, Unavailable) else None


@functools.cache
def _find() -> ctypes.CDLL | Unavailable:
    try:
        compiler = find_compiler()
        name = f"attention-{_digest(compiler)}.so"
        try:
            cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
            return _open(cache / "rayrl", name, compiler)
        except (OSError, RuntimeError):  # there is no home, or no room, or it is not ours to write
            with tempfile.TemporaryDirectory() as folder:  # for this process alone
                return _open(Path(folder), name, compiler)
    except Unavailable as error:
        return error
    except OSError as error:
        return Unavailable(f"what the C++ compiler made cannot be used: {error}")


def _open(folder: Path, name: str, compiler: str) -> ctypes.CDLL:
    if not (folder / name).exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as part:
            compile_to(Path(part, name), compiler)
            Path(part, name).replace(folder / name)  # whole, or not there
    return ctypes.CDLL(str(folder / name))


def compile_to(library: Path, compiler: str, *flags: str) -> None:
    """Compile the source; raises Unavailable with the compiler's words if that fails."""
    command = [compiler, *FLAGS, *flags, str(SOURCE), "-o", str(library)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"the C++ compiler {compiler} cannot be run: {error}") from error
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), "")
        raise Unavailable(f"the C++ compiler {compiler} fails ({done.returncode}) {said}".rstrip())


def find_compiler() -> str:
    """Path of the C++ compiler; raises Unavailable if there is none."""
    named = os.environ.get("CXX")
    for candidate in [named] if named else COMPILERS:
        found = shutil.which(candidate)
        if found:
            return found
    raise Unavailable(f"there is no C++ compiler ({named or ', '.join(COMPILERS)})")


def _digest(compiler: str) -> str:
    """Of the source, its flags, the compiler and the CPU."""
    tool = Path(compiler).resolve()
    made = tool.stat()
    try:  # the first processor's
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        cpu = [line for line in lines if line.startswith(CPU)]
    except OSError:
        cpu = [platform.processor()]
    parts = [SOURCE.read_text(), *FLAGS, str(tool), f"{made.st_size} {made.st_mtime_ns}"]
    parts += [platform.machine(), *cpu]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
