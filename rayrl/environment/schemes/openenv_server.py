"""A server of OpenEnv: what it publishes, and sessions on it.

The protocol is a few messages in JSON over a WebSocket. It is spoken here without OpenEnv's client,
which opens a new session where one was lost in the middle of an episode, and comes with the whole
library. Nothing that a server sends is trusted: sizes and waits are bounded.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidURI

from rayrl.environment.schemes.schema_actions import SchemaActions, Tool
from rayrl.errors import ConfigError, EnvError, InfraError, clip, describe_error, safe_repr

__all__ = ["Connection", "Rejected", "base_url", "inspect_server", "session"]

_MAX_SCHEMA = 2**20  # bytes of /schema
_MAX_MESSAGE = 16 * 2**20  # bytes of one message of a session; pictures may be in it
_MAX_SAID = 500  # characters of an error that are shown
_LOAD_S = 20.0  # for each answer while the environment is loaded
_CLOSE_S = 5.0
_PROBED = 8  # sessions: a limit up to this is found out beforehand
_PROBE_S = 5.0  # for that in all

_HIDDEN = ("done", "reward", "metadata")  # of an observation: the protocol's own fields
_START = (
    "Start the server first, e.g. uvicorn server.app:app --port 8000, and give its URL as "
    "openenv:http://HOST:PORT."
)


class _Full(InfraError):
    """A server that has all the sessions that it takes.

    Attributes:
        sessions: how many these are, if it says so.
    """

    def __init__(self, message: str, sessions: int | None) -> None:
        super().__init__(message)
        self.sessions = sessions


class Rejected(Exception):
    """A server's error in answer to a message.

    Attributes:
        is_last: whether the server has ended the session with it.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code, self.is_last = code, code == "SESSION_ERROR"


def base_url(name: str) -> str:
    """The URL that the server's paths are added to.

    Raises:
        ConfigError: it is none.
    """
    where = f"env.name=openenv:{clip(name, 200)}"
    example = "give the URL of a server, as openenv:http://localhost:8000"
    try:
        url = httpx.URL(name)
    except (httpx.InvalidURL, ValueError) as error:
        raise ConfigError(f"{where}: {error}; {example}") from error
    scheme = {"ws": "http", "wss": "https"}.get(url.scheme, url.scheme)
    if scheme not in ("http", "https") or not url.host:
        raise ConfigError(f"{where}: {example}")
    if url.query or url.fragment:
        raise ConfigError(f"{where}: without ? and #; {example}")
    return str(url.copy_with(scheme=scheme)).rstrip("/")


async def inspect_server(url: str) -> tuple[SchemaActions, int | None]:
    """What the actions are, and most sessions at once; None: more than `_PROBED`, or unknown.

    Raises:
        ConfigError: there is no such server, it is not OpenEnv's, or the actions have no text.
    """
    where = f"env.name=openenv:{url}"
    published = await _published(url)
    try:
        actions = SchemaActions.of(published)
        if actions.calls_tools:
            async with session(url, _LOAD_S) as server:
                listed = await server.ask("step", {"type": "list_tools"})
            actions = actions.with_tools(_tools(listed))
        return actions, await _limit(url)
    except ValueError as error:
        raise ConfigError(
            f"{where}: its actions cannot be used: {clip(str(error), _MAX_SAID)}"
        ) from error
    except (InfraError, EnvError, Rejected) as error:
        raise ConfigError(
            f"{where} has a /schema, but it has no session at /ws: {error}"
        ) from error


async def _published(url: str) -> Any:
    """The schema of the action, as the server publishes it."""
    where, body = f"env.name=openenv:{url}", b""
    try:
        async with (
            asyncio.timeout(_LOAD_S),
            httpx.AsyncClient(follow_redirects=True, timeout=_LOAD_S) as http,
            http.stream("GET", f"{url}/schema") as answer,
        ):
            if answer.status_code != 200:
                raise ConfigError(
                    f"{where}: there is a server, but it answers {answer.status_code} to GET "
                    f"/schema. Is it OpenEnv's, and is its path right? {_START}"
                )
            async for part in answer.aiter_bytes():
                body += part
                if len(body) > _MAX_SCHEMA:
                    raise ConfigError(f"{where}: /schema has more than {_MAX_SCHEMA:,} bytes")
    except (httpx.HTTPError, OSError, TimeoutError) as error:
        raise ConfigError(
            f"{where}: no server answers there ({describe_error(error)}). {_START}"
        ) from error
    try:
        return json.loads(body)["action"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ConfigError(
            f"{where}: its /schema is not OpenEnv's: {safe_repr(body[:200])}. {_START}"
        ) from error


def _tools(listed: Mapping[str, Any]) -> list[Tool]:
    observation = listed.get("observation")
    found = observation.get("tools") if isinstance(observation, dict) else None
    tools = [
        Tool.of(one["name"], str(one.get("description") or ""), one.get("input_schema") or {})
        for one in (found if isinstance(found, list) else ())
        if isinstance(one, dict) and isinstance(one.get("name"), str)
    ]
    if not tools:
        raise ValueError(f"they are calls of tools, and it lists none: {safe_repr(listed, 200)}")
    return tools


async def _limit(url: str) -> int | None:
    """Most sessions that a server takes at once, which it says when it refuses one."""
    async with contextlib.AsyncExitStack() as opened:
        try:
            async with asyncio.timeout(_PROBE_S):
                for _ in range(_PROBED + 1):
                    server = await opened.enter_async_context(session(url, _LOAD_S))
                    with contextlib.suppress(Rejected):  # it may have no state yet
                        await server.ask("state")
        except _Full as full:
            return full.sessions
        except TimeoutError:  # its environments take long to make
            return None
    return None


@contextlib.asynccontextmanager
async def session(url: str, timeout_s: float) -> AsyncIterator[Connection]:
    """A new session; on leaving, wait until the server has ended it and has room for another.

    Args:
        timeout_s: longest wait for the connection, and for each answer.

    Raises:
        InfraError: the server cannot be reached.
    """
    try:
        socket = await connect(
            f"ws{url.removeprefix('http')}/ws",
            open_timeout=timeout_s,
            close_timeout=1.0,
            max_size=_MAX_MESSAGE,
            max_queue=4,
            compression=None,
        )
    except (OSError, TimeoutError, InvalidHandshake, InvalidURI) as error:
        raise InfraError(f"{url} cannot be reached: {describe_error(error)}") from error
    server = Connection(url, socket, timeout_s)
    try:
        yield server
    finally:
        if not server.waiting:
            with contextlib.suppress(ConnectionClosed, TimeoutError):
                async with asyncio.timeout(_CLOSE_S):
                    await socket.send('{"type": "close"}')
                    await socket.wait_closed()
        await socket.close()


class Connection:
    """An open session.

    Attributes:
        waiting: whether the server has yet to answer.
    """

    def __init__(self, url: str, socket: ClientConnection, timeout_s: float) -> None:
        self._url, self._socket, self._timeout_s = url, socket, timeout_s
        self.waiting = False

    async def act(
        self, kind: str, data: Mapping[str, Any], max_chars: int
    ) -> tuple[str, float | None, bool]:
        """Reset or step: the observation as text, the reward if there is one, whether it is done.

        Raises:
            Rejected, InfraError, EnvError: as `ask`.
        """
        answer = await self.ask(kind, data)
        observation, reward = answer.get("observation"), answer.get("reward")
        is_number = isinstance(reward, int | float) and abs(reward) < 1e12  # false for NaN too
        if not isinstance(observation, dict) or not (reward is None or is_number):
            raise EnvError(f"{self._url} sent no observation and reward: {safe_repr(answer, 300)}")
        text = clip(_text(observation), max_chars)
        return text, None if reward is None else float(reward), answer.get("done") is True

    async def ask(self, kind: str, data: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Send a message; return the data of the answer.

        Raises:
            Rejected: the answer is an error.
            InfraError: none came, or the server is full.
            EnvError: it is not OpenEnv's or too large, or the server could not make an environment.
        """
        message = {"type": kind} if data is None else {"type": kind, "data": data}
        self.waiting = True
        try:
            async with asyncio.timeout(self._timeout_s):
                # a server that is full says so and closes, perhaps before this is sent
                with contextlib.suppress(ConnectionClosed):
                    await self._socket.send(json.dumps(message))
                raw = await self._socket.recv()
        except TimeoutError as error:
            raise InfraError(
                f"{self._url} did not answer {kind} within {self._timeout_s:g} s "
                "(env.args.timeout_s)"
            ) from error
        except ConnectionClosed as error:
            if error.sent is not None and error.sent.code == 1009:
                raise EnvError(
                    f"{self._url} answered {kind} with more than {_MAX_MESSAGE:,} bytes"
                ) from error
            raise InfraError(f"{self._url} ended the session: {describe_error(error)}") from error
        self.waiting = False
        try:
            answer = json.loads(raw)
            said, content = answer["type"], answer["data"]
            if not isinstance(content, dict) or said not in ("observation", "state", "error"):
                raise TypeError(said)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise EnvError(
                f"{self._url} answered {kind} with what is no message of OpenEnv: "
                f"{safe_repr(raw[:200])}"
            ) from error
        if said == "error":
            raise self._error(content)
        return content

    def _error(self, content: Mapping[str, Any]) -> Exception:
        code, text = str(content.get("code"))[:40], clip(str(content.get("message")), _MAX_SAID)
        if code == "CAPACITY_REACHED":
            most = content.get("max_sessions")
            most = most if isinstance(most, int) and most > 0 else None
            return _Full(
                f"{self._url} is full ({text}). Give it a larger max_concurrent_envs, or play "
                "fewer episodes at once (cluster.concurrency)",
                most,
            )
        if code == "FACTORY_ERROR":
            return EnvError(f"{self._url} could not make its environment: {text}")
        if details := _details(content.get("errors")):
            text = details
        return Rejected(code, text)


def _details(errors: Any) -> str:
    """What does not fit where, of pydantic's errors."""
    return "; ".join(
        f"{'.'.join(map(str, one['loc']))}: {clip(str(one.get('msg')), 200)}"
        for one in (errors[:3] if isinstance(errors, list) else ())
        if isinstance(one, dict) and isinstance(one.get("loc"), list)
    )


def _text(observation: Mapping[str, Any]) -> str:
    """An observation as text: its only field as it is, or a line for each."""
    texts = {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in observation.items()
        if name not in _HIDDEN and value is not None
    }
    if len(texts) == 1:
        ((name, text),) = texts.items()
        if isinstance(observation[name], str):
            return text or "(empty)"
    lines = [f"{k}:\n{v}" if "\n" in v else f"{k}: {v}" for k, v in texts.items()]
    return "\n".join(lines) or "(empty)"
