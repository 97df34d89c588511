"""The tools of MCP servers, as tools of agents."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from rayrl.chat.tools import Tool, ToolError
from rayrl.environment.signature import suggestion
from rayrl.errors import ConfigError, EnvError, InfraError, clip
from rayrl.rollout.mcp.address import Address, read_address
from rayrl.types import replace_surrogates

if TYPE_CHECKING:
    from mcp import types

    from rayrl.rollout.mcp.session import Session

__all__ = ["McpTools", "mcp"]

_FORBIDDEN = re.compile(r"[^A-Za-z0-9_.-]")  # in a name: servers and protocols of models refuse it


class McpTools(Sequence[Tool]):
    """The tools of a server, to be passed to an agent: `await agent(prompt, tools=tools)`."""

    def __init__(self, tools: Sequence[Tool]) -> None:
        self._tools = tuple(tools)

    def __len__(self) -> int:
        return len(self._tools)

    @overload
    def __getitem__(self, index: int) -> Tool: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Tool]: ...

    def __getitem__(self, index: int | slice) -> Tool | Sequence[Tool]:
        return self._tools[index]

    async def call(self, name: str, /, **arguments: Any) -> str:
        """Call a tool as the environment, without the model: to set something up, or to score.

        Args:
            name: of the tool, with the prefix.

        Raises:
            EnvError: there is no such tool, the arguments do not fit, or it fails.
            InfraError: the server cannot be reached.
        """
        by_name = {tool.name: tool for tool in self._tools}
        if name not in by_name:
            raise EnvError(f"there is no tool {name!r}.{suggestion(name, list(by_name))}")
        try:
            result: str = await by_name[name](**arguments)
        except (TypeError, ToolError) as error:
            raise EnvError(f"tool {name!r}: {error}") from error
        return result


@asynccontextmanager
async def mcp(
    server: str | Sequence[str | os.PathLike[str]],
    *,
    prefix: str = "",
    shared: bool = False,
    timeout_s: float | None = 60.0,
    max_chars: int = 20_000,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    headers: Mapping[str, str] | None = None,
) -> AsyncGenerator[McpTools]:
    """Use the tools of an MCP server: `async with rayrl.mcp("stdio:server --flag") as tools:`.

    However the block is left, a server that was started is ended with everything that it started.

    Args:
        server: `stdio:COMMAND` or a list of words, for a server that is started and talks over its
            stdin and stdout; or the URL of one that listens (streamable HTTP).
        prefix: put before the tools' names.
        shared: use one session for all episodes of an env worker, for servers without state.
            Otherwise each block has its own.
        timeout_s: for the server's start and for each of its answers; None: the episode's deadline.
        max_chars: longest result; what is beyond is cut out of its middle.
        env: further environment variables of a server that is started.
        cwd: folder that it runs in.
        headers: of HTTP requests, as for authentication.

    Raises:
        ConfigError: an argument is wrong, or `mcp` is not installed.
        EnvError: the server cannot be started, or does not speak MCP.
        InfraError: it cannot be reached.
    """
    address = read_address(server, env=env, cwd=cwd, headers=headers, timeout_s=timeout_s)
    if max_chars < 100:
        raise ConfigError(f"rayrl.mcp(max_chars={max_chars}): must be 100 or more")
    if importlib.util.find_spec("mcp_types") is None:  # which comes with version 2
        raise ConfigError("rayrl.mcp() needs mcp, version 2 or newer: pip install 'rayrl[mcp]'")
    from rayrl.rollout.mcp.session import own_session, shared_session

    async with (shared_session if shared else own_session)(address) as session:
        yield McpTools([_tool(session, tool, address, prefix, max_chars) for tool in session.tools])


def _tool(
    session: Session, tool: types.Tool, address: Address, prefix: str, max_chars: int
) -> Tool:
    try:
        return Tool.from_schema(
            prefix + _FORBIDDEN.sub("_", tool.name),
            tool.description or tool.title or "",
            tool.input_schema,
            functools.partial(_call, session, tool.name, max_chars),
            fatal=(EnvError, InfraError),
        )
    except ConfigError as error:
        raise EnvError(f"{address}: {error}") from error


async def _call(session: Session, name: str, max_chars: int, /, **arguments: Any) -> str:
    result = await session.call(name, replace_surrogates(arguments))
    text = replace_surrogates(clip(_text(result), max_chars))
    if result.is_error:
        raise ToolError(text or "it failed")
    return text


def _text(result: types.CallToolResult) -> str:
    """Return a result as text: images and the like in words, data as JSON if there is no text."""
    parts = [_part(block) for block in result.content]
    if result.structured_content is not None and all(b.type != "text" for b in result.content):
        parts.insert(0, json.dumps(result.structured_content, ensure_ascii=False))
    return "\n".join(parts)


def _part(block: types.ContentBlock) -> str:
    if block.type == "text":
        return block.text
    if block.type == "resource_link":
        return f"[{block.name}: {block.uri}]"
    if block.type == "resource":
        resource = block.resource
        text = getattr(resource, "text", None)
        if text is not None:
            return str(text)
        kind = resource.mime_type or "data"
        return f"[{kind}, {_size(getattr(resource, 'blob', ''))}: {resource.uri}]"
    return f"[{block.type}, {block.mime_type}, {_size(block.data)}]"


def _size(base64: str) -> str:
    count = len(base64) * 3 // 4 - base64[-2:].count("=")
    return f"{count:,} bytes"
