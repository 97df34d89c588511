"""Run programs that ask the model through an episode's endpoint."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from rayrl.errors import EnvError, clip

__all__ = [
    "MODEL",
    "TOKEN",
    "Endpoint",
    "Finished",
    "RunningProgram",
    "kill_program",
    "program",
]

MODEL = "policy"  # the name of the model for programs
TOKEN = "RAYRL_PROGRAM"  # environment variable of one program and what it starts
# a program ends when the process that runs it is killed
_WITH_PARENT = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
GRACE_S = 5.0  # for the end of its output to arrive
MAX_OUTPUT = 16 << 20  # bytes of each stream that are kept


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where an episode's programs find the model.

    Attributes:
        url: base URL of OpenAI's APIs, which ends with /v1.
        key: API key of this episode.
    """

    url: str
    key: str

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables that OpenAI's and Anthropic's libraries read."""
        beside = os.environ.get("NO_PROXY") or os.environ.get("no_proxy")
        no_proxy = f"{beside},127.0.0.1" if beside else "127.0.0.1"
        return {
            "OPENAI_BASE_URL": self.url,
            "OPENAI_API_KEY": self.key,
            "OPENAI_MODEL": MODEL,
            "OPENAI_AGENTS_DISABLE_TRACING": "1",
            "ANTHROPIC_BASE_URL": self.url.removesuffix("/v1"),
            "ANTHROPIC_API_KEY": self.key,
            "ANTHROPIC_MODEL": MODEL,
            "NO_PROXY": no_proxy,
            "no_proxy": no_proxy,
        }


@dataclass(frozen=True, slots=True)
class Finished:
    """What a program left.

    Attributes:
        stdout: what it wrote, at most 16 MiB.
        stderr: likewise.
        code: exit status; negative: the signal that ended it.
    """

    stdout: str
    stderr: str
    code: int


async def program(
    command: Sequence[str | os.PathLike[str]],
    at: Endpoint,
    *,
    stdin: str = "",
    timeout_s: float | None = None,
    cwd: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    check: bool = True,
) -> Finished:
    """Run a program with the endpoint in its environment, and wait for its end.

    However this ends (the program's end, the time limit, the episode's deadline), everything that
    the program started is killed with it.

    Args:
        command: program and arguments.
        at: where it finds the model; see `Endpoint.variables`.
        stdin: what it reads.
        timeout_s: for its run; None: the episode's deadline.
        cwd: folder that it runs in.
        env: further environment variables.
        check: raise if its exit status is not 0.

    Raises:
        EnvError: it cannot be started, takes longer, or fails; ends with what it wrote last.
    """
    if isinstance(command, str) or not command:
        raise EnvError(f"program({command!r}): pass a list, the program and its arguments")
    words = [os.fspath(word) for word in command]
    token = secrets.token_hex(16)
    variables = {**os.environ, **at.variables, **(env or {}), TOKEN: token}
    place = os.path.join(cwd or "", words[0]) if os.path.dirname(words[0]) else words[0]
    if shutil.which(place, path=variables.get("PATH")) is None:
        raise EnvError(f"program {words[0]!r} cannot be started: there is no such command")
    try:
        transport, running = await asyncio.get_running_loop().subprocess_exec(
            RunningProgram, *_WITH_PARENT, *words, env=variables, cwd=cwd, start_new_session=True
        )
    except OSError as error:
        raise EnvError(f"program {words[0]!r} cannot be started: {error}") from error
    kept = bytearray(), bytearray()
    streams = running.stdout, running.stderr
    talking = [asyncio.create_task(_read(*one)) for one in zip(streams, kept, strict=True)]
    talking.append(asyncio.create_task(_write(running.stdin, stdin.encode())))
    try:
        async with asyncio.timeout(timeout_s):
            await running.exited.wait()
    except TimeoutError:
        raise EnvError(f"program {words[0]!r} did not end within {timeout_s:g} s") from None
    finally:
        kill_program(transport.get_pid(), token)
        await asyncio.wait(talking, timeout=GRACE_S)
        for task in talking:
            task.cancel()
        await asyncio.gather(*talking, return_exceptions=True)
        transport.close()
    code = transport.get_returncode() or 0
    out, err = (data.decode(errors="replace") for data in kept)
    if check and code:
        last = clip(err.strip()[-2000:] or out.strip()[-2000:])
        raise EnvError(f"program {words[0]!r} ended with status {code}: {last}")
    return Finished(out, err, code)


async def _read(stream: asyncio.StreamReader, kept: bytearray) -> None:
    """Read to the end; what is beyond the limit is dropped, so that the program can go on."""
    while data := await stream.read(1 << 16):
        kept += data[: MAX_OUTPUT - len(kept)]


async def _write(stream: asyncio.StreamWriter, data: bytes) -> None:
    with contextlib.suppress(ConnectionError):  # it need not read
        stream.write(data)
        await stream.drain()
    stream.close()


class RunningProgram(asyncio.subprocess.SubprocessStreamProtocol):
    """Tells when the program has ended, which `Process.wait` does when its pipes are closed too."""

    stdin: asyncio.StreamWriter
    stdout: asyncio.StreamReader
    stderr: asyncio.StreamReader

    def __init__(self) -> None:
        super().__init__(limit=1 << 16, loop=asyncio.get_running_loop())
        self.exited = asyncio.Event()

    def process_exited(self) -> None:
        """Called by the event loop."""
        super().process_exited()
        self.exited.set()


def kill_program(pid: int, token: str) -> None:
    """Kill a program's process group, and what has left it but still has the program's token."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(TOKEN) == token:
                process.kill()
