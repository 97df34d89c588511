"""The endpoint that programs ask: keys, errors, retries, and programs that mean no good."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
import openai
import pytest

from rayrl import Agent, Endpoint, InfraError
from rayrl.rollout.agent import Options
from rayrl.rollout.conversation import Conversation
from rayrl.rollout.players import ScriptedPlayer
from rayrl.rollout.programs import server
from rayrl.types import Message, Turn

PATHS = ("/chat/completions", "/responses", "/messages")


def body(path: str, said: str = "hi", **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": said}]
    own = {"input": said} if path == "/responses" else {"messages": messages}
    return {"model": "policy", **own, **({"max_tokens": 9} if path == "/messages" else {}), **more}


def agent(answer: Any = lambda messages, rng: "ok") -> Agent:
    return Agent(ScriptedPlayer(answer), episode="e")


@asynccontextmanager
async def client(at: Endpoint, key: str = "") -> AsyncIterator[httpx.AsyncClient]:
    headers = {"Authorization": f"Bearer {key or at.key}"}
    async with httpx.AsyncClient(
        base_url=at.url, headers=headers, timeout=600, trust_env=False
    ) as made:
        yield made


def message_of(data: Mapping[str, Any]) -> str:
    text: str = data["error"]["message"]
    return text


@pytest.mark.parametrize("path", PATHS)
async def test_keys_and_the_end_of_an_episode(path: str) -> None:
    async with agent().endpoint() as other:
        one = agent()
        async with one.endpoint() as at:
            assert at.url == other.url
            assert at.key != other.key
            async with client(at) as http, client(at, "sk-wrong") as stranger:
                assert (await http.post(path, json=body(path))).status_code == 200
                refused = await stranger.post(path, json=body(path))
                assert refused.status_code == 401
                assert message_of(refused.json()) == "Incorrect API key."
        assert len(one.record) == 1
        async with client(at) as http:
            late = await http.post(path, json=body(path))
        assert late.status_code == 409
        assert late.headers["x-should-retry"] == "false"
        assert message_of(late.json()) == "The episode of this key is over."
        assert len(one.record) == 1


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("sent", "status", "what"),
    [
        (b"{", 400, "not valid JSON"),
        (b"[]", 400, "must be a JSON object"),
        (b'{"messages": [], "input": []}', 400, "must be a list that is not empty"),
        (b'{"messages": 3, "input": 3}', 400, "must be a list that is not empty"),
        (b'{"messages": [3], "input": [3]}', 400, "must be an object"),
        (b"[" * 100_000, 400, "nested"),
        (b'{"messages": [{"role": "user"}], "input": [{"role": "user", "content": 3}]}', 400, "m"),
    ],
)
async def test_what_cannot_be_read_is_named(path: str, sent: bytes, status: int, what: str) -> None:
    one = agent()
    async with one.endpoint() as at, client(at) as http:
        answer = await http.post(path, content=sent)
        assert (answer.status_code, answer.headers["x-should-retry"]) == (status, "false")
        assert what in message_of(answer.json())
        assert one.record == []
        assert (await http.post(path, json=body(path))).status_code == 200


@pytest.mark.parametrize(
    ("path", "more", "what"),
    [
        ("/chat/completions", {"n": 2}, "n: 2 is not supported"),
        ("/chat/completions", {"logprobs": True}, "logprobs"),
        ("/chat/completions", {"response_format": {"type": "json_object"}}, "response_format"),
        ("/chat/completions", {"tool_choice": "required"}, "tool_choice"),
        ("/chat/completions", {"stop": ["Observation:"]}, "stop"),
        ("/messages", {"stop_sequences": ["x"]}, "stop_sequences"),
        ("/chat/completions", {"max_tokens": 0}, "max_tokens: must be a whole number"),
        ("/chat/completions", {"temperature": -1}, "temperature: must be a number from 0 to 2"),
        ("/responses", {"temperature": "hot"}, "temperature: must be a number from 0 to 2"),
        ("/messages", {"temperature": 3}, "temperature: must be a number from 0 to 2"),
        ("/responses", {"previous_response_id": "r"}, "previous_response_id"),
        ("/responses", {"text": {"format": {"type": "json_schema"}}}, "text.format"),
        ("/responses", {"tools": [{"type": "web_search"}]}, r"tools[0].type"),
        ("/messages", {"tool_choice": {"type": "any"}}, "tool_choice"),
        ("/messages", {"tools": [{"type": "bash_20250124"}]}, "tools[0].type"),
    ],
)
async def test_what_would_change_the_answer_is_refused(
    path: str, more: dict[str, Any], what: str
) -> None:
    one = agent()
    async with one.endpoint() as at, client(at) as http:
        answer = await http.post(path, json=body(path, **more))
        assert answer.status_code == 400
        assert what in message_of(answer.json())
    assert one.record == []


async def test_a_request_that_is_sent_again_gets_the_answer_that_there_is() -> None:
    going = asyncio.Event()

    async def slowly(messages: list[Message], rng: object) -> str:
        await going.wait()
        return "ok"

    one = agent(slowly)
    async with one.endpoint() as at, client(at) as http:
        asked = body(PATHS[0])
        with pytest.raises(httpx.ReadTimeout):  # the client gives up, the turn goes on
            await http.post(PATHS[0], json=asked, timeout=0.2)
        again = {"x-stainless-retry-count": "1"}
        first = asyncio.create_task(http.post(PATHS[0], json=asked, headers=again))
        second = asyncio.create_task(http.post(PATHS[0], json=asked, headers=again))
        await asyncio.sleep(0.05)
        going.set()
        assert (await first).json()["choices"] == (await second).json()["choices"]
        assert len(one.record) == 1
        await http.post(PATHS[0], json=asked)
        assert len(one.record) == 2, "the same request anew is another sample"


async def test_an_error_of_the_run_is_not_asked_again() -> None:
    class Lost:
        asked = 0

        async def answer(self, conversation: Conversation, new: object, options: Options) -> Turn:
            self.asked += 1
            raise InfraError("no replica")

    player = Lost()
    one = Agent(player, episode="e")
    async with one.endpoint() as at, openai.AsyncOpenAI(base_url=at.url, api_key=at.key) as sdk:
        for _ in range(2):
            with pytest.raises(openai.InternalServerError, match="InfraError: no replica"):
                await sdk.chat.completions.create(
                    model="policy", messages=[{"role": "user", "content": "hi"}]
                )
    assert player.asked == 1
    assert isinstance(one.activity.error, InfraError)


async def test_what_an_episode_leaves_unanswered_ends_with_it() -> None:
    ended = asyncio.Event()

    async def never(messages: list[Message], rng: object) -> str:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        return ""

    one = agent(never)
    async with one.endpoint() as at, client(at) as http:
        waiting = asyncio.create_task(http.post(PATHS[0], json=body(PATHS[0])))
        while not one.activity.waiting:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert ended.is_set()
    with pytest.raises(httpx.HTTPError):
        (await waiting).raise_for_status()


async def test_a_request_that_arrives_while_the_episode_ends_is_no_turn() -> None:
    one = agent()
    async with agent().endpoint(), one.endpoint() as at:
        reader, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(at.url).port)
        sent = json.dumps(body(PATHS[0])).encode()
        head = f"POST /v1{PATHS[0]} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {at.key}\r\n"
        writer.write(f"{head}Content-Length: {len(sent)}\r\n\r\n".encode() + sent[:5])
        await asyncio.sleep(0.1)
        episode = server._Server._of_loop[asyncio.get_running_loop()].episodes[at.key]
        await episode.close()
        writer.write(sent[5:])
        assert (await reader.readline()).startswith(b"HTTP/1.1 409")
        writer.close()
    assert one.record == []


async def test_floods_and_slow_senders_do_not_keep_siblings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server, "MAX_LIVE", 8)
    monkeypatch.setattr(server, "READ_S", 0.5)
    monkeypatch.setattr(server, "MAX_BODY", 1 << 20)

    async def never(messages: list[Message], rng: object) -> str:
        await asyncio.Event().wait()
        return ""

    bad, good = agent(never), agent()
    async with bad.endpoint() as at, good.endpoint() as theirs:
        host, port = "127.0.0.1", httpx.URL(at.url).port
        slow = []
        for _ in range(50):
            sender = socket.create_connection((host, port))
            head = f"POST /v1/messages HTTP/1.1\r\nHost: x\r\nx-api-key: {at.key}\r\n"
            sender.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
            slow.append(sender)
        async with client(at) as http, client(theirs) as calm:
            flood = [
                asyncio.create_task(http.post(PATHS[0], json=body(PATHS[0], str(k))))
                for k in range(40)
            ]
            done, _ = await asyncio.wait(flood, return_when=asyncio.FIRST_COMPLETED)
            assert {task.result().status_code for task in done} == {429}
            large = await http.post(PATHS[0], json=body(PATHS[0], "x" * (2 << 20)))
            assert large.status_code == 413
            for k in range(20):
                answer = await calm.post(PATHS[0], json=body(PATHS[0], str(k)))
                assert answer.status_code == 200
            for sender in slow:
                answered = await asyncio.to_thread(sender.recv, 100)
                assert answered.startswith(b"HTTP/1.1 408")
                sender.close()
            for task in flood:
                task.cancel()
            await asyncio.gather(*flood, return_exceptions=True)
    assert len(good.record) == 20
    assert bad.record == []


@pytest.mark.parametrize("path", PATHS)
async def test_events_say_what_the_whole_answer_says(path: str) -> None:
    async with agent().endpoint() as at, client(at) as http:
        whole = (await http.post(path, json=body(path))).json()
        stream = await http.post(path, json=body(path, stream=True))
        assert stream.headers["content-type"].startswith("text/event-stream")
        data = [line[6:] for line in stream.text.splitlines() if line.startswith("data: ")]
        if path == "/chat/completions":
            assert data.pop() == "[DONE]"
        events = [json.loads(line) for line in data]
        assert "ok" in json.dumps(whole)
        assert "ok" in json.dumps(events)


@pytest.mark.parametrize(
    ("own", "used"),
    [
        ({}, (None, None)),
        ({"own_limits": True}, (9, None)),
        ({"own_temperature": True}, (None, 0.5)),
        ({"own_limits": True, "own_temperature": True}, (9, 0.5)),
    ],
)
async def test_the_runs_settings_replace_a_requests(
    own: dict[str, bool], used: tuple[int | None, float | None]
) -> None:
    class Recorder:
        def __init__(self) -> None:
            self.used: list[tuple[int | None, float | None]] = []

        async def answer(
            self, conversation: Conversation, new: Sequence[Message], options: Options
        ) -> Turn:
            self.used.append((options.max_tokens, options.temperature))
            return Turn(conversation.seat, tuple(new), "ok", "stop", state=options.state)

    recorder = Recorder()
    async with Agent(recorder).endpoint(**own) as at, client(at) as http:
        for path, key in zip(PATHS, ("max_tokens", "max_output_tokens", "max_tokens"), strict=True):
            await http.post(path, json=body(path, temperature=0.5, **{key: 9}))
    assert recorder.used == [used] * 3
