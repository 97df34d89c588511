"""The server that programs ask: one per event loop, a key per episode."""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
import json
import secrets
import weakref
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from aiohttp import web

from rayrl.chat.requests import ApiError, parse_json
from rayrl.errors import EnvError, describe_error
from rayrl.rollout.programs.dialects import DIALECTS, Asked, Dialect
from rayrl.rollout.programs.dialogue import Answer, Dialogue, Seat
from rayrl.rollout.programs.program import MODEL, Endpoint
from rayrl.types import Turn

__all__ = ["open_endpoint"]

MAX_BODY = 64 << 20  # bytes
READ_S = 60.0  # for the body of a request to arrive
MAX_LIVE = 256  # requests of an episode at once; each holds its body
REMEMBERED = 10_000  # episodes that have ended, whose requests are told so


@asynccontextmanager
async def open_endpoint(
    agent: Seat, *, own_limits: bool = False, own_temperature: bool = False
) -> AsyncGenerator[Endpoint]:
    """Let programs ask the model as `agent` until the block is left.

    Args:
        own_limits: requests' own `max_tokens` replace the run's.
        own_temperature: requests' own `temperature` replaces the run's.
    """
    server = await _Server.acquire()
    key = f"sk-{secrets.token_hex(24)}"
    episode = server.episodes[key] = _Episode(Dialogue(agent), own_limits, own_temperature)
    try:
        yield Endpoint(server.url, key, episode.asked)
    finally:
        del server.episodes[key]
        server.remember(key)
        await episode.close()
        await server.release()


@dataclass(slots=True, eq=False)
class _Episode:
    dialogue: Dialogue
    own_limits: bool
    own_temperature: bool
    answers: dict[bytes, asyncio.Task[Answer]] = field(default_factory=dict)  # by request
    live: set[asyncio.Task[Answer]] = field(default_factory=set)
    asked: asyncio.Event = field(default_factory=asyncio.Event)  # something
    error: str = ""
    closed: bool = False

    async def answer(self, asked: Asked, digest: bytes, retried: bool) -> Answer:
        """Answer a request; one that a client sends again gets the answer that there is."""
        if self.closed:  # while the request arrived
            raise _over()
        if self.error:
            raise ApiError(500, self.error)
        task = self.answers.get(digest) if retried else None
        if task is None:
            if len(self.live) >= MAX_LIVE:
                raise ApiError(429, f"{MAX_LIVE} requests of this episode are being answered.")
            work = self.dialogue.respond(
                asked.messages,
                asked.tools,
                max_tokens=asked.max_tokens if self.own_limits else None,
                temperature=asked.temperature if self.own_temperature else None,
            )
            task = self.answers[digest] = asyncio.create_task(self._run(work))
            self.live.add(task)
            task.add_done_callback(self.live.discard)
        return await asyncio.shield(task)  # the client may be gone: the turn is still taken

    async def _run(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        try:
            return await work
        except ApiError:
            raise
        except EnvError as error:
            raise ApiError(400, str(error)) from error
        except Exception as error:  # it ends the episode, whatever the program makes of it
            self.error = f"The episode has failed: {describe_error(error)}"
            raise ApiError(500, self.error) from error

    async def close(self) -> None:
        self.closed = True
        tasks = list(self.live)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, *self.answers.values(), return_exceptions=True)


class _Server:
    """Runs while some episode has an endpoint."""

    _of_loop: ClassVar[weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Server]] = (
        weakref.WeakKeyDictionary()
    )

    def __init__(self) -> None:
        self.url = ""
        self.episodes: dict[str, _Episode] = {}
        self._ended: OrderedDict[str, None] = OrderedDict()
        self._users = 0
        self._lock = asyncio.Lock()
        self._runner: web.AppRunner | None = None

    @classmethod
    async def acquire(cls) -> _Server:
        """The loop's server, started if necessary; `release` it."""
        server = cls._of_loop.setdefault(asyncio.get_running_loop(), cls())
        async with server._lock:
            if server._runner is None:
                # not in an episode's context, whose random generators are its own
                starting = asyncio.create_task(server._start(), context=contextvars.Context())
                server._runner, server.url = await starting
            server._users += 1
        return server

    async def release(self) -> None:
        """Stop the server unless it is used."""
        async with self._lock:
            self._users -= 1
            if not self._users and self._runner is not None:
                runner, self._runner = self._runner, None
                self._of_loop.pop(asyncio.get_running_loop(), None)
                await runner.cleanup()

    def remember(self, key: str) -> None:
        """Requests with this key come too late."""
        self._ended[key] = None
        if len(self._ended) > REMEMBERED:
            self._ended.popitem(last=False)

    async def _start(self) -> tuple[web.AppRunner, str]:
        app = web.Application(client_max_size=MAX_BODY)
        for dialect in DIALECTS:
            app.router.add_post(dialect.path, self._handler(dialect))
        app.router.add_get("/v1/models", self._models)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        return runner, f"http://{host}:{port}/v1"

    async def _models(self, request: web.Request) -> web.Response:
        model = {"id": MODEL, "object": "model", "created": 0, "owned_by": "rayrl"}
        return web.json_response({"object": "list", "data": [model]})

    def _handler(self, dialect: Dialect) -> Callable[[web.Request], Any]:
        async def handle(request: web.Request) -> web.StreamResponse:
            try:
                episode, asked, digest = await self._read(request, dialect)
                retried = int(request.headers.get("x-stainless-retry-count", 0)) > 0
                message = await episode.answer(asked, digest, retried)
            except Exception as caught:
                error = caught
                if not isinstance(error, ApiError):
                    error = ApiError(500, f"The endpoint failed: {describe_error(caught)}")
                body = dialect.error(error)
                # clients' libraries would otherwise repeat some of these for minutes
                headers = {"x-should-retry": "true" if error.status == 429 else "false"}
                return web.json_response(body, status=error.status, headers=headers)
            if not asked.stream:
                return web.json_response(dialect.answer(asked, message, message.turn))
            return await _send_events(request, dialect, asked, message, message.turn)

        return handle

    async def _read(self, request: web.Request, dialect: Dialect) -> tuple[_Episode, Asked, bytes]:
        # Anthropic's library sends a token of the user's beside the key, if there is one
        bearer = request.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        keys = [request.headers.get("x-api-key", ""), bearer]
        episode = next((self.episodes[key] for key in keys if key in self.episodes), None)
        if episode is None:
            if any(key in self._ended for key in keys):
                raise _over()
            raise ApiError(401, "Incorrect API key.", code="invalid_api_key")
        episode.asked.set()
        try:
            async with asyncio.timeout(READ_S):
                raw = await request.read()
        except TimeoutError:
            raise ApiError(408, f"The body did not arrive within {READ_S:g} s.") from None
        except web.HTTPRequestEntityTooLarge:
            raise ApiError(413, f"The body is longer than {MAX_BODY} bytes.") from None
        body = parse_json(raw)
        if not isinstance(body, dict):
            raise ApiError(400, "The body must be a JSON object.")
        digest = hashlib.blake2b(dialect.path.encode() + raw, digest_size=16).digest()
        return episode, dialect.read(body), digest


def _over() -> ApiError:
    return ApiError(409, "The episode of this key is over.", code="episode_over")


async def _send_events(
    request: web.Request, dialect: Dialect, asked: Asked, message: dict[str, Any], turn: Turn
) -> web.StreamResponse:
    headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
    response = web.StreamResponse(headers=headers)
    await response.prepare(request)
    lines = []
    named = False
    for name, data in dialect.events(asked, message, turn):
        named = bool(name)
        lines.append(f"event: {name}\n" if name else "")
        lines.append(f"data: {json.dumps(data)}\n\n")
    if not named:
        lines.append("data: [DONE]\n\n")
    await response.write("".join(lines).encode())
    await response.write_eof()
    return response
