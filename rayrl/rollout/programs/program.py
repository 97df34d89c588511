"""Run programs that ask the model through an episode's endpoint."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rayrl.errors import EnvError, clip
from rayrl.rollout.programs.process import start_process

__all__ = ["MODEL", "Endpoint", "Finished", "program"]

MODEL = "policy"  # the name of the model for programs
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
    variables = {**os.environ, **at.variables, **(env or {})}
    process = await start_process("program", command, variables, cwd)
    name = os.fspath(command[0])
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


async def _read(stream: asyncio.StreamReader, kept: bytearray) -> None:
    """Read to the end; what is beyond the limit is dropped, so that the program can go on."""
    while data := await stream.read(1 << 16):
        kept += data[: MAX_OUTPUT - len(kept)]


async def _write(stream: asyncio.StreamWriter, data: bytes) -> None:
    with contextlib.suppress(ConnectionError):  # it need not read
        stream.write(data)
        await stream.drain()
    stream.close()
