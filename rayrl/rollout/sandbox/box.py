"""Run code that a model wrote where it can harm nothing, and kill it with all that it starts."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, get_args

import psutil

from rayrl.errors import EnvError
from rayrl.rollout.programs.process import TOKEN, Process, start_process
from rayrl.rollout.sandbox.inside.namespaces import WORK
from rayrl.rollout.sandbox.protection import (
    Isolation,
    Protection,
    sandbox_protection,
    supervisor_command,
)

__all__ = ["Sandbox", "SandboxResult", "sandbox"]

Ended = Literal["exit", "timeout", "memory", "processes", "output", "killed"]

_START_S = 120.0  # for the supervisor's start, on a machine that is busy
_GRACE_S = 20.0  # for its answer after a time limit, and for its end
_LARGEST = 1 << 30  # bytes of a message that no limit bounds
_VARIABLES = {
    "LANG": "C.UTF-8",
    # the same program, the same output; and no thread for each core of the machine
    "PYTHONHASHSEED": "0",
    "PYTHONDONTWRITEBYTECODE": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


@dataclass(frozen=True, slots=True)
class SandboxResult:
    """How a program in a sandbox ended, and what it wrote.

    Attributes:
        ended: "exit": by itself; else the limit for which it was killed: "timeout", "memory",
            "processes", "output"; "killed": the sandbox was killed with it, by the kernel or, with
            limits alone, by the program.
        code: exit status, negative for a signal; 127: there is no such program; None if it did not
            end by itself.
        stdout: what it wrote, up to the limit; bytes that are not UTF-8 become U+FFFD.
        stderr: likewise.
        seconds: wall time.
    """

    ended: Ended
    code: int | None
    stdout: str
    stderr: str
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether it ended by itself with exit status 0, which it can do without doing its work."""
        return self.code == 0


class Sandbox:
    """A work folder and programs that run in it, one after the other.

    ```python
    async with rayrl.Sandbox(files={"main.py": code}) as box:
        result = await box.run(["python", "main.py"])
    ```

    Programs see the system's programs and this Python with its packages, read-only, and a work
    folder, /sandbox, which is kept between runs and is memory. When a program ends, all that it
    started is killed. When the `with` ends, in whatever way, all is gone.

    Args:
        files: contents by name, relative to the work folder.
        memory_mb: for all processes together; one process that asks for more is refused
            (`MemoryError`), several are killed.
        processes: processes and threads at once.
        disk_mb: for the work folder, /tmp and /dev/shm together, in addition to `memory_mb`.
        network: programs may use the machine's network. Without it, 127.0.0.1 is their own.
        readable: further folders and files that they see, read-only. If rayrl runs as root, code
            is another user, who must be allowed to read them.
        isolation: "full" or an error; "best": full where the machine offers it; "limits": limits
            of resources alone, on every machine. See `rayrl.sandbox_protection`.

    Attributes:
        protection: what holds the programs; from the start on.

    Raises:
        EnvError: on entering: the machine does not offer this isolation, or a value is wrong.
    """

    protection: Protection

    def __init__(
        self,
        *,
        files: Mapping[str, str | bytes] | None = None,
        memory_mb: int = 512,
        processes: int = 32,
        disk_mb: int = 64,
        network: bool = False,
        readable: Sequence[str | os.PathLike[str]] = (),
        isolation: Isolation = "full",
    ) -> None:
        for name, value, least in (
            ("memory_mb", memory_mb, 16),
            ("processes", processes, 1),
            ("disk_mb", disk_mb, 1),
        ):
            if value < least:
                raise EnvError(f"{name}={value}: at least {least}")
        for path in readable:
            if not os.path.isabs(path) or not os.path.exists(path) or os.fspath(path) == "/":
                raise EnvError(f"readable={os.fspath(path)!r}: an absolute path that exists, not /")
        self._files = dict(files or {})
        self._isolation: Isolation = isolation
        self._settings = {
            "memory": memory_mb << 20,
            "processes": processes,
            "disk": disk_mb << 20,
            "network": network,
            "readable": [os.path.normpath(path) for path in readable],
            "work": WORK,
        }
        self._supervisor: Process | None = None
        self._work: str | None = None  # a folder of this machine that is to be removed
        self._one_at_a_time = asyncio.Lock()

    async def __aenter__(self) -> Self:
        _check_names(self._files)
        self.protection = await asyncio.to_thread(sandbox_protection, self._isolation)
        if self.protection.kind == "limits":
            self._work = tempfile.mkdtemp(prefix="rayrl-sandbox-")
            self._settings["work"] = self._work
        try:
            # without the environment, which a program could read
            command = supervisor_command(self.protection.kind, self._settings)
            self._supervisor = await start_process("sandbox", command, {}, stderr=False)
            async with asyncio.timeout(_START_S):
                said = await self._receive(_LARGEST)
            if said is None or "error" in said:
                raise EnvError(f"the sandbox did not start: {(said or {}).get('error', 'killed')}")
            if self._files:
                await self.write(self._files)
        except TimeoutError:
            await self._end()
            raise EnvError(f"the sandbox did not start within {_START_S:g} s") from None
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._end()
        self._supervisor = None

    async def run(
        self,
        command: Sequence[str | os.PathLike[str]],
        *,
        stdin: str | bytes = "",
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        timeout_s: float = 10.0,
        output_kb: int = 1024,
    ) -> SandboxResult:
        """Run a program to its end, or to that of a limit.

        Args:
            command: program and arguments; `python` is this Python.
            stdin: what it reads.
            env: environment variables beside PATH, HOME and a few; none of this process's are
                passed on.
            cwd: where it runs, relative to the work folder.
            timeout_s: wall time.
            output_kb: of each of stdout and stderr; who writes more is killed.

        Raises:
            EnvError: an argument is wrong, or the sandbox has not been entered.
        """
        if isinstance(command, str) or not command:
            raise EnvError(f"run({command!r}): pass a list, the program and its arguments")
        if not 0 < timeout_s < 1e6:
            raise EnvError(f"timeout_s={timeout_s}: more than 0, and a number of seconds")
        if output_kb < 1:
            raise EnvError(f"output_kb={output_kb}: at least 1")
        if cwd:
            _check_names({cwd: b""})
        words = [os.fspath(word) for word in command]
        home = str(self._settings["work"])
        path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
        variables = {**_VARIABLES, "PATH": path, "HOME": home, **(env or {})}
        if self._work and self._supervisor is not None:
            variables |= {TOKEN: self._supervisor.token, "TMPDIR": home}
        for text in (*words, *variables, *variables.values()):
            _check_text(text)
        data = stdin.encode(errors="replace") if isinstance(stdin, str) else stdin
        request = {
            "do": "run",
            "command": words,
            "stdin": base64.b64encode(data).decode(),
            "variables": variables,
            "folder": cwd,
            "timeout_s": timeout_s,
            "most": output_kb << 10,
        }
        started = time.monotonic()
        with contextlib.suppress(TimeoutError, KeyError, TypeError, ValueError):
            answer = await self._ask(request, (output_kb << 10) * 4 + 4096, timeout_s + _GRACE_S)
            if answer is not None and "error" in answer:
                raise EnvError(f"program {words[0]!r} cannot be started: {answer['error']}")
            if answer is not None and answer["ended"] in get_args(Ended):
                out, err = (
                    base64.b64decode(answer[name]).decode(errors="replace")
                    for name in ("stdout", "stderr")
                )
                code, seconds = answer["code"], float(answer["seconds"])
                return SandboxResult(answer["ended"], code, out, err, seconds)
        await self._end()
        return SandboxResult("killed", None, "", "", time.monotonic() - started)

    async def write(self, files: Mapping[str, str | bytes]) -> None:
        """Write files into the work folder, in place of what has their names.

        Args:
            files: contents by name, relative to the work folder; folders are made.

        Raises:
            EnvError: a name leads out of the work folder, or the folder is full.
        """
        _check_names(files)
        contents = {
            name: content.encode(errors="replace") if isinstance(content, str) else content
            for name, content in files.items()
        }
        total, most = sum(map(len, contents.values())), int(str(self._settings["disk"]))
        if total > most:
            raise EnvError(f"files of {total} bytes: more than disk_mb={most >> 20}")
        encoded = {name: base64.b64encode(data).decode() for name, data in contents.items()}
        await self._do({"do": "write", "files": encoded}, "write", ", ".join(files))

    async def read(self, name: str, *, most_kb: int = 1024) -> bytes:
        """Return a file of the work folder. Links are not followed: code may have made them.

        Raises:
            EnvError: it does not exist, is no file, or is larger than `most_kb`.
        """
        _check_names({name: b""})
        request = {"do": "read", "file": name, "most": most_kb << 10}
        answer = await self._do(request, "read", name, (most_kb << 10) * 2 + 4096)
        try:
            return base64.b64decode(answer["data"])
        except (KeyError, TypeError, ValueError):
            raise EnvError(f"sandbox: cannot read {name}") from None

    async def _do(
        self, request: dict[str, Any], verb: str, what: str, most: int = _LARGEST
    ) -> dict[str, Any]:
        try:
            answer = await self._ask(request, most, _START_S)
        except (TimeoutError, ValueError):
            answer = None
        if answer is None:
            await self._end()
            raise EnvError(f"sandbox: cannot {verb} {what}: it was killed")
        if "error" in answer:
            raise EnvError(f"sandbox: cannot {verb} {what}: {answer['error']}")
        return answer

    async def _ask(
        self, request: dict[str, Any], most: int, timeout_s: float
    ) -> dict[str, Any] | None:
        """Send a request; None if the supervisor is gone. Cancelled, it takes the sandbox along."""
        async with self._one_at_a_time:
            if self._supervisor is None:
                raise EnvError("this sandbox is not open: use it inside `async with`")
            stream = self._supervisor.stdin
            if stream.is_closing():
                return None
            data = json.dumps(request).encode()
            try:
                async with asyncio.timeout(timeout_s):
                    with contextlib.suppress(ConnectionError):
                        stream.write(len(data).to_bytes(4, "big") + data)
                        await stream.drain()
                    return await self._receive(most)
            except BaseException:
                await self._end()
                raise

    async def _receive(self, most: int) -> dict[str, Any] | None:
        """The next answer; None if there will be none. What it says is the supervisor's word."""
        assert self._supervisor is not None
        stream = self._supervisor.stdout
        try:
            length = int.from_bytes(await stream.readexactly(4), "big")
            if length > most:
                return None
            answer = json.loads(await stream.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        return answer if isinstance(answer, dict) else None

    async def _end(self) -> None:
        """Kill everything. The supervisor does it when its input ends."""
        try:
            if self._supervisor is not None:
                self._supervisor.stdin.close()
                await asyncio.wait_for(self._supervisor.exited.wait(), _GRACE_S)
        except TimeoutError:
            pass
        finally:
            if self._supervisor is not None:
                if self.protection.kind == "limits" and self._supervisor.code != 0:
                    _kill_descendants(self._supervisor.transport.get_pid())
                    self._supervisor.kill()
                self._supervisor.close()  # kills it
            if self._work:
                _remove(self._work)


async def sandbox(
    command: Sequence[str | os.PathLike[str]],
    *,
    files: Mapping[str, str | bytes] | None = None,
    stdin: str | bytes = "",
    env: Mapping[str, str] | None = None,
    timeout_s: float = 10.0,
    output_kb: int = 1024,
    memory_mb: int = 512,
    processes: int = 32,
    disk_mb: int = 64,
    network: bool = False,
    readable: Sequence[str | os.PathLike[str]] = (),
    isolation: Isolation = "full",
) -> SandboxResult:
    """Run one program in a `Sandbox` of its own. Arguments are those of `Sandbox` and its `run`.

    Raises:
        EnvError: the machine does not offer this isolation, or an argument is wrong.
    """
    async with Sandbox(
        files=files,
        memory_mb=memory_mb,
        processes=processes,
        disk_mb=disk_mb,
        network=network,
        readable=readable,
        isolation=isolation,
    ) as box:
        return await box.run(
            command, stdin=stdin, env=env, timeout_s=timeout_s, output_kb=output_kb
        )


def _kill_descendants(pid: int) -> None:
    """What a supervisor left that was stopped; what has lost its parent is known by its token."""
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                process.kill()


def _remove(work: str) -> None:
    """Remove a work folder in which code may have made folders that cannot be entered."""
    for folder, names, _ in os.walk(work):
        for path in (os.path.join(folder, name) for name in names):
            with contextlib.suppress(OSError):
                if not os.path.islink(path):
                    os.chmod(path, 0o700)
    shutil.rmtree(work, ignore_errors=True)


def _check_names(files: Mapping[str, str | bytes]) -> None:
    for name in files:
        _check_text(name)
        parts = name.split("/")
        if not name or ".." in parts or "" in parts or "." in parts:
            raise EnvError(f"file {name[:200]!r}: a name relative to the work folder, without ..")
        if max(len(part.encode()) for part in parts) > 255 or len(name.encode()) > 3000:
            raise EnvError(f"file {name[:200]!r}…: the name is too long")


def _check_text(text: str) -> None:
    """What the kernel takes as a name, an argument or a variable."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise EnvError(f"{text[:200]!r}: has a lone surrogate") from None
    if "\0" in text:
        raise EnvError(f"{text[:200]!r}: has a null character")
