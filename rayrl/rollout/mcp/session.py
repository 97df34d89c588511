"""Sessions with MCP servers, one for an episode or one for all episodes of an event loop."""

from __future__ import annotations

import asyncio
import contextvars
import weakref
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, TypeVar

import httpx2
from mcp import Client, MCPError, types

from rayrl.chat.tools import ToolError
from rayrl.errors import EnvError, InfraError, clip, describe_error
from rayrl.rollout.mcp.address import Address
from rayrl.rollout.mcp.transports import GRACE_S, Pipes, http

__all__ = ["Session", "own_session", "shared_session"]

MAX_PAGES = 100  # of the list of a server's tools
LINGER_S = 60.0  # a shared session that no episode uses is kept for so long
T = TypeVar("T")


class Session:
    """A connection to a server. The task that opens it also closes it, as anyio demands.

    Args:
        address: of the server.
        shared: whether several episodes use it. Then its failures may be due to another episode,
            so that they count as failures of the infrastructure.

    Attributes:
        tools: that the server has listed.
    """

    def __init__(self, address: Address, shared: bool = False) -> None:
        self.tools: list[types.Tool] = []
        self._address = address
        self._shared = shared
        self._pipes = None if address.url else Pipes(address)
        self._opened = asyncio.get_running_loop().create_future()
        self._closing = asyncio.Event()
        self._failure: Exception | None = None
        self._calls: set[asyncio.Task[Any]] = set()
        # not in an episode's context, whose random generators are its own
        self._owner = asyncio.create_task(self._run(), context=contextvars.Context())
        self._owner.add_done_callback(lambda task: task.cancelled() or task.exception())

    @property
    def over(self) -> bool:
        """Whether it can no longer be used."""
        return self._failure is not None or self._closing.is_set() or self._owner.done()

    async def opened(self) -> None:
        """Wait until the server has listed its tools.

        Raises:
            EnvError, InfraError: it cannot be started or reached, or does not speak MCP.
        """
        await self._wait(self._opened, "did not list its tools")

    async def call(self, name: str, arguments: dict[str, Any]) -> types.CallToolResult:
        """Call a tool and wait for its result.

        Raises:
            ToolError: the server refuses the call.
            EnvError, InfraError: the server has ended, is late, or cannot be reached.
        """
        if self.over:
            raise self._failure or EnvError(f"{self._address}: its session is over")
        work = self._client.call_tool(name, arguments)
        task = asyncio.create_task(work, context=contextvars.Context())
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
        try:
            return await self._wait(task, f"did not answer a call of {name!r}")
        except MCPError as error:
            raise ToolError(error.message) from error
        except RuntimeError as error:  # the result does not fit the tool's own schema
            raise ToolError(clip(str(error))) from error
        except ValueError as error:  # the result is none
            self._failure = self._failed(error, "")
            raise self._failure from error
        finally:
            task.cancel()

    async def close(self, graceful: bool = True) -> None:
        """End the session, and the server if it was started.

        Args:
            graceful: give the server time to end by itself.
        """
        self._closing.set()
        if not graceful:
            if self._pipes is not None:
                self._pipes.kill()
            self._owner.cancel()
        try:
            await asyncio.wait({self._owner}, timeout=2 * GRACE_S if graceful else GRACE_S / 2)
        finally:
            self._owner.cancel()
            for task in self._calls:
                task.cancel()
        await asyncio.wait({self._owner, *self._calls}, timeout=GRACE_S / 2)

    async def _run(self) -> None:
        transport: AbstractAsyncContextManager[Any]
        transport = http(self._address) if self._pipes is None else self._pipes.open()
        # "legacy": newer versions of the protocol have no sessions, so that a server which several
        # episodes reach by HTTP could not tell their states apart
        async with Client(transport, mode="legacy", cache=None) as client:
            cursor = None
            for _ in range(MAX_PAGES):
                page = await client.list_tools(cursor=cursor)
                self.tools += page.tools
                cursor = page.next_cursor
                if cursor is None:
                    break
            else:
                raise EnvError(f"{self._address}: its list of tools does not end")
            self._client = client
            self._opened.set_result(None)
            await self._closing.wait()

    async def _wait(self, future: asyncio.Future[T], late: str) -> T:
        """Return the result of a future; raise if the session ends first, or it takes too long."""
        timeout_s = self._address.timeout_s
        ends: set[asyncio.Future[Any]] = {future, self._owner}
        await asyncio.wait(ends, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if future.done() and not future.cancelled():  # cancelled: as the session was closed
            error = future.exception()
            closed = isinstance(error, MCPError) and error.code == types.CONNECTION_CLOSED
            if not closed:
                return future.result()
            await asyncio.wait({self._owner}, timeout=2 * GRACE_S)  # it knows why
        if self._failure is None:
            if self._owner.done():
                cause = None if self._owner.cancelled() else self._owner.exception()
                self._failure = self._failed(_first(cause), late)
            elif future.done():
                self._failure = self._failed(None, "closed the connection")
            else:
                self._failure = self._failed(None, f"{late} within {timeout_s:g} s")
        raise self._failure

    def _failed(self, cause: BaseException | None, what: str) -> Exception:
        """Return the error for an end of the session."""
        words = self._pipes.last_words() if self._pipes is not None else ""
        kind: type[Exception] = EnvError
        if isinstance(cause, EnvError | InfraError):
            kind, message = type(cause), str(cause)
        elif isinstance(cause, httpx2.HTTPError | OSError):
            kind, message = InfraError, f"{self._address}: {describe_error(cause)}"
        elif isinstance(cause, MCPError):
            message = f"{self._address} refuses the session: {clip(cause.message)}{words}"
        elif cause is not None:
            message = f"{self._address} does not speak MCP: {describe_error(cause)}{words}"
        else:
            message = f"{self._address} {what}{words}"
            kind = EnvError if self._pipes is not None else InfraError
        if self._shared and kind is EnvError:
            kind = InfraError
        error = kind(message)
        error.__cause__ = cause
        return error


def _first(error: BaseException | None) -> BaseException | None:
    """Return the first error of a group, which task groups raise."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


@asynccontextmanager
async def own_session(address: Address) -> AsyncGenerator[Session]:
    """Open a session for one episode."""
    session = Session(address)
    graceful = False
    try:
        await session.opened()
        yield session
        graceful = not session.over
    finally:
        await session.close(graceful)


class _Shared:
    """A session that several episodes use, and how many do."""

    def __init__(self, address: Address) -> None:
        self.session = Session(address, shared=True)
        self.users = 0


_of_loop: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[Address, _Shared]] = (
    weakref.WeakKeyDictionary()
)


@asynccontextmanager
async def shared_session(address: Address) -> AsyncGenerator[Session]:
    """Use the event loop's session with a server, opened if there is none or it has failed."""
    loop = asyncio.get_running_loop()
    sessions = _of_loop.setdefault(loop, {})
    shared = sessions.get(address)
    if shared is None or shared.session.over:
        shared = sessions[address] = _Shared(address)
    shared.users += 1
    try:
        await shared.session.opened()
        yield shared.session
    finally:
        shared.users -= 1
        if shared.session.over:
            await shared.session.close(graceful=False)
        elif not shared.users:
            loop.call_later(LINGER_S, _close_unused, sessions, address, shared)


_closing: set[asyncio.Task[None]] = set()


def _close_unused(sessions: dict[Address, _Shared], address: Address, shared: _Shared) -> None:
    if not shared.users and not shared.session.over:
        if sessions.get(address) is shared:
            del sessions[address]
        task = asyncio.create_task(shared.session.close())
        _closing.add(task)  # the event loop alone would let it be garbage-collected
        task.add_done_callback(_closing.discard)
