"""HTTP besides the routes: bodies, event streams, disconnects, and Prometheus metrics."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Coroutine, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rayrl.chat.requests import ApiError
from rayrl.server.errors import as_api_error
from rayrl.server.generation import Usage
from rayrl.types import replace_surrogates

__all__ = [
    "CONTENT_TYPE",
    "ClientDisconnected",
    "EventStream",
    "Metrics",
    "MetricsMiddleware",
    "error_response",
    "metrics_page",
    "read_body",
    "run_until_disconnect",
]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
MAX_BODY = 32 << 20  # bytes
DISCONNECTED = 499  # nginx's status for metrics; never sent
T = TypeVar("T")


class Metrics:
    """Metrics of one server.

    Attributes:
        live: number of requests being generated.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.live = 0
        self._requests = Counter(
            "rayrl_requests",
            "Requests by route and HTTP status; 499 if the client disconnected.",
            ("route", "status"),
            registry=self._registry,
        )
        self._seconds = Histogram(
            "rayrl_request_seconds",
            "Seconds from a request to the last byte of its response.",
            ("route",),
            buckets=SECONDS,
            registry=self._registry,
        )
        live = Gauge("rayrl_in_flight", "Requests being generated.", registry=self._registry)
        live.set_function(lambda: self.live)
        self._tokens = {
            name: Counter(f"rayrl_{name}_tokens", what, registry=self._registry)
            for name, what in (
                ("prompt", "Prompt tokens."),
                ("completion", "Completion tokens."),
                ("cached", "Prompt tokens that were not recomputed."),
            )
        }

    def record_request(self, route: str, status: int, seconds: float) -> None:
        """Record a finished request."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def record_usage(self, usage: Usage) -> None:
        """Record the usage of a request, including one that was disconnected."""
        self._tokens["prompt"].inc(usage.prompt)
        self._tokens["completion"].inc(usage.completion)
        self._tokens["cached"].inc(usage.cached)

    def families(self, **labels: str) -> list[Metric]:
        """Return all metrics, picklable, with the given labels on every sample."""
        families: list[Metric] = []
        for family in self._registry.collect():
            copy = Metric(family.name, family.documentation, family.type, family.unit)
            for sample in family.samples:
                if not sample.name.endswith("_created"):  # a series per metric that nobody needs
                    copy.add_sample(sample.name, {**sample.labels, **labels}, sample.value)
            families.append(copy)
        return families


def metrics_page(parts: Iterable[Sequence[Metric]]) -> bytes:
    """Format the families of several servers as one page of Prometheus' text format."""
    families: dict[str, Metric] = {}
    for part in parts:
        for family in part:
            if family.name in families:
                families[family.name].samples += family.samples
            else:
                families[family.name] = family
    return generate_latest(_Families(families.values()))


class _Families(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Any]:
        return iter(self._families)


class ClientDisconnected(Exception):
    """The client disconnected."""


async def read_body(request: Request) -> bytes:
    """Read the body of a request.

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
    """Create the response for an error."""
    body = replace_surrogates(json.dumps(error.body, ensure_ascii=False))
    return Response(body, error.status, error.headers, "application/json")


async def run_until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Run `work`; cancel it and wait for its end if the client disconnects or this is cancelled.

    Raises:
        ClientDisconnected: the client disconnected first.
    """
    task = asyncio.create_task(work)
    disconnect = asyncio.create_task(_wait_for_disconnect(receive))
    try:
        await asyncio.wait({task, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnected
        return task.result()
    finally:
        task.cancel()
        disconnect.cancel()
        await asyncio.gather(task, disconnect, return_exceptions=True)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events.

    Unlike Starlette's StreamingResponse, it notices a disconnect immediately instead of with the
    next event, and closes its generator instead of leaving that to the garbage collector, so that
    the engine stops at once.

    Args:
        first: the first event, generated before the response so that errors get a status.
        rest: the other events; always closed.
    """

    def __init__(
        self, first: Mapping[str, Any], rest: AsyncGenerator[Mapping[str, Any], None]
    ) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.raw_headers = [pair for pair in self.raw_headers if pair[0] != b"content-length"]
        self._first, self._rest = first, rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the end or until the client disconnects."""
        try:
            await run_until_disconnect(receive, self._send(send))
        finally:
            await self._rest.aclose()

    async def _send(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        await send(_event(self._first))
        try:
            async for event in self._rest:
                await send(_event(event))
        except Exception as error:  # too late for a status
            last = _event(as_api_error(error).body)
        else:
            last = _body(b"data: [DONE]\n\n")
        # clients disconnect after reading this, which must not count as a disconnect
        await send({**last, "more_body": False})


def _event(data: Mapping[str, Any]) -> Message:
    return _body(f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode())


def _body(data: bytes) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": True}


class MetricsMiddleware:
    """ASGI middleware that counts requests by route and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request and record its status and duration."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), DISCONNECTED
        ended = False

        async def observe(message: Message) -> None:
            nonlocal status, ended
            if message["type"] == "http.response.start":
                status = message["status"]
            elif not message.get("more_body", False):
                ended = True
            await send(message)

        try:
            await self._app(scope, receive, observe)
        except ClientDisconnected:
            ended = False
        finally:
            route = getattr(scope.get("route"), "path", "other")
            code = status if ended else DISCONNECTED
            self._metrics.record_request(route, code, time.perf_counter() - began)
