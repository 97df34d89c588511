"""What an ASGI server needs besides routes: streams, and clients that hang up."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Coroutine, Mapping
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rayrl.server.errors import ApiError, as_api_error
from rayrl.server.metrics import Metrics
from rayrl.types import replace_surrogates

__all__ = [
    "ClientGone",
    "EventStream",
    "Measured",
    "error_response",
    "read_body",
    "unless_gone",
]

MAX_BODY = 32 << 20  # bytes
CLIENT_GONE = 499  # as nginx counts it; nobody receives it

T = TypeVar("T")


class ClientGone(Exception):
    """The client hung up."""


async def read_body(request: Request) -> bytes:
    """The body of a request.

    Raises:
        ApiError: 413, it is too long.
    """
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY:
            raise ApiError(413, f"The body is longer than {MAX_BODY} bytes.")
    return bytes(body)


def error_response(error: ApiError) -> Response:
    """An error object with its status."""
    return _json(error.body, error.status, error.headers)


def _json(data: Any, status: int, headers: Mapping[str, str]) -> Response:
    body = replace_surrogates(json.dumps(data, ensure_ascii=False))
    return Response(body, status, dict(headers), "application/json")


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do `work`; cancel it when the client hangs up, or we are cancelled, and wait for its end.

    Raises:
        ClientGone: it hung up.
    """
    task, gone = asyncio.create_task(work), asyncio.create_task(_hung_up(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events.

    It is not Starlette's StreamingResponse, which may notice that the client is gone only with the
    next piece, and leaves the closing of its generator to the garbage collector: the engine's work
    is to end at once.

    Args:
        first: the first piece, so that what fails before it has a status.
        rest: the others; closed in any case.
    """

    def __init__(
        self, first: Mapping[str, Any], rest: AsyncGenerator[Mapping[str, Any], None]
    ) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.raw_headers = [pair for pair in self.raw_headers if pair[0] != b"content-length"]
        self._first, self._rest = first, rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the end or until the client hangs up."""
        try:
            await unless_gone(receive, self._send(send))
        finally:
            await self._rest.aclose()

    async def _send(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        await send(_event(self._first))
        try:
            async for piece in self._rest:
                await send(_event(piece))
        except Exception as error:  # too late for a status
            last = _event(as_api_error(error).body)
        else:
            last = _body(b"data: [DONE]\n\n")
        # clients leave when they have read this, and are not to be counted as having hung up
        await send({**last, "more_body": False})


def _event(piece: Mapping[str, Any]) -> Message:
    return _body(f"data: {json.dumps(piece, ensure_ascii=False)}\n\n".encode())


def _body(data: bytes) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": True}


class Measured:
    """ASGI middleware that counts requests by route and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on and note how it ended."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), CLIENT_GONE
        ended = False

        async def noting(message: Message) -> None:
            nonlocal status, ended
            if message["type"] == "http.response.start":
                status = message["status"]
            elif not message.get("more_body", False):
                ended = True
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except ClientGone:
            ended = False
        finally:
            route = getattr(scope.get("route"), "path", "other")
            code = status if ended else CLIENT_GONE
            self._metrics.answered(route, code, time.perf_counter() - began)
