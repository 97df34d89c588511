"""A player for remote models behind an OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rayrl.chat.tools import (
    CALL_MARKS,
    as_user_messages,
    close_open_mark,
    format_call,
    without_calls,
)
from rayrl.config import EndpointConfig
from rayrl.errors import ConfigError, InfraError, Refused, RunFailed
from rayrl.rollout.agent import Options
from rayrl.rollout.conversation import Conversation
from rayrl.rollout.rate_limit import MAX_PAUSE_S, RateLimiter, retry_after
from rayrl.rollout.refusals import Refusal, conversation_refused, read_refusal, setup_refused
from rayrl.terminal import visible
from rayrl.types import Finish, Message, Sampling, Turn, Usage

if TYPE_CHECKING:
    import httpx

__all__ = ["EndpointPlayer", "check_reachable", "split_limits"]

_RETRIED = (408, 409, 425, 429)  # and all 5xx
_PROBE_S = 5.0  # timeout of a probe
_PROBES = 2
_OLD_LIMIT, _NEW_LIMIT = "max_tokens", "max_completion_tokens"
_HARMLESS = [{"role": "user", "content": "Hello!"}]  # messages that no server refuses
# finish reasons of various servers
_CUT = ("length", "max_tokens", "max_output_tokens", "model_length")
_FILTERED = ("content_filter", "content_filtered", "prohibited_content", "recitation", "safety")
_FAILED = ("abort", "cancelled", "error", "insufficient_system_resource", "network_error")


def split_limits(config: EndpointConfig, n: int) -> EndpointConfig:
    """Return the limits of each of `n` workers that together stay within those of `config`."""
    return replace(
        config,
        concurrency=max(1, config.concurrency // n),
        requests_per_minute=config.requests_per_minute / n,
        tokens_per_minute=config.tokens_per_minute / n,
    )


async def check_reachable(config: EndpointConfig) -> None:
    """Request the server's `/models`, so that a wrong address or key is noticed within seconds.

    Any response counts as reachable; a server need not support `/models`.

    Raises:
        ConfigError: no server responds, or it refuses the key.
    """
    async with EndpointPlayer(config) as player:
        code, problem = await player.probe()
    if problem:
        raise ConfigError(
            f"endpoint.url={config.url}: no server answers there ({problem}). Start it, or correct "
            "the address."
        )
    if code in (401, 403):
        raise ConfigError(setup_refused(config.url, config.model, read_refusal(code, "")))


@dataclass(frozen=True, slots=True)
class _Retry:
    """A failed request that may be sent again: why it failed, and the wait the server asks for."""

    reason: str
    wait_s: float | None = None


@dataclass(frozen=True, slots=True)
class _Answer:
    text: str
    finish: Finish
    usage: Usage


class EndpointPlayer:
    """Answers with a server's chat completions. Use it as an async context manager or `close` it.

    Args:
        config: address, model and limits. The key is read from the environment variable it names
            and sent as a bearer token. Requests are retried after 408, 409, 425, 429, 5xx or a
            lost connection, with exponential backoff and jitter, or after `Retry-After`.
        sampling: temperature, top_p, max_tokens and stop are sent.
        backoff_s: approximate delay before the first retry.

    Raises:
        ConfigError: from `answer`, if the server would refuse every request (`rollout.refusals`).
        Refused: from `answer`, if the server refuses this conversation.
        InfraError: from `answer`, if all retries failed.
        RunFailed: from `answer`, if the server no longer responds at all.
    """

    trainable = False

    def __init__(
        self,
        config: EndpointConfig,
        *,
        sampling: Sampling | None = None,
        backoff_s: float = 0.5,
    ) -> None:
        import httpx

        url, concurrency = config.url, config.concurrency
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"endpoint.url={url!r}: give the API's address, e.g. https://host/v1")
        if not config.model:
            raise ConfigError("endpoint.model is empty: name a model that the server has")
        key = os.environ.get(config.api_key_env, "") if config.api_key_env else ""
        self.config = config
        self.url = url.rstrip("/") + "/chat/completions"
        self.sampling = sampling or Sampling(max_tokens=1024)
        self.backoff_s = backoff_s
        self.limiter = RateLimiter(config.requests_per_minute, config.tokens_per_minute)
        self._limit_key = _OLD_LIMIT
        self._warned: set[str] = set()
        self._working_settings: set[str] = set()  # settings with which the server has answered
        self._slots = asyncio.Semaphore(concurrency)
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=config.timeout_s,
            limits=httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
        )

    async def __aenter__(self) -> EndpointPlayer:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def answer(
        self, conversation: Conversation, new: Sequence[Message], options: Options
    ) -> Turn:
        """Send the whole conversation and return the server's reply."""
        messages = _to_openai([*conversation.messages, *new], native=bool(options.tools))
        body = self._body(messages, options)
        # even the jitter depends on nothing but the seed
        rng = random.Random(options.seed)
        result = await self._post(body, rng, conversation)
        while isinstance(result, Refusal):
            body = self._with_shorter_reply(body, result)
            result = await self._post(body, rng, conversation)
        usage = result.usage
        self._working_settings.add(_settings(body))
        self.limiter.take_tokens(usage.total)
        if usage.unknown and self.config.tokens_per_minute:
            self._warn_once("it does not count tokens: endpoint.tokens_per_minute has no effect")
        return Turn(
            conversation.seat,
            tuple(new),
            result.text,
            result.finish,
            state=options.state,
            usage=usage,
        )

    def _body(self, messages: list[dict[str, Any]], options: Options) -> dict[str, Any]:
        sampling, asked = self.sampling, options.temperature
        body: dict[str, Any] = {
            "model": self.config.model,
            "messages": messages,
            "temperature": sampling.temperature if asked is None else asked,
            "top_p": sampling.top_p,
            _OLD_LIMIT: options.max_tokens or sampling.max_tokens,
        }
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if options.tools:
            body["tools"] = list(options.tools)
        return {k: v for k, v in (body | self.config.extra).items() if v is not None}

    def _with_shorter_reply(self, body: Mapping[str, Any], refusal: Refusal) -> dict[str, Any]:
        """Return the body with a reply limit that fits into the context.

        Raises:
            Refused: no reply fits.
        """
        key = _NEW_LIMIT if _NEW_LIMIT in body else _OLD_LIMIT
        limit, fits = body.get(key), refusal.reply_tokens
        if isinstance(limit, int) and (fits is None or fits >= limit):  # unknown or wrong
            fits = limit // 2
        if not isinstance(limit, int) or fits is None or fits < 1:
            why = "its context has no room for a reply"
            raise Refused(conversation_refused(self.url, refusal, why))
        self._warn_once("some replies are limited to fewer tokens, to fit into its context")
        return {**body, key: fits}

    async def _post(
        self, body: Mapping[str, Any], rng: random.Random, conversation: Conversation
    ) -> _Answer | Refusal:
        """Send a request with retries; a refusal means that the context is too short."""
        retry = _Retry("")
        for attempt in range(self.config.retries + 1):
            if attempt:
                wait = min(self.backoff_s * 2 ** (attempt - 1) * (0.5 + rng.random()), 60.0)
                if retry.wait_s:  # with jitter, so that not all requests return at once
                    wait = retry.wait_s + rng.random() * self.backoff_s
                await _sleep(wait, conversation, throttled=bool(retry.wait_s))
            result = await self._try(body, conversation)
            if not isinstance(result, _Retry):
                return result
            retry = result
        tries = self.config.retries + 1
        what = f"{self.url}: no answer in {tries} tries; the last failed with {retry.reason}"
        _, problem = await self.probe()
        if problem:  # every other episode would fail too
            raise RunFailed(
                f"{what}. The server no longer responds ({problem}). Once it is back, the same "
                "command resumes."
            )
        raise InfraError(what)

    async def _try(
        self, body: Mapping[str, Any], conversation: Conversation
    ) -> _Answer | Refusal | _Retry:
        """Send a request once (twice if the limit's name changes)."""
        import httpx

        try:
            response = await self._send(body, conversation)
            if self._wants_new_limit(response):
                response = await self._send(body, conversation)
        except (httpx.TransportError, httpx.DecodingError) as error:
            # timeouts, refused or broken connections, bodies that do not match their headers
            return _Retry(f"{type(error).__name__}: {error}".rstrip(": "))
        text = response.text
        if response.status_code < 300:
            try:
                data = response.json()
            except (ValueError, RecursionError):  # not UTF-8, not JSON, or truncated
                return _Retry(f"a response that is not JSON: {text[:200]!r}")
            if not isinstance(data, dict):
                return _Retry(f"a response that is not an object: {text[:200]!r}")
            if data.get("choices") or not data.get("error"):
                return _read(data, self.url)
        return await self._handle_error(response, body, conversation)

    async def _send(self, body: Mapping[str, Any], conversation: Conversation) -> httpx.Response:
        """Send a request when concurrency and rate limits allow."""
        async with self._slots:
            wait = self.limiter.reserve()
            while wait > 0:
                await _sleep(wait, conversation, throttled=True)
                wait = self.limiter.paused_s()
            names = {_OLD_LIMIT: self._limit_key}
            renamed = {names.get(key, key): value for key, value in body.items()}
            response = await self._client.post(self.url, json=renamed)
        self.limiter.read_headers(response.headers)
        return response

    async def _handle_error(
        self, response: httpx.Response, body: Mapping[str, Any], conversation: Conversation
    ) -> Refusal | _Retry:
        """Return a `_Retry` for a temporary error, a refusal if the context is too short.

        Raises:
            ConfigError: the server would refuse every request.
            Refused: the server refuses this conversation.
        """
        refusal = read_refusal(response.status_code, response.text)
        code = refusal.status
        if (code in _RETRIED or code >= 500) and not refusal.no_quota:
            wait = retry_after(response.headers)
            if wait is not None:
                self.limiter.pause(wait)
                wait = min(wait, MAX_PAUSE_S)
            return _Retry(f"HTTP {code}: {response.text[:200]}", wait)
        cause = refusal.cause
        if cause == "length":
            return refusal
        if cause == "unknown":
            other = await self._status_of_harmless(body, conversation)
            if other in _RETRIED or other >= 500:
                return _Retry(f"HTTP {code}, and HTTP {other} for any other conversation")
            cause = "content" if other < 300 else "setup"
        if cause == "content":
            raise Refused(conversation_refused(self.url, refusal, "it answers others"))
        raise ConfigError(setup_refused(self.url, self.config.model, refusal))

    async def _status_of_harmless(self, body: Mapping[str, Any], conversation: Conversation) -> int:
        """Return the status of a harmless conversation with the same settings.

        It is sent only if no request with these settings has been answered yet.
        """
        import httpx

        if (settings := _settings(body)) in self._working_settings:
            return 200
        try:
            response = await self._send({**body, "messages": _HARMLESS}, conversation)
        except (httpx.TransportError, httpx.DecodingError):
            return 503
        if response.status_code < 300:
            self._working_settings.add(settings)
        return response.status_code

    def _wants_new_limit(self, response: httpx.Response) -> bool:
        """Whether the server refuses the limit's old name; if so, use the new one from now on."""
        if response.status_code != 400 or _NEW_LIMIT not in response.text:
            return False
        if read_refusal(400, response.text).cause == "length":  # vLLM accepts and names both
            return False
        if f'"{_NEW_LIMIT}"'.encode() in response.request.content:  # already sent
            return False
        self._limit_key = _NEW_LIMIT
        self._warn_once(f"it wants {_NEW_LIMIT} instead of {_OLD_LIMIT}; sending that from now on")
        return True

    async def probe(self) -> tuple[int, str]:
        """Return the status of `/models` (0 without a response) and the connection problem."""
        import httpx

        problem = ""
        for attempt in range(_PROBES):
            if attempt:
                await asyncio.sleep(self.backoff_s)
            try:
                response = await self._client.get(
                    self.config.url.rstrip("/") + "/models", timeout=_PROBE_S
                )
                return response.status_code, ""
            except (httpx.TransportError, httpx.InvalidURL) as error:
                problem = f"{type(error).__name__}: {error}".rstrip(": ")
        return 0, problem

    def _warn_once(self, what: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            print(visible(f"{self.config.url}: {what}."), file=sys.stderr, flush=True)


async def _sleep(seconds: float, conversation: Conversation, *, throttled: bool) -> None:
    """Wait; a wait for a rate limit does not count towards the episode's deadline."""
    if seconds > 0:
        if throttled:
            conversation.throttling.add(seconds)
        await asyncio.sleep(seconds)


def _settings(body: Mapping[str, Any]) -> str:
    """Return a key for everything in the body except the conversation."""
    return repr([(key, body[key]) for key in sorted(body) if key != "messages"])


def _usage(data: Any) -> Usage:
    """Read the usage the server reports; `unknown` unless it reports both token counts."""
    usage = data if isinstance(data, Mapping) else {}
    prompt, completion = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
    if prompt is None or completion is None:
        return Usage(unknown=1)
    return Usage(
        prompt=prompt,
        completion=completion,
        cached=_count(usage.get("prompt_tokens_details"), "cached_tokens"),
        reasoning=_count(usage.get("completion_tokens_details"), "reasoning_tokens"),
    )


def _count(data: Any, key: str) -> int | None:
    value = data.get(key) if isinstance(data, Mapping) else None
    return value if isinstance(value, int) and value >= 0 else None


def _to_openai(messages: Sequence[Message], native: bool) -> list[dict[str, Any]]:
    """Convert messages to the API's format.

    Tool calls and results become text if no tools are offered, and for a reply that contains a
    call whose name could not be parsed, because servers would refuse the request.
    """
    answered = {message.tool_call_id for message in messages if message.role == "tool"}
    sent = {
        call.id
        for message in messages
        for call in message.tool_calls
        if native and all(c.name and c.id in answered for c in message.tool_calls)
    }
    data: list[dict[str, Any]] = []
    for message in as_user_messages(messages, unchanged=sent):
        entry: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.role == "tool":
            entry["tool_call_id"] = message.tool_call_id
        elif message.tool_calls and message.tool_calls[0].id in sent:
            entry["content"] = without_calls(message.content) or None
            entry["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": json.dumps(dict(call.arguments))},
                }
                for call in message.tool_calls
            ]
        data.append(entry)
    return data


def _read(data: Mapping[str, Any], url: str) -> _Answer | _Retry:
    """Parse a response; native tool calls are written out as text calls.

    Raises:
        Refused: a content filter cut the reply.
    """
    try:
        choice = data["choices"][0]
        message, reason = choice["message"], str(choice.get("finish_reason")).lower()
        if reason in _FILTERED:
            raise Refused(f"{url} refused this conversation: its filter cut the reply ({reason})")
        if reason in _FAILED or choice.get("error"):
            what = json.dumps(choice.get("error") or message)[:200]
            return _Retry(f"a reply that ended with {reason!r}: {what}")
        finish: Finish = "length" if reason in _CUT else "stop"
        text = _content(message.get("content"))
        calls = [call["function"] for call in message.get("tool_calls") or ()]
        for place, function in enumerate(calls, 1):
            cut = finish == "length" and place == len(calls)
            text = close_open_mark(text)
            text += ("\n" if text else "") + _call_text(function, cut)
    except (KeyError, IndexError, TypeError, AttributeError):
        return _Retry(f"not a chat completion: {json.dumps(data)[:300]}")
    return _Answer(text, finish, _usage(data.get("usage")))


def _content(content: Any) -> str:
    """Return the text of a reply: a string, or the text parts of a list without reasoning."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = [part if isinstance(part, str) else part.get("text") for part in content]
    return "".join(text for text in texts if isinstance(text, str))


def _call_text(function: Mapping[str, Any], cut: bool) -> str:
    """Write a native call as text; arguments that are not a JSON object are left to the parser.

    Args:
        cut: whether the token limit cut the reply inside this call; a malformed call is then left
            open.
    """
    written = function.get("arguments") or ("" if cut else "{}")
    begin, end = CALL_MARKS
    try:
        arguments = json.loads(written)
    except (ValueError, RecursionError):  # ValueError includes numbers of 5,000 digits
        if end in written:  # as a JSON string it is still one call, with invalid arguments
            return format_call(function["name"], written)
        return f"{begin}{function['name']}{written}" + ("" if cut else end)
    if isinstance(arguments, dict):
        return format_call(function["name"], arguments)
    return f'{begin}{{"name": {json.dumps(function["name"])}, "arguments": {written}}}{end}'
