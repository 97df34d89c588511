"""The routes, over any engine."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response

from rayrl.chat.renderer import Chat
from rayrl.engine.protocol import Engine
from rayrl.errors import InfraError, did_you_mean
from rayrl.server.answers import ChatAnswer, CompletionAnswer, Shape, usage_object
from rayrl.server.errors import ApiError, as_api_error
from rayrl.server.fields import (
    LARGEST_INT,
    MAX_CHOICES,
    Body,
    ChatBody,
    CompletionBody,
    parse,
    parse_json,
)
from rayrl.server.generation import Job, generate, plan, stream
from rayrl.server.http import (
    ClientGone,
    EventStream,
    Measured,
    error_response,
    read_body,
    unless_gone,
)
from rayrl.server.messages import Asked, check_room, read_chat
from rayrl.server.metrics import CONTENT_TYPE, Metrics, merged

__all__ = ["Service", "key_digest", "make_app"]

LARGE = 16 << 10  # bytes of a body that take some 10 ms to be tokenized
MOST_WAITING = 16  # of these: each holds its body
DEFAULT_COMPLETION = 16  # max_tokens of /v1/completions, as OpenAI has it

_log = logging.getLogger(__name__)


def key_digest(key: str) -> str:
    """What the server keeps of an API key."""
    return hashlib.sha256(key.encode()).hexdigest()


@dataclass
class Service:
    """What the routes work with.

    Attributes:
        engine: opened with `raw_logprobs`.
        chat: of the same model.
        model: its name.
        digest: `key_digest` of the API key; empty: no key is asked for.
        max_live: requests that may generate at once; one more is told to come back (503).
        scrape: the page of `/metrics`; this service's own figures, if it is None.
    """

    engine: Engine
    chat: Chat
    model: str
    digest: str = ""
    max_live: int = 256
    scrape: Callable[[], Awaitable[bytes]] | None = None
    metrics: Metrics = field(default_factory=Metrics)
    created: int = field(default_factory=lambda: int(time.time()))
    _waiting: int = 0  # large requests that are read, or wait for it
    _reader: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, "reader"), repr=False
    )

    def check_key(self, header: str) -> None:
        """Raise ApiError (401) unless the Authorization header has the key."""
        if not self.digest:
            return
        scheme, _, key = header.partition(" ")
        right = hmac.compare_digest(key_digest(key.strip()), self.digest)
        if scheme.lower() != "bearer" or not right:
            what = "Incorrect API key." if header else "No API key: send it as a bearer token."
            raise ApiError(401, what, code="invalid_api_key")

    def check_model(self, model: str) -> None:
        """Raise ApiError (404) unless this is the model that is here."""
        if model != self.model:
            near = did_you_mean(model, [self.model]) or f" There is {self.model!r}."
            what = f"The model {model!r} does not exist.{near}"
            raise ApiError(404, what, param="model", code="model_not_found")

    @property
    def card(self) -> dict[str, Any]:
        """The model, as `/v1/models` tells it."""
        return {
            "id": self.model,
            "object": "model",
            "created": self.created,
            "owned_by": "rayrl",
            "max_model_len": self.engine.max_len,
        }

    # ---- answering

    async def chat_completion(self, request: Request) -> Response:
        """Answer `/v1/chat/completions`."""
        raw = await read_body(request)
        check_room(raw.count(b'"role"'), self.engine.max_len, "messages")  # before it is parsed
        body, job, shape = await self._apart(len(raw), self._read_chat, raw)
        return await self._answer(request, body, job, shape)

    def _read_chat(self, raw: bytes) -> tuple[Body, Job, Shape]:
        body = parse(ChatBody, parse_json(raw))
        self.check_model(body.model)
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs=true.", param="top_logprobs")
        most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        asked = read_chat(self.chat, body, self.engine.max_len)
        top = (body.top_logprobs or 0) if body.logprobs else None
        job = plan(self.chat, self.engine, body, [asked], most=most, top=top, param="messages")
        return body, job, ChatAnswer(self.chat, self.model, logprobs=top is not None)

    async def completion(self, request: Request) -> Response:
        """Answer `/v1/completions`."""
        raw = await read_body(request)
        body, job, shape = await self._apart(len(raw), self._read_completion, raw)
        return await self._answer(request, body, job, shape)

    def _read_completion(self, raw: bytes) -> tuple[Body, Job, Shape]:
        body = parse(CompletionBody, parse_json(raw))
        self.check_model(body.model)
        asked = [Asked(ids) for ids in _prompts(self.chat, body.prompt, self.engine.max_len)]
        most = body.max_tokens or DEFAULT_COMPLETION
        job = plan(
            self.chat, self.engine, body, asked, most=most, top=body.logprobs, param="prompt"
        )
        shape = CompletionAnswer(self.chat, self.model, logprobs=body.logprobs is not None)
        return body, job, shape

    async def _apart(
        self, size: int, read: Callable[[bytes], tuple[Body, Job, Shape]], raw: bytes
    ) -> tuple[Body, Job, Shape]:
        """What a request asks for; one that takes long to read lets others be answered meanwhile.

        Large ones wait for each other in one thread, so that they cannot take every core.
        """
        if size <= LARGE:
            return read(raw)
        if self._waiting >= MOST_WAITING:
            raise _busy(f"{self._waiting} large requests wait to be read")
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._reader, read, raw)
        finally:
            self._waiting -= 1

    async def _answer(self, request: Request, body: Body, job: Job, shape: Shape) -> Response:
        if self.metrics.live >= self.max_live:
            raise _busy(f"{self.max_live} requests are being answered")
        if body.stream:
            options = body.stream_options
            chunks = self._chunks(job, shape, bool(options and options.include_usage))
            try:
                first = await unless_gone(request.receive, anext(chunks))
            except BaseException:
                await chunks.aclose()
                raise
            return EventStream(first, chunks)
        self.metrics.live += 1
        try:
            done = await unless_gone(request.receive, generate(self.engine, job))
        finally:
            self.metrics.live -= 1
        usage = job.usage([choice for choice, _ in done])
        self.metrics.used(usage)
        return JSONResponse(shape.whole([news for _, news in done], usage))

    async def _chunks(
        self, job: Job, shape: Shape, include_usage: bool
    ) -> AsyncGenerator[Mapping[str, Any], None]:
        choices = [job.choice() for _ in job.requests]
        begun: set[int] = set()
        self.metrics.live += 1
        news = stream(self.engine, job, choices)
        try:
            async for index, new in news:
                chunks = [] if index in begun else shape.begin(index)
                begun.add(index)
                for chunk in [*chunks, *shape.part(index, new)]:
                    yield {**chunk, "usage": None} if include_usage else chunk
            if include_usage:
                yield {**shape.chunk([]), "usage": usage_object(job.usage(choices))}
        finally:
            await news.aclose()
            self.metrics.live -= 1
            self.metrics.used(job.usage(choices))


def make_app(service: Service) -> FastAPI:
    """The ASGI app of a service."""
    app = FastAPI(title="rayrl", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Measured, metrics=service.metrics)

    def authorized(request: Request) -> None:
        service.check_key(request.headers.get("authorization", ""))

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(404)
    async def no_route(request: Request, _: Exception) -> Response:
        what = f"There is no {request.method} {request.url.path}."
        return error_response(ApiError(404, what, code="unknown_url"))

    @app.exception_handler(405)
    async def no_method(request: Request, _: Exception) -> Response:
        what = f"{request.url.path} does not take {request.method}."
        return error_response(ApiError(405, what, code="method_not_allowed"))

    async def answered(work: Awaitable[Response]) -> Response:
        try:
            return await work
        except (ApiError, ClientGone):
            raise
        except Exception as error:
            told = as_api_error(error)
            if told.status >= 500:
                _log.exception("a request failed")
            return error_response(told)

    @app.get("/health")
    async def health() -> Response:
        try:
            await service.engine.check()
        except InfraError as error:
            return error_response(as_api_error(error))
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        own = service.scrape is None
        page = merged([service.metrics.families()]) if own else await service.scrape()  # type: ignore[misc]
        return Response(page, media_type=CONTENT_TYPE)

    @app.get("/v1/models", dependencies=[Depends(authorized)])
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [service.card]})

    @app.get("/v1/models/{name:path}", dependencies=[Depends(authorized)])
    async def model(name: str) -> Response:
        service.check_model(name)
        return JSONResponse(service.card)

    @app.post("/v1/chat/completions", dependencies=[Depends(authorized)])
    async def chat_completions(request: Request) -> Response:
        return await answered(service.chat_completion(request))

    @app.post("/v1/completions", dependencies=[Depends(authorized)])
    async def completions(request: Request) -> Response:
        return await answered(service.completion(request))

    return app


def _busy(why: str) -> ApiError:
    return ApiError(503, f"{why}, as many as this server takes.", code="overloaded", retry_after=1)


def _prompts(chat: Chat, prompt: object, max_len: int) -> Sequence[tuple[int, ...]]:
    """A string, strings, ids or lists of ids.

    Raises:
        ApiError: 400, anything else, or what is too long to be tokenized at all.
    """
    if isinstance(prompt, str):
        prompt = [prompt]
    if isinstance(prompt, list) and prompt:
        if _are_ids(prompt):
            return [tuple(prompt)]
        if len(prompt) > MAX_CHOICES:
            what = f"{len(prompt)} prompts: at most {MAX_CHOICES} in all."
            raise ApiError(400, what, param="prompt", code="invalid_value")
        if all(isinstance(one, str) for one in prompt):
            check_room(max(chat.min_ids([one]) for one in prompt), max_len, "prompt")
            found = [chat.document(one) for one in prompt]
        elif all(_are_ids(one) for one in prompt):
            found = [tuple(one) for one in prompt]
        else:
            found = [()]
        if all(found):
            return found
    what = "prompt must be a string, a list of strings, a list of ids or a list of such lists; "
    raise ApiError(400, f"{what}none may be empty.", param="prompt", code="invalid_value")


def _are_ids(value: object) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return all(type(one) is int and 0 <= one <= LARGEST_INT for one in value)
