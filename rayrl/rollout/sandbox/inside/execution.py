"""One program under its limits, from its start to the end of all that it started."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import time
from collections.abc import Mapping, Sequence

from . import kernel
from .processes import Processes

__all__ = ["Bounds", "Command", "Outcome", "execute"]

_SHORTEST_S, _LONGEST_S = 0.01, 0.05  # between two looks at what the processes use
_OPEN_FILES = 256  # per process
_STACK = 64 << 20
_CHUNK = 1 << 16


class Command:
    """A program to run once.

    Args:
        arguments: the program, and what it is given.
        stdin: what it reads.
        variables: all of its environment.
        folder: where it runs.
        timeout_s: limit of its wall time.
        most: bytes of each of stdout and stderr.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        stdin: bytes,
        variables: Mapping[str, str],
        folder: str,
        timeout_s: float,
        most: int,
    ) -> None:
        self.arguments, self.stdin, self.variables = arguments, stdin, variables
        self.folder, self.timeout_s, self.most = folder, timeout_s, most


class Bounds:
    """What holds for every program of a sandbox.

    Args:
        memory: bytes of all processes together.
        processes: and threads.
        disk: bytes of a file.
        syscalls: filter of them, in BPF; empty for none.
    """

    counted: int | None = None  # limit on processes that the kernel keeps for this user, if it can
    user: int | None = None  # whom to become

    def __init__(self, memory: int, processes: int, disk: int, syscalls: bytes) -> None:
        self.memory, self.processes, self.disk, self.syscalls = memory, processes, disk, syscalls


class Outcome:
    """How a program ended: `exit` with a code, or the limit that it reached."""

    def __init__(
        self, ended: str, code: int | None, stdout: bytes, stderr: bytes, seconds: float
    ) -> None:
        self.ended, self.code, self.seconds = ended, code, seconds
        self.stdout, self.stderr = stdout, stderr


def execute(command: Command, bounds: Bounds, processes: Processes, parent: int) -> Outcome:
    """Run a program, then kill whatever it left.

    Args:
        bounds: further limits.
        processes: those of this sandbox.
        parent: file descriptor that becomes readable when nobody waits for the outcome.
    """
    ends = [os.pipe() for _ in range(3)]
    started = time.monotonic()
    pid = os.fork()
    if not pid:
        _become(command, [ends[0][0], ends[1][1], ends[2][1]], bounds)
    for end in (ends[0][0], ends[1][1], ends[2][1]):
        os.close(end)
    into, stdin = ends[0][1], command.stdin
    outputs = {ends[1][0]: bytearray(), ends[2][0]: bytearray()}
    for end in (into, *outputs):
        os.set_blocking(end, False)
    woken, wake = os.pipe()
    for end in (woken, wake):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    poller = select.poll()
    for end in (woken, parent, *outputs):
        poller.register(end, select.POLLIN)
    poller.register(into, select.POLLOUT)

    ended, code, open_ends = "", None, {into, *outputs}
    look_at, pause = started + _SHORTEST_S, _SHORTEST_S
    while True:
        code = _reap(pid)
        now = time.monotonic()
        if code is not None:
            ended = "exit"
        elif any(len(kept) > command.most for kept in outputs.values()):
            ended = "output"
        elif now >= started + command.timeout_s:
            ended = "timeout"
        elif now >= look_at:
            ended = processes.excess(bounds.processes, bounds.memory)
            pause = min(2 * pause, _LONGEST_S)
            look_at = now + pause
        if ended:
            break
        wait_s = min(look_at, started + command.timeout_s) - now
        for end, _ in poller.poll(max(1, 1000 * wait_s)):
            if end == parent:
                raise EOFError("nobody waits for this program")
            if end == woken:
                os.read(woken, _CHUNK)
            elif end == into:
                stdin = _feed(into, stdin)
            if (end == into and not stdin) or (end in outputs and not _fetch(end, outputs[end])):
                poller.unregister(end)
                os.close(end)
                open_ends.remove(end)
    seconds = time.monotonic() - started
    processes.kill()
    signal.set_wakeup_fd(-1)
    for end in open_ends & outputs.keys():
        while len(outputs[end]) <= command.most and _fetch(end, outputs[end]) > 0:
            pass
    for end in (woken, wake, *open_ends):
        os.close(end)
    if any(len(kept) > command.most for kept in outputs.values()):
        ended = "output"
    out, err = (bytes(kept[: command.most]) for kept in outputs.values())
    return Outcome(ended, code if ended == "exit" else None, out, err, seconds)


def _reap(pid: int) -> int | None:
    """Wait for who has ended; return the code of `pid` if it has, negative for a signal."""
    code = None
    with contextlib.suppress(ChildProcessError):
        while True:
            ended, status = os.waitpid(-1, os.WNOHANG)
            if not ended:
                break
            if ended == pid:
                code = os.waitstatus_to_exitcode(status)
    return code


def _feed(end: int, data: bytes) -> bytes:
    """Write what goes in; return what is left, nothing if nobody reads it."""
    try:
        return data[os.write(end, data[:_CHUNK]) :] if data else data
    except BlockingIOError:
        return data
    except OSError:
        return b""


def _fetch(end: int, kept: bytearray) -> int:
    """Read what there is; return how much, 0 at the end, -1 if nothing is there yet."""
    try:
        data = os.read(end, _CHUNK)
    except BlockingIOError:
        return -1
    kept += data
    return len(data)


def _become(command: Command, streams: Sequence[int], bounds: Bounds) -> None:
    """Replace this new process by the program. Does not return."""
    status, failing = 126, command.arguments[0]
    try:
        os.setsid()
        for place, stream in enumerate(streams):
            os.dup2(stream, place)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # which Python ignores
            signal.signal(number, signal.SIG_DFL)
        limits = {
            resource.RLIMIT_DATA: (bounds.memory, bounds.memory),
            resource.RLIMIT_STACK: (min(8 << 20, bounds.memory), min(_STACK, bounds.memory)),
            resource.RLIMIT_FSIZE: (bounds.disk, bounds.disk),
            resource.RLIMIT_NOFILE: (_OPEN_FILES, _OPEN_FILES),
            resource.RLIMIT_CORE: (0, 0),
            resource.RLIMIT_MEMLOCK: (0, 0),
            resource.RLIMIT_MSGQUEUE: (0, 0),
        }
        if bounds.counted is not None:
            limits[resource.RLIMIT_NPROC] = (bounds.counted, bounds.counted)
        for kind, (soft, hard) in limits.items():
            most = resource.getrlimit(kind)[1]
            if most != resource.RLIM_INFINITY:
                soft, hard = min(soft, most), min(hard, most)
            resource.setrlimit(kind, (soft, hard))
        if bounds.user is not None:
            os.setgroups([])
            os.setresgid(bounds.user, bounds.user, bounds.user)
            os.setresuid(bounds.user, bounds.user, bounds.user)
        failing = command.folder
        os.chdir(command.folder)
        failing = command.arguments[0]
        os.umask(0o022)
        kernel.die_with_parent(signal.SIGKILL)
        kernel.forbid_new_privileges()
        if bounds.syscalls:
            kernel.install_filter(bounds.syscalls)
        os.execvpe(command.arguments[0], list(command.arguments), command.variables)
    except BaseException as error:
        status = 127 if isinstance(error, FileNotFoundError | NotADirectoryError) else 126
        what = error.strerror if isinstance(error, OSError) else repr(error)
        os.write(2, f"sandbox: {failing}: {what}\n".encode(errors="replace"))
    finally:
        os._exit(status)
