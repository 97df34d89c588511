from __future__ import annotations

import asyncio
import contextlib
import gzip
import itertools
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

import rayrl
from rayrl.chat.tools import CUT_OFF
from rayrl.config import EndpointConfig
from rayrl.errors import ConfigError, InfraError, Refused, RunFailed
from rayrl.rollout.agent import Agent, Options
from rayrl.rollout.conversation import Conversation, Throttling
from rayrl.rollout.endpoint import EndpointPlayer, check_reachable, split_limits
from rayrl.rollout.episode_io import episode_from_json, episode_to_json
from rayrl.rollout.rollout import play_group
from rayrl.types import Sampling, Task, Usage, sum_usage, system, user

Answer = tuple[int, dict[str, str], Any]  # status, headers, body


class Server:
    """A real HTTP server on a free port; it gives `answers` in order and repeats the last."""

    def __init__(self, *answers: Answer | Callable[[], Any]) -> None:
        self.answers = list(answers)
        self.seen: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.asked: list[dict[str, str]] = []
        self.status = 404  # for other requests; 0 closes the connection
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
                if lines[0].startswith("GET"):  # a probe; a server need not support it
                    self.asked.append(headers)
                    if not self.status:
                        break
                    writer.write(b"HTTP/1.1 %d X\r\nContent-Length: 0\r\n\r\n" % self.status)
                    continue
                body = json.loads(await reader.readexactly(int(headers["content-length"])))
                headers["path"] = lines[0]
                self.seen.append((headers, body))
                self.live += 1
                self.most = max(self.most, self.live)
                answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
                if callable(answer):
                    answer = await answer()
                self.live -= 1
                if answer is None:  # close the connection
                    break
                status, extra, said = answer
                if isinstance(said, bytes):
                    data = said
                else:
                    data = (said if isinstance(said, str) else json.dumps(said)).encode()
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


def said(content: str | None, finish: str = "stop", usage: Any = None, **more: Any) -> Answer:
    message = {"role": "assistant", "content": content, **more}
    data = {"choices": [{"message": message, "finish_reason": finish}]}
    return 200, {}, data | ({"usage": usage} if usage is not None else {})


def endpoint(server: Server, retries: int = 3, **more: Any) -> EndpointPlayer:
    sampling = more.pop("sampling", None)
    settings = {"api_key_env": "RAYRL_TEST_KEY", "timeout_s": 60.0, **more}
    config = EndpointConfig(url=server.url, model="m", retries=retries, **settings)
    return EndpointPlayer(config, backoff_s=0.01, sampling=sampling)


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
        (200, {}, {}),
        (200, {}, {"choices": [{"message": {"content": 7}}]}),
        (200, {}, b'{"choices": [{"message": {"content": "\xff\xfe"}}]}'),
        (200, {}, b'{"choices": [{"message": {"cont'),
        (200, {}, b"[" * 100_000),
        (200, {"Content-Encoding": "gzip"}, b"not gzip"),
        (200, {"Content-Encoding": "gzip"}, gzip.compress(b'{"choices": [1, 2, 3]}')[:-12]),
        (500, {"Content-Encoding": "deflate"}, b"not deflate"),
        (200, {}, {"error": {"code": 502, "message": "the provider is down"}}),
        (200, {}, {"error": "odd"}),
        (200, {}, {"choices": [{"message": {"content": "x"}, "finish_reason": "error"}]}),
        (200, {}, {"choices": [{"message": {"content": "x"}, "error": {"code": 502}}]}),
        hang_up,
    ],
)
async def test_which_statuses_are_retried(bad: Any) -> None:
    async with serving(bad, bad, said("ok")) as server, endpoint(server) as player:
        assert await Agent(player)("a") == "ok"
    assert len(server.seen) == 3
    assert server.seen[0][1] == server.seen[2][1]


async def test_timeouts_are_retried() -> None:
    async with serving(never, said("ok")) as server, endpoint(server, timeout_s=2.0) as player:
        assert await Agent(player)("a") == "ok"


async def test_retry_after_is_honoured() -> None:
    busy = (429, {"Retry-After": "0.4"}, "")
    async with serving(busy, said("ok")) as server, endpoint(server) as player:
        throttling, began = Throttling(), time.perf_counter()
        await Agent(player, throttling=throttling)("a")
    assert time.perf_counter() - began >= 0.4
    assert throttling.seconds >= 0.4


async def test_retries_exhausted() -> None:
    async with serving((503, {}, "busy")) as server, endpoint(server, retries=1) as player:
        with pytest.raises(InfraError, match=r"in 2 tries; the last failed with HTTP 503: busy"):
            await Agent(player)("a")
    assert len(server.seen) == 2


async def test_an_unreachable_server() -> None:
    server = Server()
    server.url = "http://127.0.0.1:9/v1"
    async with endpoint(server, retries=0) as player:
        with pytest.raises(RunFailed, match=r"in 1 tries; .*ConnectError.*same command resumes"):
            await Agent(player)("a")
    with pytest.raises(ConfigError, match=r"endpoint\.url=http://127.*no server answers there"):
        await check_reachable(EndpointConfig(url=server.url, model="m"))


async def test_any_response_counts_as_reachable() -> None:
    async with serving(said("ok")) as server:
        await check_reachable(EndpointConfig(url=server.url, model="m"))
        server.status = 401
        with pytest.raises(ConfigError, match=r"HTTP 401.*endpoint\.api_key_env"):
            await check_reachable(EndpointConfig(url=server.url, model="m"))
    assert not server.seen  # nothing was spent


async def test_an_exhausted_quota_is_not_retried() -> None:
    empty = (429, {"Retry-After": "30"}, {"error": {"code": "insufficient_quota"}})
    async with serving(empty) as server, endpoint(server) as player:
        with pytest.raises(ConfigError, match="no quota left"):
            await Agent(player)("a")
    assert len(server.seen) == 1


COUNTED = {
    "prompt_tokens": 100,
    "completion_tokens": 7,
    "prompt_tokens_details": {"cached_tokens": 64},
    "completion_tokens_details": {"reasoning_tokens": 5},
}


async def test_usage_of_a_call() -> None:
    partly = {"prompt_tokens": 10, "completion_tokens": 1, "prompt_tokens_details": None}
    answers = (said("a", usage=COUNTED), said("b", usage=partly), said("c"))
    async with serving(*answers) as server, endpoint(server) as player:
        agent = Agent(player)
        for _ in range(3):
            await agent("go")
    costs = [turn.usage for turn in agent.record]
    assert costs == [
        Usage(prompt=100, completion=7, cached=64, reasoning=5),
        Usage(prompt=10, completion=1),
        Usage(unknown=1),  # nothing is estimated
    ]
    assert sum_usage(costs) == Usage(3, 1, 110, 8, 64, 5)


async def test_keys_of_the_body() -> None:
    extra = {"reasoning_effort": "low", "top_p": None, "temperature": 1.0}
    async with serving(said("ok")) as server, endpoint(server, extra=extra) as player:
        await Agent(player)("a", max_tokens=5)
    assert server.seen[0][1] == {
        "model": "m",
        "messages": [{"role": "user", "content": "a"}],
        "temperature": 1.0,
        "max_tokens": 5,
        "reasoning_effort": "low",
    }


async def test_a_server_that_wants_the_new_name_of_the_limit(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
    refused = (400, {}, {"error": {"message": words}})
    answers = (refused, refused, said("ok"))  # two were in flight when the first was refused
    async with serving(*answers) as server, endpoint(server, retries=0) as player:
        await asyncio.gather(Agent(player)("a", max_tokens=5), Agent(player)("b", max_tokens=5))
        await Agent(player)("c", max_tokens=5)
    keys = [next(key for key in body if key.startswith("max_")) for _, body in server.seen]
    assert keys == ["max_tokens"] * 2 + ["max_completion_tokens"] * 3
    assert capsys.readouterr().err.count("wants max_completion_tokens instead") == 1


async def test_retry_after_pauses_every_request() -> None:
    busy = (429, {"Retry-After": "3"}, "")
    async with serving(busy, said("ok")) as server, endpoint(server) as player:
        first = asyncio.create_task(Agent(player)("a"))
        while not player.limiter.paused_s():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        throttling = Throttling()
        agents = [Agent(player, throttling=throttling) for _ in range(9)]
        await asyncio.gather(first, *[agent("b") for agent in agents])
    assert len(server.seen) == 11
    assert 0 < throttling.seconds < 6  # not nine times three


async def test_throttled_time_does_not_count_towards_the_deadline() -> None:
    @rayrl.env(tasks=[rayrl.Task()], rewards={"s": 1.0})
    async def chat(task: rayrl.Task, agent: Agent) -> rayrl.Scores:
        for _ in range(3):
            await agent("go")
        return {"s": 1.0}

    # one request per second, and a debt of two
    limits = {"requests_per_minute": 60}
    async with serving(said("ok")) as server, endpoint(server, **limits) as player:
        player.limiter.reserve()
        player.limiter.reserve()
        episode = await rayrl.play_episode(
            chat, rayrl.Task(), {"agent": player}, id="e", deadline_s=3.5
        )
    assert episode.failure is None
    assert episode.seconds > 3.5


@pytest.mark.parametrize("same", [True, False])
async def test_only_usage_that_a_retry_discards_is_retried_usage(same: bool) -> None:
    began = itertools.count()

    @rayrl.env(tasks=[rayrl.Task()], rewards={"s": 1.0})
    async def chat(task: rayrl.Task, agent: Agent) -> rayrl.Scores:
        await agent("one" if same else f"one {next(began)}")
        await agent("two")
        return {"s": 1.0}

    paid = said("ok", usage=COUNTED)
    answers = (paid, (503, {}, "busy"), paid)
    async with serving(*answers) as server, endpoint(server, retries=0) as player:
        group = await rayrl.play_group(
            chat, rayrl.Task(), {"agent": player}, id="g", size=1, backoff_s=0.01
        )
    (episode,) = group.episodes
    assert episode.failure is None
    assert (episode.replayed, episode.replay_mismatches) == ((1, 0) if same else (0, 1))
    assert len(server.seen) == (3 if same else 4)  # including the one that failed
    assert episode.retried_usage == (None if same else Usage(1, 0, 100, 7, 64, 5))
    n = 2 if same else 3
    assert episode.usage == Usage(n, 0, n * 100, n * 7, n * 64, n * 5)
    assert episode_from_json(json.loads(json.dumps(episode_to_json(episode)))) == episode


@pytest.mark.parametrize(
    ("code", "remedy"),
    [(401, "endpoint.api_key_env"), (404, "endpoint.model='m'"), (403, "endpoint.model='m'")],
)
async def test_refusals_say_what_to_change(code: int, remedy: str) -> None:
    async with serving((code, {}, "no way")) as server, endpoint(server) as player:
        with pytest.raises(ConfigError, match=f"HTTP {code}.*{remedy}.*no way"):
            await Agent(player)("a")
    assert len(server.seen) == 1  # a retry would not help


@rayrl.env(tasks=[Task()], rewards={"s": 1.0})
async def once(task: Task, agent: Agent) -> rayrl.Scores:
    with contextlib.suppress(Exception):  # which must not hide the failure
        await agent("go")
    return {"s": 1.0}


UNKNOWN = (400, {}, "no way")
LONG = (
    "This model's maximum context length is 100 tokens. However, you requested 164 tokens (80 in "
    "the messages, 84 in the completion)."
)


def too_long(message: str = LONG) -> Answer:
    return 400, {}, {"error": {"message": message, "code": "context_length_exceeded"}}


async def test_an_unknown_refusal_is_setup_if_a_harmless_conversation_is_refused_too() -> None:
    async with serving(UNKNOWN) as server, endpoint(server) as player:
        with pytest.raises(ConfigError, match=r"HTTP 400.*sampling settings.*no way"):
            await Agent(player)("a")
    assert [body["messages"][0]["content"] for _, body in server.seen] == ["a", "Hello!"]
    first, other = (body | {"messages": None} for _, body in server.seen)
    assert first == other  # the same settings


async def test_an_unknown_refusal_is_content_if_another_conversation_was_answered() -> None:
    async with (
        serving(said("ok"), UNKNOWN, UNKNOWN, said("on")) as server,
        endpoint(server) as player,
    ):
        assert await Agent(player)("a") == "ok"
        for _ in range(2):
            with pytest.raises(Refused, match=r"refused this conversation.*no way"):
                await Agent(player)("b")
        assert await Agent(player)("c") == "on"
    assert len(server.seen) == 4  # no other request


async def test_the_harmless_conversation_may_have_to_be_retried() -> None:
    busy = (503, {}, "")
    async with (
        serving(UNKNOWN, busy, UNKNOWN, said("hello"), UNKNOWN) as server,
        endpoint(server) as player,
    ):
        for _ in range(2):
            with pytest.raises(Refused):
                await Agent(player)("a")
        options = Options(0, "", tools=({"type": "function"},))
        with pytest.raises(ConfigError):  # no request with these settings was answered
            await player.answer(Conversation("s", "agent"), [user("a")], options)
    assert len(server.seen) == 7


@pytest.mark.parametrize(
    ("refusal", "limits"),
    [
        (too_long(), [84, 20]),  # the limit is in the message
        (too_long("too long"), [84, 42]),  # it is not
    ],
)
async def test_a_reply_is_limited_to_what_fits(refusal: Answer, limits: list[int]) -> None:
    async with (
        serving(refusal, said("cut", "length")) as server,
        endpoint(server, sampling=Sampling(max_tokens=84)) as player,
    ):
        reply = await Agent(player)("a")
    assert (reply, reply.finish) == ("cut", "length")
    assert [body["max_tokens"] for _, body in server.seen] == limits


@pytest.mark.parametrize(
    ("refusal", "asked"),
    [
        (too_long(LONG.replace("80", "100")), 1),
        (too_long(LONG), 1 + 5),  # the message is wrong: 84, 20, 10, 5, 2, 1
        (too_long("too long"), 7),  # 84, 42, 21, 10, 5, 2, 1
        ((413, {}, "<html>"), 1),
        ((400, {}, {"error": {"code": "content_filter", "message": "hate"}}), 1),
        ((400, {}, {"error": {"param": "messages[0].content", "message": "empty"}}), 1),
        ((200, {}, {"error": {"code": 400, "param": "messages", "message": "odd"}}), 1),
        (said("I was go", "content_filter"), 1),
    ],
)
async def test_a_conversation_that_is_refused_is_recorded_once(refusal: Answer, asked: int) -> None:
    async with (
        serving(refusal) as server,
        endpoint(server, sampling=Sampling(max_tokens=84)) as player,
    ):
        group = await play_group(once, Task(), {"agent": player}, id="g", size=1, retries=3)
    (episode,) = group.episodes
    assert episode.failure is not None
    assert episode.failure.kind == "refused"
    assert "refused this conversation" in episode.failure.message
    assert len(server.seen) == asked
    assert episode_from_json(json.loads(json.dumps(episode_to_json(episode)))) == episode


async def test_a_server_that_names_both_limits_because_of_the_context() -> None:
    both = (
        "'max_tokens' or 'max_completion_tokens' is too large: 84. This model's maximum context "
        "length is 100 tokens and your request has 80 input tokens"
    )
    refusal = (400, {}, {"message": both, "type": "BadRequestError", "code": 400})
    async with (
        serving(refusal, said("ok")) as server,
        endpoint(server, sampling=Sampling(max_tokens=84)) as player,
    ):
        assert await Agent(player)("a") == "ok"
    assert [body["max_tokens"] for _, body in server.seen] == [84, 20]


@pytest.mark.parametrize(
    ("content", "reason", "text", "finish"),
    [
        ("a", "stop", "a", "stop"),
        ("a", None, "a", "stop"),
        ("a", "tool_calls", "a", "stop"),
        ("a", "max_tokens", "a", "length"),
        ("a", "model_length", "a", "length"),
        (None, "stop", "", "stop"),
        ([], "stop", "", "stop"),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "stop", "ab", "stop"),
        ([{"type": "thinking", "thinking": [{"text": "hm"}]}, {"text": "b"}], "stop", "b", "stop"),
        (
            ["a", {"type": "image_url"}, {"type": "output_text", "text": "b"}],
            "LENGTH",
            "ab",
            "length",
        ),
    ],
)
async def test_content_and_finish_reason_of_a_reply(
    content: Any, reason: Any, text: str, finish: str
) -> None:
    async with serving(said(content, reason)) as server, endpoint(server) as player:
        reply = await Agent(player)("a")
    assert (reply, reply.finish) == (text, finish)


@pytest.mark.parametrize("data", [{}, {"choices": []}, {"choices": [{"message": None}]}])
async def test_not_a_completion(data: Any) -> None:
    async with serving((200, {}, data)) as server, endpoint(server) as player:
        with pytest.raises(InfraError, match="not a chat completion"):
            await Agent(player)("a")


async def test_concurrency_is_bounded() -> None:
    async def slow() -> Answer:
        while server.most < 3:  # noqa: ASYNC110 - all who may ask have asked; more must not come
            await asyncio.sleep(0.01)
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
    # text in the episode, so that a model can be trained on it
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


async def test_native_arguments_that_are_not_json() -> None:
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


@pytest.mark.parametrize("arguments", ['{"a": 1, ', ""])
async def test_a_truncated_native_call(arguments: str) -> None:
    whole = {"id": "x", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
    broken = {"id": "y", "function": {"name": "add", "arguments": arguments}}
    calling = said(None, "length", tool_calls=[whole, broken])
    async with serving(calling, said("3")) as server, endpoint(server) as player:
        agent = Agent(player)
        assert await agent("?", tools=[add]) == "3"
    results = [message.content for message in agent.messages if message.role == "tool"]
    assert results == ["3", f"Error: {CUT_OFF}"]


async def test_native_arguments_that_are_not_an_object() -> None:
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


def test_workers_share_the_limits() -> None:
    limits = EndpointConfig(concurrency=16, requests_per_minute=60, tokens_per_minute=300)
    one = split_limits(limits, 3)
    assert (one.concurrency, one.requests_per_minute, one.tokens_per_minute) == (5, 20, 100)
    assert split_limits(limits, 1) == limits


def test_missing_settings() -> None:
    with pytest.raises(ConfigError, match=r"endpoint\.url=''"):
        EndpointPlayer(EndpointConfig(model="m"))
    with pytest.raises(ConfigError, match=r"endpoint\.model is empty"):
        EndpointPlayer(EndpointConfig(url="http://x/v1"))
