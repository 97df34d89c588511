"""A remote model behind an OpenAI-compatible server, as a player."""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

from rayrl.agent import Conversation, Options
from rayrl.config import EndpointConfig
from rayrl.errors import ConfigError, InfraError
from rayrl.tools import as_user_messages, format_call, without_calls
from rayrl.types import Finish, Message, Sampling, Turn

if TYPE_CHECKING:
    import httpx

__all__ = ["EndpointPlayer"]

_RETRIED = (408, 409, 425, 429)  # and all 5xx
_LONGEST_WAIT_S = 60.0


class EndpointPlayer:
    """Answers with a server's chat completions; use it as an async context manager, or `close` it.

    Args:
        config: address, model and limits. The key is read from the environment variable it names
            and sent as a bearer token. A request is sent again after 408, 409, 425, 429, 5xx or a
            lost connection, with exponential backoff and jitter, or as `Retry-After` says.
        sampling: temperature, top_p, max_tokens and stop are sent.
        backoff_s: about how long the first wait is.
        extra: further keys of the request's body.

    Raises:
        ConfigError: from `answer`, when the server refuses the request as such (4xx).
        InfraError: from `answer`, when it gave no answer in `retries` more tries.
    """

    trainable = False

    def __init__(
        self,
        config: EndpointConfig,
        *,
        sampling: Sampling | None = None,
        backoff_s: float = 0.5,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        import httpx

        url, room = config.url, config.concurrency
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"endpoint.url={url!r}: give the API's address, e.g. https://host/v1")
        if not config.model:
            raise ConfigError("endpoint.model is empty: name a model the server has")
        key = os.environ.get(config.api_key_env, "") if config.api_key_env else ""
        self.url = url.rstrip("/") + "/chat/completions"
        self.model = config.model
        self.sampling = sampling or Sampling(max_tokens=1024)
        self.retries = config.retries
        self.backoff_s = backoff_s
        self.extra = dict(extra or {})
        self._room = asyncio.Semaphore(room)
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=config.timeout_s,
            limits=httpx.Limits(max_connections=room, max_keepalive_connections=room),
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
        """Send the whole conversation and return what the server answers."""
        messages = _to_openai([*conversation.messages, *new], native=bool(options.tools))
        sampling = self.sampling
        body: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": options.max_tokens or sampling.max_tokens,
        }
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if options.tools:
            body["tools"] = list(options.tools)
        # the jitter must not depend on anything but the seed either
        data = await self._post(body | self.extra, random.Random(options.seed))
        text, finish = _from_openai(data, self.url)
        return Turn(conversation.seat, tuple(new), text, finish, state=options.state)

    async def _post(self, body: Mapping[str, Any], rng: random.Random) -> dict[str, Any]:
        import httpx

        wait, problem = 0.0, ""
        for attempt in range(self.retries + 1):
            if attempt:
                await asyncio.sleep(wait)
            wait = min(self.backoff_s * 2**attempt * (0.5 + rng.random()), _LONGEST_WAIT_S)
            try:
                async with self._room:
                    response = await self._client.post(self.url, json=body)
            except httpx.TransportError as error:  # timeouts, refused and broken connections
                problem = f"{type(error).__name__}: {error}".rstrip(": ")
                continue
            code = response.status_code
            if code in _RETRIED or code >= 500:
                problem = f"HTTP {code}: {response.text[:200]}"
                asked = _retry_after(response)
                wait = wait if asked is None else min(asked, _LONGEST_WAIT_S)
                continue
            if code >= 400:
                raise ConfigError(_refusal(self.url, self.model, code, response.text))
            try:
                data = response.json()
            except json.JSONDecodeError:
                problem = f"an answer that is not JSON: {response.text[:200]!r}"
                continue
            if isinstance(data, dict):
                return data
            problem = f"an answer that is no object: {response.text[:200]!r}"
        tries = self.retries + 1
        raise InfraError(f"{self.url}: no answer in {tries} tries; the last gave {problem}")


def _refusal(url: str, model: str, code: int, text: str) -> str:
    remedy = {
        401: "check the key in the variable that endpoint.api_key_env names",
        403: "the key may not use this model",
        404: f"check endpoint.url and endpoint.model={model!r}",
        400: f"check endpoint.model={model!r} and the sampling settings",
    }.get(code, "the server will not answer this request")
    return f"{url} refused the request (HTTP {code}): {remedy}. It said: {text[:300]}"


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds a `Retry-After` header asks to wait (RFC 9110, a number or a date)."""
    value = response.headers.get("retry-after", "")
    try:
        return max(float(value), 0.0)
    except ValueError:
        pass
    try:
        return max((parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds(), 0.0)
    except (ValueError, TypeError):
        return None


def _to_openai(messages: Sequence[Message], native: bool) -> list[dict[str, Any]]:
    """Messages as the API wants them; calls and results become text where no tools are offered.

    So do those of a reply with a call whose name could not be read: servers refuse the request.
    """
    answered = {message.tool_call_id for message in messages if message.role == "tool"}
    sent = {
        call.id
        for message in messages
        for call in message.tool_calls
        if native and all(c.name and c.id in answered for c in message.tool_calls)
    }
    data: list[dict[str, Any]] = []
    for message in as_user_messages(messages, keep=sent):
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


def _from_openai(data: Mapping[str, Any], url: str) -> tuple[str, Finish]:
    """The reply's text, native tool calls written out as text calls, and how it ended."""
    try:
        choice = data["choices"][0]
        message = choice["message"]
        text = message.get("content") or ""
        for call in message.get("tool_calls") or ():
            function = call["function"]
            text += ("\n" if text else "") + _call_text(function)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise InfraError(f"{url}: not a chat completion: {json.dumps(data)[:300]}") from error
    return text, "length" if choice.get("finish_reason") == "length" else "stop"


def _call_text(function: Mapping[str, Any]) -> str:
    """A native call as text; arguments that are no JSON object are left for the parser to judge."""
    written = function.get("arguments") or "{}"
    try:
        arguments = json.loads(written)
    except json.JSONDecodeError:
        return f"<tool_call>{function['name']}{written}</tool_call>"
    if isinstance(arguments, dict):
        return format_call(function["name"], arguments)
    return (
        f'<tool_call>{{"name": {json.dumps(function["name"])}, "arguments": {written}}}</tool_call>'
    )
