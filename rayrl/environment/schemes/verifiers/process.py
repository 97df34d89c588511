"""The process that plays tasksets of verifiers' v1 interface; see `worker.py`.

There is one in each process of rayrl, for each interpreter and folder with tasksets. It ends with
that. It is started again if it was lost or had to be killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import queue
import socket
import subprocess
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayrl.errors import ConfigError, EnvError, InfraError

__all__ = ["Taskset", "TasksetProcess"]

CANCEL_S = 30.0  # for an episode that was cancelled to end: then the process is killed
EXIT_S = 15.0  # for the process to end what it has started

# The interpreter need not have what rayrl needs, so that its `__init__` must not run.
_BOOT = (
    "import sys, types; package = sys.modules['rayrl'] = types.ModuleType('rayrl'); "
    "package.__path__ = [sys.argv[1]]; "
    "from rayrl.environment.schemes.verifiers.worker import serve; "
    "serve(int(sys.argv[2]), *sys.argv[3:])"
)
_PACKAGE = str(Path(__file__).resolve().parents[3])


class TasksetProcess:
    """This process's end.

    Args:
        where: what it is for, as `KEY=VALUE`, for errors.
        python: the interpreter.
        folder: where the tasksets' files are; empty: their packages are installed.

    Raises:
        ConfigError: there is no such interpreter.
    """

    def __init__(self, where: str, python: Path, folder: str) -> None:
        self._python = python
        self._socket, theirs = socket.socketpair()
        path = f"{python.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"  # uv may be there
        with theirs:
            try:
                # -P: nothing is imported from where it happens to be started
                given = [_PACKAGE, str(theirs.fileno()), folder]
                self._process = subprocess.Popen(
                    [str(python), "-P", "-c", _BOOT, *given],
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,  # Ctrl-C is for the run, which ends it
                    env={**os.environ, "PATH": path},
                )
            except OSError as error:
                self._socket.close()
                raise ConfigError(
                    f"{where}: {python} cannot be started ({error.strerror}). Name a virtual "
                    "environment or the Python in it"
                ) from error
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._pending: dict[int, Future[dict[str, Any]]] = {}
        self._requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self.lost = ""  # how it ended
        self._threads = [
            threading.Thread(target=work, daemon=True, name="verifiers")
            for work in (self._write, self._read)
        ]
        for thread in self._threads:
            thread.start()

    def send(self, request: Mapping[str, Any]) -> tuple[int, Future[dict[str, Any]]]:
        """Send a request; return its number and what will be its answer.

        Raises:
            InfraError: the process has ended; also as the answer.
        """
        answer: Future[dict[str, Any]] = Future()
        number = next(self._numbers)
        with self._lock:
            if self.lost:
                raise InfraError(self.lost)
            self._pending[number] = answer
        self._post({**request, "number": number})
        return number, answer

    def cancel(self, number: int) -> None:
        """Cancel a request. If it does not end, code in it blocks all others: kill the process."""
        self._post({"number": number, "do": "cancel"})
        timer = threading.Timer(CANCEL_S, self._kill_for, (number,))
        timer.daemon = True
        timer.start()

    def close(self) -> None:
        """End the process and what it has started, and wait for that."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
        for thread in self._threads:
            thread.join()

    def _post(self, request: Mapping[str, Any]) -> None:
        self._requests.put(json.dumps(request).encode() + b"\n")

    def _write(self) -> None:
        with contextlib.suppress(OSError):  # the reader notices as well
            while request := self._requests.get():
                self._socket.sendall(request)

    def _read(self) -> None:
        with contextlib.suppress(OSError), self._socket.makefile("rb") as lines:
            for line in lines:
                answer = json.loads(line)
                self._settle(answer.pop("number"), answer)
        try:
            code = self._process.wait(EXIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._socket.close()
        how = f"status {code}" if code >= 0 else f"signal {-code}"
        with self._lock:
            self.lost = f"the process of {self._python} that plays tasksets ended ({how})"
            waiting = [*self._pending]
        self._requests.put(b"")  # ends the writer
        for number in waiting:
            self._settle(number, InfraError(self.lost))

    def _settle(self, number: int, answer: dict[str, Any] | InfraError) -> None:
        with self._lock:
            future = self._pending.pop(number)
        if future.set_running_or_notify_cancel():
            if isinstance(answer, InfraError):
                future.set_exception(answer)
            else:
                future.set_result(answer)

    def _kill_for(self, number: int) -> None:
        if number in self._pending:
            self._process.kill()


_processes: dict[tuple[int, Path, str], TasksetProcess] = {}
_making = threading.Lock()


@dataclass(frozen=True)
class Taskset:
    """A taskset in its process, which is started when it is needed.

    Attributes:
        where: that names it, as `KEY=VALUE`, for errors.
        python: the interpreter.
        name: as verifiers knows it; `ENV+NAME` with an environment.
        folder: where its file is; empty: its package is installed.
    """

    where: str
    python: Path
    name: str
    folder: str

    @property
    def process(self) -> TasksetProcess:
        """The process, started if necessary.

        Raises:
            ConfigError: there is no such interpreter.
        """
        key = os.getpid(), self.python, self.folder  # a forked process has its own
        with _making:
            if key not in _processes or _processes[key].lost:
                _processes[key] = TasksetProcess(self.where, self.python, self.folder)
            return _processes[key]

    def ask(self, do: str, args: Mapping[str, Any], **given: Any) -> dict[str, Any]:
        """Wait for an answer, whatever else this thread has to do.

        Raises:
            ConfigError: a setting is wrong.
            EnvError: code of the taskset raised.
            InfraError: the process ended.
        """
        request = {"do": do, "name": self.name, "args": args, "with": given}
        _, answer = self.process.send(request)
        return self._checked(answer.result())

    async def play(self, args: Mapping[str, Any], **given: Any) -> dict[str, Any]:
        """Play an episode. It is cancelled with this.

        Raises:
            ConfigError, EnvError, InfraError: as `ask`.
        """
        process = self.process
        request = {"do": "play", "name": self.name, "args": args, "with": given}
        number, answer = process.send(request)
        try:
            return self._checked(await asyncio.wrap_future(answer))
        except asyncio.CancelledError:
            process.cancel(number)
            raise

    def _checked(self, answer: dict[str, Any]) -> dict[str, Any]:
        if "config" in answer:
            raise ConfigError(f"{self.where}: {answer['config']}")
        if "failed" in answer:
            raise (InfraError if answer["infra"] else EnvError)(answer["failed"])
        return answer
