"""The FastAPI app: OpenAI's routes over any engine."""

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
from rayrl.chat.requests import ApiError, parse_json
from rayrl.engine.protocol import Engine
from rayrl.errors import InfraError, did_you_mean
from rayrl.server.answers import AnswerFormat, ChatFormat, CompletionFormat, usage_object
from rayrl.server.errors import as_api_error
from rayrl.server.fields import (
    MAX_CHOICES,
    MAX_INT,
    Body,
    ChatBody,
    CompletionBody,
    parse,
)
from rayrl.server.generation import Job, generate, plan, stream
from rayrl.server.http import (
    CONTENT_TYPE,
    ClientDisconnected,
    EventStream,
    Metrics,
    MetricsMiddleware,
    error_response,
    metrics_page,
    read_body,
    run_until_disconnect,
)
from rayrl.server.messages import Prompt, check_prompt_length, read_chat

__all__ = ["Service", "key_digest", "make_app"]

LARGE_BODY = 16 << 10  # bytes; takes about 10 ms to tokenize
MAX_LARGE = 16  # large requests that are parsed or wait for it; each holds its body
DEFAULT_COMPLETION = 16  # max_tokens of /v1/completions, as in OpenAI's API

_log = logging.getLogger(__name__)


def key_digest(key: str) -> str:
    """Return the digest by which the server checks an API key."""
    return hashlib.sha256(key.encode()).hexdigest()


@dataclass
class Service:
    """The state behind the routes.

    Attributes:
        engine: an engine opened with `raw_logprobs`.
        chat: chat renderer of the same model.
        model: name of the model.
        digest: `key_digest` of the API key; empty: no key is required.
        max_live: maximum requests that generate at once; further ones are refused (503).
        scrape: returns the page of `/metrics`; None: this service's own metrics.
    """

    engine: Engine
    chat: Chat
    model: str
    digest: str = ""
    max_live: int = 256
    scrape: Callable[[], Awaitable[bytes]] | None = None
    metrics: Metrics = field(default_factory=Metrics)
    created: int = field(default_factory=lambda: int(time.time()))
    _large: int = 0  # large requests that are being parsed or wait for it
    _parser: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, "parser"), repr=False
    )

    def check_key(self, header: str) -> None:
        """Raise ApiError (401) unless the Authorization header has the key."""
        if not self.digest:
            return
        # the header's bytes, which are decoded as Latin-1: clients send keys in UTF-8
        header = header.encode("latin-1", "replace").decode(errors="replace")
        scheme, _, key = header.partition(" ")
        valid = hmac.compare_digest(key_digest(key.strip()), self.digest)
        if scheme.lower() != "bearer" or not valid:
            what = "Incorrect API key." if header else "No API key: send it as a bearer token."
            raise ApiError(401, what, code="invalid_api_key")

    def check_model(self, model: str) -> None:
        """Raise ApiError (404) unless this is the served model."""
        if model != self.model:
            near = did_you_mean(model, [self.model]) or f" This server has {self.model!r}."
            what = f"The model {model!r} does not exist.{near}"
            raise ApiError(404, what, param="model", code="model_not_found")

    @property
    def card(self) -> dict[str, Any]:
        """The model's object in `/v1/models`."""
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
        # a lower bound of the prompt's length, before parsing
        check_prompt_length(raw.count(b'"role"'), self.engine.max_len, "messages")
        body, job, shape = await self._parse(self._parse_chat, raw)
        return await self._answer(request, body, job, shape)

    def _parse_chat(self, raw: bytes) -> tuple[Body, Job, AnswerFormat]:
        body = parse(ChatBody, parse_json(raw))
        self.check_model(body.model)
        if body.top_logprobs is not None and not body.logprobs:
            what = "top_logprobs needs logprobs=true."
            raise ApiError(400, what, param="top_logprobs", code="invalid_value")
        limit = body.max_completion_tokens
        top_logprobs = (body.top_logprobs or 0) if body.logprobs else None
        job = plan(
            self.chat,
            self.engine,
            body,
            [read_chat(self.chat, body, self.engine.max_len)],
            max_tokens=body.max_tokens if limit is None else limit,
            top_logprobs=top_logprobs,
            param="messages",
        )
        return body, job, ChatFormat(self.chat, self.model, logprobs=top_logprobs is not None)

    async def completion(self, request: Request) -> Response:
        """Answer `/v1/completions`."""
        raw = await read_body(request)
        body, job, shape = await self._parse(self._parse_completion, raw)
        return await self._answer(request, body, job, shape)

    def _parse_completion(self, raw: bytes) -> tuple[Body, Job, AnswerFormat]:
        body = parse(CompletionBody, parse_json(raw))
        self.check_model(body.model)
        job = plan(
            self.chat,
            self.engine,
            body,
            [Prompt(ids) for ids in _prompts(self.chat, body.prompt, self.engine.max_len)],
            max_tokens=body.max_tokens or DEFAULT_COMPLETION,
            top_logprobs=body.logprobs,
            param="prompt",
        )
        shape = CompletionFormat(self.chat, self.model, logprobs=body.logprobs is not None)
        return body, job, shape

    async def _parse(
        self, parser: Callable[[bytes], tuple[Body, Job, AnswerFormat]], raw: bytes
    ) -> tuple[Body, Job, AnswerFormat]:
        """Parse a request; a large one in a thread, so that others are answered meanwhile.

        All large requests share one thread, so that they cannot occupy every core.
        """
        if len(raw) <= LARGE_BODY:
            return parser(raw)
        if self._large >= MAX_LARGE:
            raise _busy(f"{self._large} large requests wait to be parsed")
        self._large += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._parser, parser, raw)
        finally:
            self._large -= 1

    async def _answer(
        self, request: Request, body: Body, job: Job, shape: AnswerFormat
    ) -> Response:
        if self.metrics.live >= self.max_live:
            raise _busy(f"{self.max_live} requests are being answered")
        if body.stream:
            options = body.stream_options
            chunks = self._chunks(job, shape, bool(options and options.include_usage))
            try:
                first = await run_until_disconnect(request.receive, anext(chunks))
            except BaseException:
                await chunks.aclose()
                raise
            return EventStream(first, chunks)
        self.metrics.live += 1
        try:
            done = await run_until_disconnect(request.receive, generate(self.engine, job))
        finally:
            self.metrics.live -= 1
        usage = job.usage([choice for choice, _ in done])
        self.metrics.record_usage(usage)
        return JSONResponse(shape.answer([content for _, content in done], usage))

    async def _chunks(
        self, job: Job, shape: AnswerFormat, include_usage: bool
    ) -> AsyncGenerator[Mapping[str, Any], None]:
        choices = [job.choice() for _ in job.requests]
        started: set[int] = set()
        self.metrics.live += 1
        deltas = stream(self.engine, job, choices)
        try:
            async for index, delta in deltas:
                chunks = [] if index in started else shape.first_chunks(index)
                started.add(index)
                for chunk in [*chunks, *shape.chunks(index, delta)]:
                    yield {**chunk, "usage": None} if include_usage else chunk
            if include_usage:
                yield {**shape.chunk([]), "usage": usage_object(job.usage(choices))}
        finally:
            await deltas.aclose()
            self.metrics.live -= 1
            self.metrics.record_usage(job.usage(choices))


def make_app(service: Service) -> FastAPI:
    """Create the ASGI app of a service."""
    app = FastAPI(title="rayrl", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(MetricsMiddleware, metrics=service.metrics)

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
        what = f"{request.url.path} does not support {request.method}."
        return error_response(ApiError(405, what, code="method_not_allowed"))

    async def catch_errors(work: Awaitable[Response]) -> Response:
        try:
            return await work
        except (ApiError, ClientDisconnected):
            raise
        except Exception as error:
            api_error = as_api_error(error)
            if api_error.status >= 500:
                _log.exception("a request failed")
            return error_response(api_error)

    @app.get("/health")
    async def health() -> Response:
        try:
            await service.engine.check()
        except InfraError as error:
            return error_response(as_api_error(error))
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        if service.scrape is None:
            page = metrics_page([service.metrics.families()])
        else:
            page = await service.scrape()
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
        return await catch_errors(service.chat_completion(request))

    @app.post("/v1/completions", dependencies=[Depends(authorized)])
    async def completions(request: Request) -> Response:
        return await catch_errors(service.completion(request))

    return app


def _busy(why: str) -> ApiError:
    return ApiError(503, f"{why}, the maximum.", code="overloaded", retry_after=1)


def _prompts(chat: Chat, prompt: object, max_len: int) -> Sequence[tuple[int, ...]]:
    """Tokenize a prompt: a string, a list of strings, a list of ids or a list of such lists.

    Raises:
        ApiError: 400, the prompt has another type or is too long.
    """
    if isinstance(prompt, str) or _are_ids(prompt):
        prompt = [prompt]
    if isinstance(prompt, list) and prompt:
        if len(prompt) > MAX_CHOICES:
            what = f"{len(prompt)} prompts: at most {MAX_CHOICES} in all."
            raise ApiError(400, what, param="prompt", code="invalid_value")
        if all(isinstance(item, str) for item in prompt):
            fewest = max(chat.min_ids([item]) for item in prompt)
            check_prompt_length(fewest, max_len, "prompt")
            prompts = [chat.document(item) for item in prompt]
        elif all(_are_ids(item) for item in prompt):
            prompts = [tuple(item) for item in prompt]
            if (largest := max(map(max, prompts))) >= len(chat.tokenizer):
                what = f"prompt: {largest} is not one of the model's {len(chat.tokenizer)} ids."
                raise ApiError(400, what, param="prompt", code="invalid_value")
        else:
            prompts = [()]
        if all(prompts):
            return prompts
    what = "prompt must be a string, a list of strings, a list of ids or a list of such lists; "
    raise ApiError(400, f"{what}none may be empty.", param="prompt", code="invalid_value")


def _are_ids(value: object) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return all(type(item) is int and 0 <= item <= MAX_INT for item in value)
