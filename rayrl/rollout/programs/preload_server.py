"""Import libraries once, and fork the program of each episode from there.

`python preload_server.py SOCKET FOLDER MODULE...`, on the standard library alone, because it runs
in the programs' own Python. A connection to each `preload_client.py` arrives at the inherited
socket. The server ends when the other side of that is closed; a program when its client does, or
the server.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import marshal
import os
import runpy
import selectors
import signal
import socket
import sys
from collections.abc import Iterator

TOKEN = "RAYRL_PROGRAM"  # as in `process.py`
PR_SET_PDEATHSIG = 1

Request = tuple[list[str], dict[str, str], str]  # words after python, variables, folder


def serve(connections: socket.socket) -> Request:
    """Fork a process for each client, and return in these."""
    clients: dict[int, socket.socket] = {}  # by pid of what was forked for them
    wakes, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    events = selectors.DefaultSelector()
    events.register(wakes, selectors.EVENT_READ)
    events.register(connections, selectors.EVENT_READ)
    while True:
        ready = {key.fileobj for key, _ in events.select()}
        if wakes in ready:
            os.read(wakes, 1 << 16)
            for pid, code in _ended():
                if (client := clients.pop(pid, None)) is not None:
                    events.unregister(client)
                    with client, contextlib.suppress(OSError):
                        client.sendall(str(code).encode())
        for pid, client in [*clients.items()]:
            if client in ready:  # it was killed
                _kill(pid)
                events.unregister(client)
                clients.pop(pid).close()
        if connections not in ready:
            continue
        client = _accept(connections)
        try:
            request, files = _receive(client)
        except OSError:
            client.close()
            continue
        if pid := os.fork():
            for file in files:
                os.close(file)
            clients[pid] = client
            events.register(client, selectors.EVENT_READ)
            continue
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        _show(request[1].get(TOKEN, ""))
        with contextlib.suppress(Exception):  # only Linux has it
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        for file in (wakes, wake):
            os.close(file)
        for other in (connections, client, *clients.values()):
            other.close()
        events.close()
        return request


def _show(token: str) -> None:
    """Let this process, and what it forks, be found by its token.

    Others see the variables that a process was started with. This one's are the server's, which
    has a token of zeros, and are written over where they lie.
    """
    getenv = ctypes.CDLL(None).getenv
    getenv.restype = ctypes.c_void_p
    if (place := getenv(TOKEN.encode())) and len(token) == len(os.environ.get(TOKEN, "")):
        ctypes.memmove(place, token.encode(), len(token))


def _ended() -> Iterator[tuple[int, int]]:
    """Pid and exit status of each process that has ended."""
    with contextlib.suppress(ChildProcessError):
        while (waited := os.waitpid(-1, os.WNOHANG))[0]:
            yield waited[0], os.waitstatus_to_exitcode(waited[1])


def _kill(pid: int) -> None:
    """Kill a process that is not yet waited for, and its group, if it already has one."""
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)


def _accept(connections: socket.socket) -> socket.socket:
    _, files, *_ = socket.recv_fds(connections, 1, 1)
    if not files:
        os._exit(0)
    return socket.socket(fileno=files[0])


def _receive(client: socket.socket) -> tuple[Request, list[int]]:
    """What a client wants, and its stdin, stdout and stderr."""
    _, files, *_ = socket.recv_fds(client, 1, 3)
    with client.makefile("rb") as stream:
        length = stream.read(8)
        request = stream.read(int.from_bytes(length, "big"))
    if len(files) < 3 or not request:
        raise ConnectionError("the client has ended")
    return marshal.loads(request), files


def run(request: Request) -> None:
    """Be the program that was asked for."""
    (kind, *rest), variables, folder = request
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()  # Python's own generator does so by itself
    if kind == "-c":
        code, sys.argv, sys.path[0] = rest[0], ["-c", *rest[1:]], ""
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    elif kind == "-m":
        sys.argv, sys.path[0] = rest, folder
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = [kind, *rest], os.path.dirname(os.path.abspath(kind))
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    _, inherited, sys.path[0], *modules = sys.argv
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception as error:  # a program that needs it will say so itself
            print(f"preload: {name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    gc.collect()
    gc.freeze()  # a collection would write to what is shared
    run(serve(socket.socket(fileno=int(inherited))))
