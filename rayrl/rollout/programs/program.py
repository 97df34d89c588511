"""Run programs that ask the model through an episode's endpoint."""

from __future__ import annotations

import asyncio
import contextlib
import os
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rayrl.errors import EnvError, clip
from rayrl.rollout.programs.preload import fork_instead
from rayrl.rollout.programs.process import Process, start_process

__all__ = ["MODEL", "Endpoint", "Finished", "program"]

MODEL = "policy"  # the name of the model for programs
GRACE_S = 5.0  # for the end of its output to arrive
START_S = 5.0  # how long others wait for one that has neither asked nor ended
MAX_OUTPUT = 16 << 20  # bytes of each stream that are kept

_starts: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = (
    weakref.WeakKeyDictionary()
)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where an episode's programs find the model.

    Attributes:
        url: base URL of OpenAI's APIs, which ends with /v1.
        key: API key of this episode.
        asked: set when a request has arrived; None: nobody knows.
    """

    url: str
    key: str
    asked: asyncio.Event | None = field(default=None, repr=False, compare=False)

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
    preload: Sequence[str] = (),
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
        preload: modules of a Python program to import once for all episodes. One process of each
            env worker imports them, and the program is forked from it, so that it has them at
            once. They must not start threads nor read the endpoint's variables when imported.

    Raises:
        EnvError: it cannot be started, takes longer, or fails; ends with what it wrote last.
    """
    if isinstance(command, str) or not command:
        raise EnvError(f"program({command!r}): pass a list, the program and its arguments")
    variables = {**os.environ, **at.variables, **(env or {})}
    name = os.fspath(command[0])
    process, starting = await _start(command, variables, cwd, preload, at.asked)
    kept = bytearray(), bytearray()
    streams = process.stdout, process.stderr
    talking = [asyncio.create_task(_read(*one)) for one in zip(streams, kept, strict=True)]
    talking.append(asyncio.create_task(_write(process.stdin, stdin.encode())))
    try:
        async with asyncio.timeout(timeout_s):
            await process.exited.wait()
    except TimeoutError:
        raise EnvError(f"program {name!r} did not end within {timeout_s:g} s") from None
    finally:
        process.kill()
        await starting
        await asyncio.wait(talking, timeout=GRACE_S)
        for task in talking:
            task.cancel()
        await asyncio.gather(*talking, return_exceptions=True)
        process.close()
    code = process.code or 0
    out, err = (data.decode(errors="replace") for data in kept)
    if check and code:
        last = clip(err.strip()[-2000:] or out.strip()[-2000:])
        raise EnvError(f"program {name!r} ended with status {code}: {last}")
    return Finished(out, err, code)


async def _start(
    command: Sequence[str | os.PathLike[str]],
    variables: Mapping[str, str],
    cwd: str | Path | None,
    preload: Sequence[str],
    asked: asyncio.Event | None,
) -> tuple[Process, asyncio.Task[None]]:
    """Start a program when no more than a few others are starting.

    Programs are busy until they ask, importing libraries, and wait from then on. If hundreds began
    at once, no one would have the processor that the engine and this process need.

    Returns:
        The process, and what ends when the next one may start.
    """
    starts = _starts.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(os.cpu_count() or 1))
    await starts.acquire()
    try:
        if preload:
            words, connection = fork_instead([os.fspath(word) for word in command], preload, cwd)
            with connection:
                files = [connection.fileno()]
                process = await start_process("program", words, variables, cwd, inherited=files)
        else:
            process = await start_process("program", command, variables, cwd)
    except BaseException:
        starts.release()
        raise
    return process, asyncio.create_task(_release(starts, process.exited, asked))


async def _release(starts: asyncio.Semaphore, *events: asyncio.Event | None) -> None:
    """Let another program start at one of these events, at the latest after START_S."""
    waiting = [asyncio.create_task(event.wait()) for event in events if event is not None]
    await asyncio.wait(waiting, timeout=START_S, return_when=asyncio.FIRST_COMPLETED)
    for task in waiting:
        task.cancel()
    starts.release()


async def _read(stream: asyncio.StreamReader, kept: bytearray) -> None:
    """Read to the end; what is beyond the limit is dropped, so that the program can go on."""
    while data := await stream.read(1 << 16):
        kept += data[: MAX_OUTPUT - len(kept)]


async def _write(stream: asyncio.StreamWriter, data: bytes) -> None:
    with contextlib.suppress(ConnectionError):  # it need not read
        stream.write(data)
        await stream.drain()
    stream.close()
