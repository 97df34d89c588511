"""The routes, over any engine."""

from __future__ import annotations

import hashlib
import hmac
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response

from rayrl.chat import Chat
from rayrl.engine.protocol import Engine
from rayrl.errors import InfraError, did_you_mean
from rayrl.openai.answers import ChatAnswer, CompletionAnswer, Shape, usage_object
from rayrl.openai.errors import ApiError, as_api_error
from rayrl.openai.fields import LARGEST_INT, Body, ChatBody, CompletionBody, parse
from rayrl.openai.generation import Job, generate, plan, stream
from rayrl.openai.http import (
    ClientGone,
    EventStream,
    Measured,
    error_response,
    read_json,
    unless_gone,
)
from rayrl.openai.messages import Asked, read_chat
from rayrl.openai.metrics import CONTENT_TYPE, Metrics, merged

__all__ = ["Service", "key_digest", "make_app"]

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
        body = parse(ChatBody, await read_json(request))
        self.check_model(body.model)
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs=true.", param="top_logprobs")
        most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        asked = read_chat(self.chat, body)
        top = (body.top_logprobs or 0) if body.logprobs else None
        job = plan(self.chat, self.engine, body, [asked], most=most, top=top, param="messages")
        shape = ChatAnswer(self.chat, self.model, logprobs=top is not None)
        return await self._answer(request, body, job, shape)

    async def completion(self, request: Request) -> Response:
        """Answer `/v1/completions`."""
        body = parse(CompletionBody, await read_json(request))
        self.check_model(body.model)
        asked = [Asked(ids) for ids in _prompts(self.chat, body.prompt)]
        most = body.max_tokens or DEFAULT_COMPLETION
        job = plan(
            self.chat, self.engine, body, asked, most=most, top=body.logprobs, param="prompt"
        )
        shape = CompletionAnswer(self.chat, self.model, logprobs=body.logprobs is not None)
        return await self._answer(request, body, job, shape)

    async def _answer(self, request: Request, body: Body, job: Job, shape: Shape) -> Response:
        if self.metrics.live >= self.max_live:
            what = f"{self.max_live} requests are being answered, as many as this server takes."
            raise ApiError(503, what, code="overloaded", retry_after=1)
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


def _prompts(chat: Chat, prompt: object) -> Sequence[tuple[int, ...]]:
    """A string, strings, ids or lists of ids.

    Raises:
        ApiError: 400, anything else.
    """
    if isinstance(prompt, str):
        prompt = [prompt]
    if isinstance(prompt, list) and prompt:
        if _are_ids(prompt):
            return [tuple(prompt)]
        if all(isinstance(one, str) for one in prompt):
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
