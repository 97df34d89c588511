"""A remote model behind an OpenAI-compatible server, as a player."""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rayrl.chat.tools import CALL_MARKS, as_user_messages, closed, format_call, without_calls
from rayrl.config import EndpointConfig
from rayrl.errors import ConfigError, InfraError, Refused, RunFailed
from rayrl.rollout.agent import Conversation, Options
from rayrl.rollout.rate_limit import LONGEST_HOLD_S, Limiter, retry_after
from rayrl.rollout.refusals import Refusal, advice, read_refusal, words
from rayrl.terminal import visible
from rayrl.types import Finish, Message, Sampling, Turn, Usage

if TYPE_CHECKING:
    import httpx

__all__ = ["EndpointPlayer", "check_reachable", "share"]

_RETRIED = (408, 409, 425, 429)  # and all 5xx
_PROBE_S = 5.0  # for a server to answer anything at all
_PROBES = 2
_OLD_LIMIT, _NEW_LIMIT = "max_tokens", "max_completion_tokens"
_ANY_TALK = [{"role": "user", "content": "Hello!"}]  # which no server minds
_CUT = ("length", "max_tokens", "max_output_tokens", "model_length")  # reasons to end, as told
_FILTERED = ("content_filter", "content_filtered", "prohibited_content", "recitation", "safety")
_FAILED = ("abort", "cancelled", "error", "insufficient_system_resource", "network_error")


def share(config: EndpointConfig, n: int) -> EndpointConfig:
    """The limits of one of `n` workers that ask the same server; together they keep `config`'s."""
    return replace(
        config,
        concurrency=max(1, config.concurrency // n),
        requests_per_minute=config.requests_per_minute / n,
        tokens_per_minute=config.tokens_per_minute / n,
    )


async def check_reachable(config: EndpointConfig) -> None:
    """Ask the server for its models, so that a wrong address or key is known within seconds.

    Whatever it answers, it is there; a server need not know that question.

    Raises:
        ConfigError: nobody answers, or the key is refused.
    """
    async with EndpointPlayer(config) as player:
        code, problem = await player.probe()
    if problem:
        raise ConfigError(
            f"endpoint.url={config.url}: no server answers there ({problem}). Start it, or mend "
            "the address."
        )
    if code in (401, 403):
        raise ConfigError(advice(config.url, config.model, read_refusal(code, "")))


@dataclass(frozen=True, slots=True)
class _Problem:
    """Why a request has no answer yet, and how long the server asks to wait."""

    text: str
    wait_s: float | None = None


@dataclass(frozen=True, slots=True)
class _Answer:
    text: str
    finish: Finish
    usage: Usage


class EndpointPlayer:
    """Answers with a server's chat completions; use it as an async context manager, or `close` it.

    Args:
        config: address, model and limits. The key is read from the environment variable it names
            and sent as a bearer token. A request is sent again after 408, 409, 425, 429, 5xx or a
            lost connection, with exponential backoff and jitter, or as `Retry-After` says.
        sampling: temperature, top_p, max_tokens and stop are sent.
        backoff_s: about how long the first wait is.

    Raises:
        ConfigError: from `answer`, when the server would refuse every request (`rollout.refusals`).
        Refused: from `answer`, when it refuses this conversation.
        InfraError: from `answer`, when it gave no answer in `retries` more tries.
        RunFailed: from `answer`, when it answers nothing at all any more.
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

        url, room = config.url, config.concurrency
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"endpoint.url={url!r}: give the API's address, e.g. https://host/v1")
        if not config.model:
            raise ConfigError("endpoint.model is empty: name a model the server has")
        key = os.environ.get(config.api_key_env, "") if config.api_key_env else ""
        self.config = config
        self.url = url.rstrip("/") + "/chat/completions"
        self.sampling = sampling or Sampling(max_tokens=1024)
        self.backoff_s = backoff_s
        self.limiter = Limiter(config.requests_per_minute, config.tokens_per_minute)
        self._limit_key = _OLD_LIMIT
        self._said: set[str] = set()
        self._answered: set[str] = set()  # settings with which it has answered
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
        body = self._body(messages, options)
        # the jitter must not depend on anything but the seed either
        rng = random.Random(options.seed)
        found = await self._post(body, rng, conversation)
        while isinstance(found, Refusal):
            body = self._shortened(body, found)
            found = await self._post(body, rng, conversation)
        usage = found.usage
        self._answered.add(_settings(body))
        self.limiter.spent(usage.total)
        if usage.unknown and self.config.tokens_per_minute:
            self._say_once("it does not count tokens: endpoint.tokens_per_minute does nothing")
        return Turn(
            conversation.seat,
            tuple(new),
            found.text,
            found.finish,
            state=options.state,
            usage=usage,
        )

    def _body(self, messages: list[dict[str, Any]], options: Options) -> dict[str, Any]:
        sampling = self.sampling
        body: dict[str, Any] = {
            "model": self.config.model,
            "messages": messages,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            _OLD_LIMIT: options.max_tokens or sampling.max_tokens,
        }
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if options.tools:
            body["tools"] = list(options.tools)
        return {k: v for k, v in (body | self.config.extra).items() if v is not None}

    def _shortened(self, body: Mapping[str, Any], refusal: Refusal) -> dict[str, Any]:
        """The body with a limit on the reply that the context has room for.

        Raises:
            Refused: it has room for no reply at all.
        """
        key = _NEW_LIMIT if _NEW_LIMIT in body else _OLD_LIMIT
        limit, room = body.get(key), refusal.room
        if isinstance(limit, int) and (room is None or room >= limit):  # it did not say
            room = limit // 2
        if not isinstance(limit, int) or room is None or room < 1:
            raise Refused(words(self.url, refusal, "its context has no room for a reply"))
        self._say_once("some replies get fewer tokens than asked for: its context has no more room")
        return {**body, key: room}

    async def _post(
        self, body: Mapping[str, Any], rng: random.Random, conversation: Conversation
    ) -> _Answer | Refusal:
        """The answer, or that the context is too short for this conversation and its reply."""
        problem = _Problem("")
        for attempt in range(self.config.retries + 1):
            if attempt:
                wait = min(self.backoff_s * 2 ** (attempt - 1) * (0.5 + rng.random()), 60.0)
                if problem.wait_s:  # not all of us at the same moment
                    wait = problem.wait_s + rng.random() * self.backoff_s
                await _sleep(wait, conversation, held=bool(problem.wait_s))
            found = await self._try(body, conversation)
            if not isinstance(found, _Problem):
                return found
            problem = found
        tries = self.config.retries + 1
        what = f"{self.url}: no answer in {tries} tries; the last gave {problem.text}"
        _, nothing = await self.probe()
        if nothing:  # every other episode would fail as this one did
            raise RunFailed(
                f"{what}. The server answers nothing any more ({nothing}). When it is there "
                "again, the same command resumes."
            )
        raise InfraError(what)

    async def _try(
        self, body: Mapping[str, Any], conversation: Conversation
    ) -> _Answer | Refusal | _Problem:
        """One request."""
        import httpx

        try:
            response = await self._send(body, conversation)
            if self._wants_new_limit(response):
                response = await self._send(body, conversation)
        except (httpx.TransportError, httpx.DecodingError) as error:
            # timeouts, refused and broken connections, bodies that are not what a header says
            return _Problem(f"{type(error).__name__}: {error}".rstrip(": "))
        text = response.text
        if response.status_code < 300:
            try:
                data = response.json()
            except (ValueError, RecursionError):  # not UTF-8, not JSON, or cut off
                return _Problem(f"an answer that is not JSON: {text[:200]!r}")
            if not isinstance(data, dict):
                return _Problem(f"an answer that is no object: {text[:200]!r}")
            if data.get("choices") or not data.get("error"):
                return _read(data, self.url)
        return await self._told(response, body, conversation)

    async def _send(self, body: Mapping[str, Any], conversation: Conversation) -> httpx.Response:
        """Send it when concurrency and limits allow."""
        async with self._room:
            wait = self.limiter.reserve()
            while wait > 0:
                await _sleep(wait, conversation, held=True)
                wait = self.limiter.held_s()
            response = await self._client.post(self.url, json=self._limited(body))
        self.limiter.heed(response.headers)
        return response

    async def _told(
        self, response: httpx.Response, body: Mapping[str, Any], conversation: Conversation
    ) -> Refusal | _Problem:
        """What an error means: a problem that may pass, or a context that is too short.

        Raises:
            ConfigError: every request would be refused.
            Refused: this conversation is.
        """
        refusal = read_refusal(response.status_code, response.text)
        code = refusal.status
        if (code in _RETRIED or code >= 500) and not refusal.no_quota:
            asked = retry_after(response.headers)
            if asked is not None:
                self.limiter.hold(asked)
                asked = min(asked, LONGEST_HOLD_S)
            return _Problem(f"HTTP {code}: {response.text[:200]}", asked)
        about = refusal.about
        if about == "length":
            return refusal
        if about == "unknown":
            other = await self._of_another(body, conversation)
            if other in _RETRIED or other >= 500:
                return _Problem(f"HTTP {code}, and HTTP {other} to any other question")
            about = "content" if other < 300 else "setup"
        if about == "content":
            raise Refused(words(self.url, refusal, "it answers others"))
        raise ConfigError(advice(self.url, self.config.model, refusal))

    async def _of_another(self, body: Mapping[str, Any], conversation: Conversation) -> int:
        """The status another conversation gets with the same settings; asked if none has yet."""
        import httpx

        if (settings := _settings(body)) in self._answered:
            return 200
        try:
            response = await self._send({**body, "messages": _ANY_TALK}, conversation)
        except (httpx.TransportError, httpx.DecodingError):
            return 503
        if response.status_code < 300:
            self._answered.add(settings)
        return response.status_code

    def _limited(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The body, with the limit on tokens called as this server wants it."""
        named = {_OLD_LIMIT: self._limit_key}
        return {named.get(key, key): value for key, value in body.items()}

    def _wants_new_limit(self, response: httpx.Response) -> bool:
        """Whether the server refused the old name of the limit; it gets the new one from now on."""
        if response.status_code != 400 or _NEW_LIMIT not in response.text:
            return False
        if read_refusal(400, response.text).about == "length":  # vLLM names both, takes both
            return False
        if f'"{_NEW_LIMIT}"'.encode() in response.request.content:  # it has had it
            return False
        self._limit_key = _NEW_LIMIT
        self._say_once(f"it wants {_NEW_LIMIT} instead of {_OLD_LIMIT}, and gets it")
        return True

    async def probe(self) -> tuple[int, str]:
        """The status of a question any server can answer, and what is wrong if it answers none."""
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

    def _say_once(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            print(visible(f"{self.config.url}: {what}."), file=sys.stderr, flush=True)


async def _sleep(seconds: float, conversation: Conversation, *, held: bool) -> None:
    """Wait; where a limit makes us, the episode's deadline does not count it."""
    if seconds > 0:
        if held:
            conversation.throttled_s += seconds
        await asyncio.sleep(seconds)


def _settings(body: Mapping[str, Any]) -> str:
    """All that is sent but the conversation."""
    return repr([(key, body[key]) for key in sorted(body) if key != "messages"])


def _usage(data: Any) -> Usage:
    """What the server counted; `unknown` where it did not count both ways."""
    given = data if isinstance(data, Mapping) else {}
    prompt, completion = _count(given, "prompt_tokens"), _count(given, "completion_tokens")
    if prompt is None or completion is None:
        return Usage(unknown=1)
    return Usage(
        prompt=prompt,
        completion=completion,
        cached=_count(given.get("prompt_tokens_details"), "cached_tokens"),
        reasoning=_count(given.get("completion_tokens_details"), "reasoning_tokens"),
    )


def _count(data: Any, key: str) -> int | None:
    value = data.get(key) if isinstance(data, Mapping) else None
    return value if isinstance(value, int) and value >= 0 else None


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


def _read(data: Mapping[str, Any], url: str) -> _Answer | _Problem:
    """The reply: its text, native tool calls written out as text calls, and how it ended.

    Raises:
        Refused: a filter for content cut it.
    """
    try:
        choice = data["choices"][0]
        message, reason = choice["message"], str(choice.get("finish_reason")).lower()
        if reason in _FILTERED:
            raise Refused(f"{url} refused this conversation: its filter cut the reply ({reason})")
        if reason in _FAILED or choice.get("error"):
            what = json.dumps(choice.get("error") or message)[:200]
            return _Problem(f"a reply that ended with {reason!r}: {what}")
        finish: Finish = "length" if reason in _CUT else "stop"
        text = _content(message.get("content"))
        calls = [call["function"] for call in message.get("tool_calls") or ()]
        for place, function in enumerate(calls, 1):
            cut = finish == "length" and place == len(calls)
            text = closed(text)
            text += ("\n" if text else "") + _call_text(function, cut)
    except (KeyError, IndexError, TypeError, AttributeError):
        return _Problem(f"not a chat completion: {json.dumps(data)[:300]}")
    return _Answer(text, finish, _usage(data.get("usage")))


def _content(content: Any) -> str:
    """The text of a reply: a string, or what the parts of a list say (not what they think)."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = [part if isinstance(part, str) else part.get("text") for part in content]
    return "".join(text for text in texts if isinstance(text, str))


def _call_text(function: Mapping[str, Any], cut: bool) -> str:
    """A native call as text; arguments that are no JSON object are left for the parser to judge.

    Args:
        cut: whether the reply ended in it for want of tokens; one that is broken is then left open.
    """
    written = function.get("arguments") or ("" if cut else "{}")
    begin, end = CALL_MARKS
    try:
        arguments = json.loads(written)
    except (ValueError, RecursionError):  # also a number of 5,000 digits
        if end in written:  # as a string, which is no object either, it is still one call
            return format_call(function["name"], written)
        return f"{begin}{function['name']}{written}" + ("" if cut else end)
    if isinstance(arguments, dict):
        return format_call(function["name"], arguments)
    return f'{begin}{{"name": {json.dumps(function["name"])}, "arguments": {written}}}{end}'
