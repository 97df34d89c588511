"""Fork a local Ray's Python processes from one that has imported what they need.

Every worker of Ray is a new Python, and importing torch, transformers and Serve takes each of them
seconds of CPU time and hundreds of MiB. Here one process imports them, and the raylet's command for
a worker (`fork_worker.py`) has it fork instead. Workers share its memory until they write to it.

Ray's log monitor and the agents of its node are forked likewise, by a child of that process that
has only their imports: Ray waits for its agents as it starts, and not long.

Run as a script by `ForkServer`, it is that process. Where runs are short and many, as in tests,
even this one may be forked: from a server that was started like any other, and whose socket the
variable `RAYRL_WARM_SERVER` names.
"""

from __future__ import annotations

import array
import ctypes
import gc
import importlib
import json
import os
import pkgutil
import resource
import runpy
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

__all__ = ["VARIABLE", "ForkServer"]

VARIABLE = "RAYRL_FORK_SERVER"  # of the raylet's environment: the server's socket
WARM = "RAYRL_WARM_SERVER"
PATIENCE_S = 20.0  # how long a worker waits for the imports; Ray gives it 60 s in all
AGENTS = (
    "ray._private.log_monitor",
    "ray._private.runtime_env.agent.runtime_env_agent",
    "ray.dashboard.agent",
)
AGENTS_PACKAGE = "ray.dashboard.modules"  # all that is in it
NO_JOB = "ffffffff"  # in Ray's notation
PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15
AGENT_SERVER = "agent-server"  # as `ps` shows it
SETUP_ARGUMENTS = ("--serialized-runtime-env-context=", "--language=")  # of Ray's setup_worker.py


class ForkServer:
    """The server of one local Ray. It ends with its driver, or the raylet, in whatever way.

    Args:
        folder: for its socket, to which only this user may connect.
        modules: what it imports.
        variables: environment variables that replace the driver's while it does.
    """

    def __init__(self, folder: Path, modules: Sequence[str], variables: Mapping[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"fork-{secrets.token_hex(4)}"
        self.agents_path = Path(_agents_path(str(self.path)))
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(self.path), json.dumps(sys.path), *modules],
            env={**os.environ, **variables},
            stdin=subprocess.PIPE,  # whose end is the driver's
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            process_group=0,
        )

    def stop(self) -> None:
        """End the server, and with it the workers that are left."""
        with self._process:  # closes the pipe
            self._process.kill()
        self.path.unlink(missing_ok=True)
        self.agents_path.unlink(missing_ok=True)


class _Server:
    """Listens while it imports; what arrives waits for that, but not for too long."""

    def __init__(self, path: str, modules: Sequence[str], ends: Sequence[int]) -> None:
        self._path, self._modules = path, [*modules]
        self._is_forked = len(ends) > 1  # then the second is its own server
        self._own = _surroundings()  # before the imports, which change some
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        self._listener.bind(path)
        os.umask(before)
        self._listener.listen(512)
        self._events = selectors.DefaultSelector()
        self._events.register(self._listener, selectors.EVENT_READ)
        for file in ends:  # of pipes and sockets: with one of them, this process ends
            self._events.register(file, selectors.EVENT_READ)
        self._has_raylet = False
        self._waiting: list[socket.socket] = []
        self._since = 0.0  # when the first of them came

    def close(self) -> None:
        """Leave the socket to the process that was forked, or that forked this one."""
        self._events.close()
        self._listener.close()

    def next_process(self) -> dict[str, Any]:
        """In a forked process, return what is wanted of it; in this one never."""
        while True:
            if self._modules:
                self._import()
            for key, _ in self._events.select(0 if self._modules or self._waiting else None):
                if key.fileobj is not self._listener:  # the driver or the raylet has ended
                    Path(self._path).unlink(missing_ok=True)
                    os._exit(0)
                if not self._waiting:
                    self._since = time.monotonic()
                self._waiting.append(self._listener.accept()[0])
            if not self._modules or time.monotonic() - self._since > PATIENCE_S:
                while self._waiting:
                    if (request := self._fork(self._waiting.pop(0))) is not None:
                        return request

    def _import(self) -> None:
        with suppress(Exception):  # the worker that needs it will say so
            importlib.import_module(self._modules.pop(0))
        if not self._modules:
            gc.collect()
            gc.freeze()  # a collection would write to what is shared

    def _fork(self, client: socket.socket) -> dict[str, Any] | None:
        with client:
            request = _read(client)
            if request is None or request.get("surroundings", self._own) != self._own:
                return None
            kind = request["kind"]
            if kind == "worker" and not self._has_raylet:
                raylet = os.pidfd_open(int(request["environment"]["RAY_RAYLET_PID"]))
                self._events.register(raylet, selectors.EVENT_READ)
                self._has_raylet = True
            if os.fork():
                for file in request["files"]:
                    os.close(file)
                return None
            os.setpgid(0, request["process_group"])
            client.sendall(b"\0")
            if kind != "worker":  # its client waits for its end
                request["client"] = os.dup(client.fileno())
            # a worker's Ray, as imported, watches the server that this one may be from
            if kind == "agent" or (kind == "worker" and self._is_forked):
                _end_with_parent()
        for key in [*self._events.get_map().values()]:
            if key.fd and key.fileobj is not self._listener:
                os.close(key.fd)
        self.close()
        for other in self._waiting:
            other.close()
        return request


def _read(client: socket.socket) -> dict[str, Any] | None:
    """What a client wants, and its files; None: it has ended meanwhile."""
    _, ancillary, *_ = client.recvmsg(1, socket.CMSG_SPACE(3 * 4))
    with client.makefile("rb") as lines:
        line = lines.readline()
    if not ancillary or not line.endswith(b"\n"):
        return None
    files = array.array("i")
    files.frombytes(ancillary[0][2])
    return {**json.loads(line), "files": list(files)}


def _surroundings() -> list[Any]:
    """What a forked process has from the server, and cannot be given."""
    # what imports read, and PYTHONPATH, where there may be a sitecustomize.py
    variables = ("OMP_", "MKL_", "TOKENIZERS_", "HF_", "TRANSFORMERS_", "TORCH_", "PYTHONPATH")
    return [
        next((place for place in sys.path if Path(place, "rayrl/__init__.py").exists()), ""),
        {key: value for key, value in os.environ.items() if key.startswith(variables)},
        sorted(os.readlink(link) for link in Path("/proc/self/ns").iterdir()),
        [[*resource.getrlimit(limit)] for limit in (resource.RLIMIT_AS, resource.RLIMIT_NOFILE)],
    ]


def _fork_warm(path: str) -> None:
    """Have a warm server fork this one, and end when its driver ends; return if it refuses."""
    request = {
        "kind": "server",
        "arguments": sys.argv,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "process_group": 0,
        "surroundings": _surroundings(),
    }
    files = array.array("i", [0, 1, 2])
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.connect(path)
        server.sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
        server.sendall(json.dumps(request).encode() + b"\n")
        if server.recv(1) == b"\0":
            server.recv(1)  # it sees the driver's end too, and removes its socket first
            os._exit(0)


def _take(request: Mapping[str, Any]) -> None:
    """Give this process the files, the folder and the environment of another."""
    for number, file in enumerate(request["files"]):
        os.dup2(file, number)
        os.close(file)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])


def _agents_path(path: str) -> str:
    """The socket that agents are asked for at, beside a server's own."""
    return f"{path}-agents"


def _import_agents() -> None:
    with suppress(Exception):  # the agent that needs it will say so
        for name in AGENTS:
            importlib.import_module(name)
        package = importlib.import_module(AGENTS_PACKAGE)
        for found in pkgutil.walk_packages(package.__path__, f"{AGENTS_PACKAGE}."):
            importlib.import_module(found.name)


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _serve(path: str, modules: Sequence[str], *ends: int) -> dict[str, Any]:
    """In a forked process, return what is wanted of it."""
    # Ray reads these once, when it is imported. A worker can be given its job later, and ends when
    # this process has ended, which ends with the raylet.
    os.environ |= {"RAY_JOB_ID": NO_JOB, "RAY_RAYLET_PID": str(os.getpid())}
    agents, server = _Server(_agents_path(path), (), ends), _Server(path, modules, ends)
    ids_apart_from_rays()
    _import_agents()
    if os.fork() == 0:
        _end_with_parent()
        ctypes.CDLL(None).prctl(PR_SET_NAME, AGENT_SERVER.encode())
        server.close()
        return agents.next_process()
    agents.close()
    request = server.next_process()
    if request["kind"] != "server":
        return request
    _take(request)
    _, path, folders, *modules = request["arguments"]
    sys.path[:] = json.loads(folders)
    return _serve(path, modules, 0, request["client"])


def _become(request: Mapping[str, Any]) -> None:
    """Make this process the one that Ray would have started."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(request["oom_score"])
    _take(request)
    if request["kind"] == "agent":
        os.environ["RAY_RAYLET_PID"] = str(os.getppid())  # whose child it wants to be
    from ray._raylet import Config  # type: ignore[attr-defined]

    Config.initialize("")  # reads the environment again
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()  # Python's own generator does so by itself
    sys.argv = [one for one in request["arguments"] if not one.startswith(SETUP_ARGUMENTS)]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")


def ids_apart_from_rays() -> None:
    """Let decorated actor classes, of which Serve has some, draw their ids from the system.

    The first id that a process draws of Ray seeds the generator of all its ids. Processes that are
    forked later would share it, and give two objects one id.
    """
    import ray.actor

    class ClassId(ray.ActorClassID):  # type: ignore[misc]
        @classmethod
        def from_random(cls) -> ray.ActorClassID:
            return ray.ActorClassID(os.urandom(ray.ActorClassID.size()))

    vars(ray.actor)["ActorClassID"] = ClassId


if __name__ == "__main__":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for workers
    _, own_path, folders, *own_modules = sys.argv
    sys.path[:] = json.loads(folders)
    if warm := os.environ.get(WARM):
        with suppress(OSError):
            _fork_warm(warm)
    _become(_serve(own_path, own_modules, 0))
