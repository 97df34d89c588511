"""Main program of a sandbox: answers requests on its stdin, one after the other.

A message is its length in 4 bytes, big-endian, and JSON; bytes in it are base64. The first is the
supervisor's own: `{"ready": …}`, or `{"error": …}` with what the machine refuses.
"""

from __future__ import annotations

import binascii
import contextlib
import json
import os
import signal
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence

from . import kernel
from .execution import Bounds, Command, execute
from .namespaces import USER, build_view, distinct_user, enter_namespaces
from .processes import Processes, threads_of_this_user
from .seccomp import filter_for

TYPE_CHECKING = False  # typing takes longer to import than all the rest
if TYPE_CHECKING:
    from typing import Any

__all__ = ["main"]

_HEADROOM = 256  # threads that all else of the same user may add while a sandbox runs
_OLDEST_KERNEL = (5, 14)  # counts the processes of a user namespace by themselves


def main(words: str) -> None:
    """Run a sandbox until stdin ends.

    Args:
        words: settings as JSON: `isolation` ("namespaces"; "made", in namespaces that another made;
            "limits"), `memory` and `disk` in bytes, `processes`, `network`, `readable`, `work`.
    """
    settings = json.loads(words)
    # the program's own 0, 1 and 2 take the places of these
    channel = _Channel(os.dup(0), os.dup(1))
    quiet = os.open(os.devnull, os.O_RDWR)
    os.dup2(quiet, 0)
    os.dup2(quiet, 1)
    try:
        bounds = _confine(settings)
    except (OSError, KeyError, ValueError) as error:
        channel.send({"error": str(error)})
        return
    channel.send({"ready": True, "filter": bool(bounds.syscalls)})
    processes = Processes(alone=settings["isolation"] != "limits")
    work = settings["work"]
    signal.signal(signal.SIGCHLD, lambda *_: None)  # for its wake-up
    with contextlib.suppress(EOFError):
        while True:
            request = channel.receive()
            try:
                answer = _answer(request, work, bounds, processes, channel.source)
            except (OSError, ValueError) as error:
                answer = {"error": getattr(error, "strerror", None) or str(error)}
            channel.send(answer)
    processes.kill()
    os._exit(0)


def _leave(*_: object) -> None:
    raise EOFError("whoever uses the sandbox is gone")


class _Channel:
    def __init__(self, source: int, sink: int) -> None:
        self.source, self._sink = source, sink

    def receive(self) -> dict[str, Any]:
        length = int.from_bytes(self._exactly(4), "big")
        message: dict[str, Any] = json.loads(self._exactly(length))
        return message

    def _exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            more = os.read(self.source, min(size - len(data), 1 << 20))
            if not more:
                raise EOFError("whoever uses the sandbox is gone")
            data += more
        return bytes(data)

    def send(self, message: Mapping[str, Any]) -> None:
        data = json.dumps(message).encode()
        data = len(data).to_bytes(4, "big") + data
        try:
            while data:
                data = data[os.write(self._sink, data) :]
        except BrokenPipeError:
            raise EOFError("whoever uses the sandbox is gone") from None


def _confine(settings: Mapping[str, Any]) -> Bounds:
    """Give up what the sandbox must not have; return what its programs are held to.

    In namespaces of its own making this returns in a new process, while the old one waits for its
    end and then exits.
    """
    isolation, processes = settings["isolation"], settings["processes"]
    bounds = Bounds(
        memory=settings["memory"],
        processes=processes,
        disk=settings["disk"],
        syscalls=filter_for(os.uname().machine),
    )
    if isolation == "limits":
        signal.signal(signal.SIGTERM, _leave)
        kernel.die_with_parent(signal.SIGTERM)
        kernel.reap_orphans()
        user = distinct_user()
        if user is None and os.geteuid() == 0:
            raise OSError("code must not run as root, and there is no other user to become")
        if user is not None:
            os.chown(settings["work"], user, user)
            for path in (sys.executable, settings["work"]):
                _check_reach(user, path)
        bounds.user = user
        bounds.counted = (
            processes if user is not None else threads_of_this_user() + _HEADROOM + processes
        )
        return bounds
    release = os.uname().release
    if tuple(map(int, release.split("-")[0].split(".")[:2])) >= _OLDEST_KERNEL:
        # the supervisor and the process that waits for it are counted, too
        bounds.counted = processes + 2
    elif isolation == "namespaces":
        raise OSError(f"Linux {release} is too old, this takes 5.14")
    if isolation == "namespaces":
        enter_namespaces(settings["network"])
        kernel.die_with_parent(signal.SIGKILL)
        first = os.fork()
        if first:
            os.close(0)
            os.waitpid(first, 0)
            os._exit(0)
        build_view(settings["readable"], settings["disk"], settings["network"])
        kernel.bound_capabilities()
        if os.geteuid() != USER:
            os.setgroups([])
            os.setresgid(USER, USER, USER)
            os.setresuid(USER, USER, USER)
    kernel.drop_capabilities()
    kernel.forbid_new_privileges()
    kernel.hide_from_others()
    kernel.die_with_parent(signal.SIGKILL)
    return bounds


def _check_reach(user: int, path: str) -> None:
    """Whether a user may run this Python, which may lie in root's home, and enter a folder."""
    child = os.fork()
    if not child:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        os._exit(not os.access(path, os.X_OK))
    if os.waitpid(child, 0)[1]:
        raise OSError(
            f"code must not run as root, and no other user may reach {path}: have Python and "
            "temporary files (TMPDIR) where others may, or do not run as root"
        )


def _answer(
    request: Mapping[str, Any], work: str, bounds: Bounds, processes: Processes, parent: int
) -> dict[str, Any]:
    if request["do"] == "run":
        command = Command(
            request["command"],
            binascii.a2b_base64(request["stdin"]),
            request["variables"],
            os.path.join(work, request["folder"]),
            request["timeout_s"],
            request["most"],
        )
        outcome = execute(command, bounds, processes, parent)
        out, err = (
            binascii.b2a_base64(data, newline=False).decode()
            for data in (outcome.stdout, outcome.stderr)
        )
        return {
            "ended": outcome.ended,
            "code": outcome.code,
            "seconds": outcome.seconds,
            "stdout": out,
            "stderr": err,
        }
    if request["do"] == "write":
        for path, content in request["files"].items():
            _write(work, path.split("/"), binascii.a2b_base64(content), bounds.user)
        return {}
    data = _read(work, request["file"].split("/"), request["most"], bounds.user)
    return {"data": binascii.b2a_base64(data, newline=False).decode()}


# Files are opened folder by folder, and never through a link: code may have left links to anywhere.


@contextlib.contextmanager
def _folder(work: str, parts: Sequence[str], *, make: bool, owner: int | None) -> Iterator[int]:
    place = os.open(work, os.O_DIRECTORY)
    try:
        for part in parts:
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, 0o755, dir_fd=place)
                    if owner is not None:
                        os.chown(part, owner, owner, dir_fd=place, follow_symlinks=False)
            inner = os.open(part, os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=place)
            os.close(place)
            place = inner
        yield place
    finally:
        os.close(place)


def _write(work: str, parts: Sequence[str], content: bytes, owner: int | None) -> None:
    *folders, name = parts
    with _folder(work, folders, make=True, owner=owner) as place:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=place)
        opened = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644, dir_fd=place)
        with open(opened, "wb", buffering=0) as file:
            if owner is not None:
                os.fchown(opened, owner, owner)
            left = memoryview(content)
            while left:
                left = left[file.write(left) :]


def _read(work: str, parts: Sequence[str], most: int, owner: int | None) -> bytes:
    *folders, name = parts
    with _folder(work, folders, make=False, owner=None) as place:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
        with open(os.open(name, flags, dir_fd=place), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise OSError("not a file")
            if owner is not None and found.st_uid != owner:  # a hard link to what it may not read
                raise OSError("somebody else's file")
            if found.st_size > most:
                raise OSError(f"it has {found.st_size} bytes, more than {most}")
            return file.read(most)
