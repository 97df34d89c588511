from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from rayrl.agent import Agent
from rayrl.config import EndpointConfig
from rayrl.endpoint import EndpointPlayer
from rayrl.errors import ConfigError, InfraError
from rayrl.types import Sampling, system, user

Answer = tuple[int, dict[str, str], Any]  # status, headers, body


class Server:
    """A real HTTP server on a free port; `answers` are given one after the other, then the last."""

    def __init__(self, *answers: Answer | Callable[[], Any]) -> None:
        self.answers = list(answers)
        self.seen: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.url = ""
        self.live = self.most = 0
        self.handlers: set[asyncio.Task[None]] = set()

    def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.handlers.add(asyncio.create_task(self.handle(reader, writer)))

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self.talk(reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                lines = head.split("\r\n")
                headers = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
                body = json.loads(await reader.readexactly(int(headers["content-length"])))
                headers["path"] = lines[0]
                self.seen.append((headers, body))
                self.live += 1
                self.most = max(self.most, self.live)
                answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
                if callable(answer):
                    answer = await answer()
                self.live -= 1
                if answer is None:  # hang up
                    break
                status, extra, said = answer
                data = said.encode() if isinstance(said, str) else json.dumps(said).encode()
                lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(data)}"]
                lines += [f"{key}: {value}" for key, value in extra.items()]
                writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + data)
                await writer.drain()


@contextlib.asynccontextmanager
async def serving(*answers: Any) -> AsyncIterator[Server]:
    server = Server(*answers)
    listening = await asyncio.start_server(server.connected, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1"
    try:
        yield server
    finally:
        listening.close()
        for handler in server.handlers:
            handler.cancel()
        await asyncio.gather(*server.handlers, return_exceptions=True)


def said(content: str | None, finish: str = "stop", **more: Any) -> Answer:
    message = {"role": "assistant", "content": content, **more}
    return 200, {}, {"choices": [{"message": message, "finish_reason": finish}]}


def endpoint(server: Server, retries: int = 3, **more: Any) -> EndpointPlayer:
    timeout_s = more.pop("timeout_s", 5.0)
    room = more.pop("concurrency", 16)
    config = EndpointConfig(
        url=server.url,
        model="m",
        api_key_env="RAYRL_TEST_KEY",
        retries=retries,
        timeout_s=timeout_s,
        concurrency=room,
    )
    return EndpointPlayer(config, backoff_s=0.01, **more)


async def test_a_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYRL_TEST_KEY", "sesame")
    async with serving(said("one"), said("tw", "length")) as server:
        sampling = Sampling(temperature=0.5, top_p=0.9, max_tokens=7, stop=("##",))
        async with endpoint(server, sampling=sampling) as player:
            agent = Agent(player)
            assert await agent([system("s"), user("a")]) == "one"
            reply = await agent("b", max_tokens=3)
    assert (reply, reply.finish) == ("tw", "length")
    assert agent.record[0].completion_ids == ()
    headers, body = server.seen[0]
    assert headers["path"] == "POST /v1/chat/completions HTTP/1.1"
    assert headers["authorization"] == "bearer sesame"
    assert body == {
        "model": "m",
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}],
        "temperature": 0.5,
        "top_p": 0.9,
        "max_tokens": 7,
        "stop": ["##"],
    }
    assert server.seen[1][1]["max_tokens"] == 3
    assert [m["role"] for m in server.seen[1][1]["messages"]] == [
        "system",
        "user",
        "assistant",
        "user",
    ]


async def hang_up() -> None:
    return None


async def never() -> Answer:
    await asyncio.sleep(60)
    return said("late")


@pytest.mark.parametrize(
    "bad",
    [
        (429, {}, "slow down"),
        (503, {}, "busy"),
        (500, {}, ""),
        (200, {}, "<html>"),
        (200, {}, [1]),
        hang_up,
    ],
)
async def test_what_is_tried_again(bad: Any) -> None:
    async with serving(bad, bad, said("ok")) as server, endpoint(server) as player:
        assert await Agent(player)("a") == "ok"
    assert len(server.seen) == 3
    assert server.seen[0][1] == server.seen[2][1]


async def test_timeouts_are_tried_again() -> None:
    async with serving(never, said("ok")) as server, endpoint(server, timeout_s=0.2) as player:
        assert await Agent(player)("a") == "ok"


async def test_retry_after_is_honoured() -> None:
    busy = (429, {"Retry-After": "0.4"}, "")
    async with serving(busy, said("ok")) as server, endpoint(server) as player:
        began = time.perf_counter()
        await Agent(player)("a")
    assert 0.4 <= time.perf_counter() - began < 2


async def test_tries_run_out() -> None:
    async with serving((503, {}, "busy")) as server, endpoint(server, retries=1) as player:
        with pytest.raises(InfraError, match=r"no answer in 2 tries; the last gave HTTP 503: busy"):
            await Agent(player)("a")
    assert len(server.seen) == 2


async def test_a_server_that_is_not_there() -> None:
    server = Server()
    server.url = "http://127.0.0.1:9/v1"
    async with endpoint(server, retries=0) as player:
        with pytest.raises(InfraError, match="no answer in 1 tries; the last gave ConnectError"):
            await Agent(player)("a")


@pytest.mark.parametrize(
    ("code", "remedy"),
    [(401, "endpoint.api_key_env"), (404, "endpoint.model='m'"), (400, "sampling settings")],
)
async def test_refusals_say_what_to_do(code: int, remedy: str) -> None:
    async with serving((code, {}, "no way")) as server, endpoint(server) as player:
        with pytest.raises(ConfigError, match=f"HTTP {code}.*{remedy}.*no way"):
            await Agent(player)("a")
    assert len(server.seen) == 1  # trying again would not help


@pytest.mark.parametrize("data", [{}, {"choices": []}, {"choices": [{"message": None}]}])
async def test_not_a_completion(data: Any) -> None:
    async with serving((200, {}, data)) as server, endpoint(server) as player:
        with pytest.raises(InfraError, match="not a chat completion"):
            await Agent(player)("a")


async def test_concurrency_is_bounded() -> None:
    async def slow() -> Answer:
        await asyncio.sleep(0.02)
        return said("ok")

    async with serving(slow) as server, endpoint(server, concurrency=3) as player:
        await asyncio.gather(*[Agent(player)("a") for _ in range(12)])
    assert server.most == 3


def add(a: int, b: int) -> int:
    """Add."""
    return a + b


async def test_native_tool_calls() -> None:
    call = {
        "id": "theirs",
        "type": "function",
        "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'},
    }
    calling = said(None, "tool_calls", tool_calls=[call])
    async with serving(calling, said("3")) as server, endpoint(server) as player:
        agent = Agent(player)
        reply = await agent("1 + 2?", tools=[add])
        await agent("sure?")
    assert reply == "3"
    assert agent.tool_calls == 1
    # the episode has it as text, which a model can be trained on
    text = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
    assert agent.record[0].text == text
    first, second, third = [body for _, body in server.seen]
    assert first["tools"][0]["function"]["name"] == "add"
    assert second["messages"][1:] == [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "call_0",
                    "type": "function",
                    "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'},
                }
            ],
        },
        {"role": "tool", "content": "3", "tool_call_id": "call_0"},
    ]
    assert "tools" not in third
    assert third["messages"][1:3] == [
        {"role": "assistant", "content": text},
        {"role": "user", "content": "<tool_response>3</tool_response>"},
    ]


async def test_native_arguments_that_are_no_json() -> None:
    call = {"id": "x", "function": {"name": "add", "arguments": '{"a": 1, '}}
    calling = said("hm", tool_calls=[call])
    async with serving(calling, said("3")) as server, endpoint(server) as player:
        agent = Agent(player)
        assert await agent("?", tools=[add]) == "3"
        # a call without a name would be refused, so this one is sent as text
        assert server.seen[1][1]["messages"][1:] == [
            {"role": "assistant", "content": 'hm\n<tool_call>add{"a": 1, </tool_call>'},
            {
                "role": "user",
                "content": f"<tool_response>{agent.messages[2].content}</tool_response>",
            },
        ]
    assert agent.tool_errors == 1
    assert "not valid JSON" in agent.messages[2].content


async def test_native_arguments_that_are_no_object() -> None:
    calls = [
        {"id": "x", "function": {"name": "add", "arguments": "[1]"}},
        {"id": "y", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}},
    ]
    calling = said(None, tool_calls=calls)
    async with serving(calling, said("3")) as server, endpoint(server) as player:
        agent = Agent(player)
        assert await agent("?", tools=[add]) == "3"
        sent = server.seen[1][1]["messages"][1:]
    assert [call["function"]["name"] for call in sent[0]["tool_calls"]] == ["add", "add"]
    assert [message["content"] for message in sent[1:]] == [
        "Error: add: arguments must be an object",
        "3",
    ]
    assert (agent.tool_calls, agent.tool_errors) == (2, 1)


def test_settings_that_are_missing() -> None:
    with pytest.raises(ConfigError, match=r"endpoint\.url=''"):
        EndpointPlayer(EndpointConfig(model="m"))
    with pytest.raises(ConfigError, match=r"endpoint\.model is empty"):
        EndpointPlayer(EndpointConfig(url="http://x/v1"))
