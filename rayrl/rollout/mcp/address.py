"""Where an MCP server is: a command to start it with, or a URL."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rayrl.errors import ConfigError, clip, safe_repr

__all__ = ["Address", "read_address"]

STDIO = "stdio:"


@dataclass(frozen=True, slots=True)
class Address:
    """How to reach a server, and how long to wait for it.

    Attributes:
        command: to start it with; empty if it has a URL.
        url: where it listens; empty if it is started.
        variables: environment variables beyond those of this process.
        cwd: folder that it runs in; empty: that of this process.
        headers: of every HTTP request.
        timeout_s: for its start, and for each of its answers; None: no limit.
    """

    command: tuple[str, ...] = ()
    url: str = ""
    variables: tuple[tuple[str, str], ...] = ()
    cwd: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    timeout_s: float | None = None

    def __str__(self) -> str:
        """Name the server, for errors."""
        words = self.url.partition("?")[0] or shlex.join(self.command)
        return f"MCP server {clip(words, 300)!r}"


def read_address(
    server: str | Sequence[str | os.PathLike[str]],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    headers: Mapping[str, str] | None = None,
    timeout_s: float | None = None,
) -> Address:
    """Read the arguments of `rayrl.mcp`.

    Raises:
        ConfigError: the server is neither a command nor a URL, or something does not go with it.
    """
    where = f"rayrl.mcp({safe_repr(server)})"
    if timeout_s is not None and not timeout_s > 0:
        raise ConfigError(f"{where}: timeout_s={timeout_s}: must be above 0")
    if isinstance(server, str) and server.startswith(("http://", "https://")):
        if env or cwd:
            raise ConfigError(
                f"{where}: env and cwd are for servers that are started, not for URLs"
            )
        return Address(url=server, headers=tuple((headers or {}).items()), timeout_s=timeout_s)
    if headers:
        raise ConfigError(f"{where}: headers are for servers with a URL; pass env= to a command")
    if isinstance(server, str):
        if not server.startswith(STDIO):
            raise ConfigError(
                f"{where}: write 'stdio:COMMAND', a list of words (the command and its arguments), "
                "or the URL of a server, 'http://…'"
            )
        try:
            words = shlex.split(server.removeprefix(STDIO))
        except ValueError as error:
            raise ConfigError(f"{where}: cannot be split into words: {error}") from None
    else:
        words = [os.fspath(word) for word in server]
    if not words:
        raise ConfigError(f"{where}: there is no command")
    variables = tuple((env or {}).items())
    return Address(tuple(words), "", variables, os.fspath(cwd or ""), (), timeout_s)
