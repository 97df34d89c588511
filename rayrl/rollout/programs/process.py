"""Processes that episodes start, and killing them with everything that they have started."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from rayrl.errors import EnvError

__all__ = ["TOKEN", "TOKEN_LENGTH", "Process", "start_process"]

TOKEN = "RAYRL_PROGRAM"  # environment variable of one process and what it starts
TOKEN_LENGTH = 32
# a process ends when the one that started it is killed
_WITH_PARENT = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []


class Process(asyncio.subprocess.SubprocessStreamProtocol):
    """A process with pipes; made by `start_process`.

    Attributes:
        exited: set when it has ended, even if what it started still has its pipes, which
            `asyncio.subprocess.Process.wait` would wait for.
        token: value of the environment variable `TOKEN` of this process and what it starts.
    """

    stdin: asyncio.StreamWriter
    stdout: asyncio.StreamReader
    stderr: asyncio.StreamReader

    def __init__(self, token: str) -> None:
        super().__init__(limit=1 << 16, loop=asyncio.get_running_loop())
        self.exited = asyncio.Event()
        self.transport: asyncio.SubprocessTransport
        self.token = token

    def process_exited(self) -> None:
        """Called by the event loop."""
        super().process_exited()
        self.exited.set()

    @property
    def code(self) -> int | None:
        """Exit status (negative: the signal that ended it); None while it runs."""
        return self.transport.get_returncode()

    def kill(self) -> None:
        """Kill its process group, and what has left that but still has its token."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.transport.get_pid(), signal.SIGKILL)
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(TOKEN) == self.token:
                    process.kill()

    def close(self) -> None:
        """Close its pipes."""
        self.transport.close()


async def start_process(
    what: str,
    command: Sequence[str | os.PathLike[str]],
    variables: Mapping[str, str],
    cwd: str | Path | None = None,
    *,
    stderr: bool = True,
    inherited: Sequence[int] = (),
) -> Process:
    """Start a process in a session of its own.

    Args:
        what: what it is, for errors.
        command: program and arguments.
        variables: its environment variables.
        cwd: folder that it runs in.
        stderr: whether it is read; else it goes nowhere.
        inherited: numbers of further files that it gets.

    Raises:
        EnvError: it cannot be started.
    """
    words = [os.fspath(word) for word in command]
    failed = f"{what} {words[0]!r} cannot be started"
    place = os.path.join(cwd or "", words[0]) if os.path.dirname(words[0]) else words[0]
    if shutil.which(place, path=variables.get("PATH")) is None:
        raise EnvError(f"{failed}: there is no such command")
    token = secrets.token_hex(TOKEN_LENGTH // 2)
    loop = asyncio.get_running_loop()
    starting = loop.create_task(
        loop.subprocess_exec(
            lambda: Process(token),
            *_WITH_PARENT,
            *words,
            env={**variables, TOKEN: token},
            cwd=cwd,
            stderr=asyncio.subprocess.PIPE if stderr else asyncio.subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=inherited,
        )
    )
    try:
        # If this were cancelled, asyncio could wait for ever for the end of a process whose pipes
        # are not there yet, and what the process may have started would go on.
        transport, process = await asyncio.shield(starting)
    except OSError as error:
        raise EnvError(f"{failed}: {error}") from error
    except asyncio.CancelledError:
        starting.add_done_callback(_kill_started)
        await asyncio.wait([starting])
        raise
    process.transport = transport
    return process


def _kill_started(starting: asyncio.Task[tuple[asyncio.SubprocessTransport, Process]]) -> None:
    if not starting.cancelled() and starting.exception() is None:
        transport, process = starting.result()
        process.transport = transport
        process.kill()
        process.close()
