"""How messages travel to an MCP server and back: over the pipes of a process, or by HTTP."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from typing import Any

import anyio
import httpx2
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.message import SessionMessage
from mcp.types.jsonrpc import jsonrpc_message_adapter

from rayrl.errors import EnvError, InfraError, clip
from rayrl.rollout.mcp.address import Address
from rayrl.rollout.programs.process import Process, start_process

__all__ = ["GRACE_S", "MAX_BYTES", "MAX_LINES", "Pipes", "http"]

GRACE_S = 2.0  # for a server to end by itself
MAX_BYTES, MAX_LINES = 16 << 20, 10_000  # that a server may write for one message from us
_KEPT = 4_000  # bytes of what it wrote last, for errors
_RETRIED = (408, 425, 429)  # HTTP statuses that may be another one later; so may 500 and above

Streams = tuple[
    MemoryObjectReceiveStream[SessionMessage | Exception], MemoryObjectSendStream[SessionMessage]
]


class Pipes:
    """The transport of a server that is a process of its own. Use `open` once."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._process: Process | None = None
        self._leaving = False
        self._bytes = self._lines = 0  # since the last message from us
        self._stderr = bytearray()
        self._no_message = b""  # a line on its stdout that is none
        self._stderr_ended = anyio.Event()

    @asynccontextmanager
    async def open(self) -> AsyncGenerator[Streams]:
        """Start the server; end it, or kill it, with everything that it has started."""
        variables = {**os.environ, **dict(self._address.variables)}
        process = self._process = await start_process(
            "MCP server", self._address.command, variables, self._address.cwd or None
        )
        try:
            to_us, incoming = anyio.create_memory_object_stream[SessionMessage | Exception]()
            outgoing, to_it = anyio.create_memory_object_stream[SessionMessage]()
            async with to_us, incoming, outgoing, to_it, anyio.create_task_group() as group:
                group.start_soon(self._receive, process, to_us)
                group.start_soon(self._send, process, to_it)
                group.start_soon(self._read_stderr, process)
                yield incoming, outgoing
                self._leaving = True
                process.stdin.close()
                with anyio.move_on_after(GRACE_S):
                    await process.exited.wait()
                group.cancel_scope.cancel()
        finally:
            self.kill()
            process.close()

    def kill(self) -> None:
        """Kill the server at once."""
        self._leaving = True
        if self._process is not None:
            self._process.kill()

    def last_words(self) -> str:
        """What it wrote last that is no message, for errors; empty if there is nothing."""
        text = bytes(self._stderr or self._no_message).decode(errors="replace").strip()
        return f": {clip(text, 2_000)}" if text else ""

    async def _receive(
        self, process: Process, to_us: MemoryObjectSendStream[SessionMessage | Exception]
    ) -> None:
        buffer = bytearray()
        while data := await process.stdout.read(1 << 16):
            self._bytes += len(data)
            self._lines += data.count(b"\n")
            if (self._bytes > MAX_BYTES or self._lines > MAX_LINES) and not self._leaving:
                raise EnvError(
                    f"{self._address} writes to its stdout without being asked, more than "
                    f"{MAX_BYTES >> 20} MiB or {MAX_LINES} lines{self.last_words()}"
                )
            searched = len(buffer)
            buffer += data
            if buffer.find(b"\n", searched) < 0:
                continue
            *lines, rest = bytes(buffer).split(b"\n")
            buffer = bytearray(rest)
            for line in lines:
                await self._deliver(line.strip(), to_us)
        if not self._leaving:
            raise EnvError(await self._why_it_ended(process))

    async def _deliver(
        self, line: bytes, to_us: MemoryObjectSendStream[SessionMessage | Exception]
    ) -> None:
        """Pass a message on; other text, as of a `print`, is no concern of the session."""
        try:
            message = jsonrpc_message_adapter.validate_json(line, by_name=False)
        except ValueError:
            self._no_message = line[:_KEPT] or self._no_message
            return
        with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):  # nobody listens
            await to_us.send(SessionMessage(message))

    async def _send(
        self, process: Process, to_it: MemoryObjectReceiveStream[SessionMessage]
    ) -> None:
        with suppress(ConnectionError):  # it has ended, which `_receive` tells
            async for message in to_it:
                self._bytes = self._lines = 0
                text = message.message.model_dump_json(by_alias=True, exclude_unset=True)
                process.stdin.write(text.encode() + b"\n")
                await process.stdin.drain()

    async def _read_stderr(self, process: Process) -> None:
        while data := await process.stderr.read(1 << 16):
            self._stderr = (self._stderr + data)[-_KEPT:]
        self._stderr_ended.set()

    async def _why_it_ended(self, process: Process) -> str:
        with anyio.move_on_after(GRACE_S):
            await process.exited.wait()
            await self._stderr_ended.wait()
        if process.code is None:
            return f"{self._address} closed its stdout{self.last_words()}"
        return f"{self._address} ended with status {process.code}{self.last_words()}"


@asynccontextmanager
async def http(address: Address) -> AsyncGenerator[Any]:
    """The transport of a server with a URL (streamable HTTP)."""

    async def check(response: httpx2.Response) -> None:
        """Raise for a status that is not about one call; otherwise the session would go on."""
        status, request = response.status_code, response.request
        if status < 400 or request.method != "POST":  # a server need not stream, or end sessions
            return
        what = f"{address}: HTTP status {status}"
        if status >= 500 or status in _RETRIED:
            raise InfraError(what)
        if status == 404 and "mcp-session-id" in request.headers:
            raise InfraError(f"{what}: it has lost the session")
        if not response.headers.get("content-type", "").startswith("application/json"):
            raise EnvError(what)

    async with (
        httpx2.AsyncClient(
            headers=dict(address.headers),
            timeout=httpx2.Timeout(30, read=None),  # calls have a limit of their own
            event_hooks={"response": [check]},
        ) as client,
        streamable_http_client(address.url, http_client=client) as streams,
    ):
        yield streams
