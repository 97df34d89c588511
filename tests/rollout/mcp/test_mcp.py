"""Tools of MCP servers: sessions, checks, results as text, and servers that fail."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from aiohttp import web

import rayrl
from rayrl import Agent, ConfigError, EnvError, InfraError, Message, ScriptedPlayer, Task
from rayrl.chat.text_protocol import describe_lines
from rayrl.chat.tools import Toolkit
from rayrl.rollout.mcp import session as sessions
from tests.apart import free_port

HERE = Path(__file__).parent
REAL = [sys.executable, HERE / "server.py"]
ROUGH = [sys.executable, "-S", HERE / "rough_server.py"]


def play(
    player: Callable[..., str] | Sequence[str],
    server: Any,
    *,
    size: int = 1,
    deadline_s: float | None = None,
    retries: int = 0,
    **options: Any,
) -> list[rayrl.Episode]:
    """Play a group whose environment offers the server's tools."""

    @rayrl.env(tasks=[Task()], rewards={"n": 1.0})
    async def uses(task: Task, agent: Agent) -> rayrl.Scores:
        async with rayrl.mcp(server, **options) as tools:
            await agent("Go.", tools=tools)
        return {"n": 1.0}

    def replies(messages: Sequence[Message], rng: Any) -> str:
        return str(player[sum(m.role == "assistant" for m in messages)])  # type: ignore[index]

    function = player if callable(player) else replies
    players = {"agent": ScriptedPlayer(function)}
    group = asyncio.run(
        rayrl.play_group(
            uses, Task(), players, id="g", size=size, retries=retries, deadline_s=deadline_s
        )
    )
    return list(group.episodes)


def call(name: str, text: str = "") -> str:
    return rayrl.format_call(name, {"text": text})


def results(episode: rayrl.Episode) -> list[str]:
    assert episode.failure is None, episode.failure.message
    return [message.content for turn in episode.turns[1:] for message in turn.prompt]


def assert_gone(pids: Sequence[int]) -> None:
    """Nothing is left of these, but perhaps zombies that somebody else has to reap."""
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            while process.status() != psutil.STATUS_ZOMBIE:
                pass


KINDS = """first
[image, image/png, 5 bytes]
[audio, audio/wav, 2 bytes]
[notes: file:///notes]
inside
[application/pdf, 3 bytes: file:///b]"""
CALLS: list[tuple[str, dict[str, Any], str]] = [
    ("add", {"a": 1, "b": 2}, "3"),
    ("add", {"a": 1.0}, "1"),
    ("add", {"a": "1"}, "Error: add: argument 'a': '1' is not of type 'integer'"),
    ("add", {}, "Error: add: 'a' is a required property"),
    ("ad", {}, "Error: there is no tool 'ad'. Did you mean 'add'? Tools: add, count, far, "),
    ("far", {"point": {"x": -3, "y": 4}, "unit": "km"}, "7 km"),
    ("far", {"point": {"x": 3, "y": -4}}, "Error: far: argument 'point.y': -4 is less than the "),
    ("far", {"point": {"x": 3}, "unit": "cm"}, "Error: far: argument 'unit': 'cm' is not one of "),
    ("fails", {"reason": "of é \ud83d"}, "Error: fails: Error executing tool fails: of é \ufffd"),
    ("repeat", {"text": "ab", "times": 1000}, "abab"),
    ("show.all_kinds", {}, KINDS),
    ("data", {}, '{"é": [1, null]}'),
    ("count", {}, "1"),
    ("count", {}, "2"),
]


def test_calls_of_a_real_server_and_what_the_model_is_told() -> None:
    replies = [rayrl.format_call(name, arguments) for name, arguments, _ in CALLS]
    (episode,) = play(["\n".join(replies), "Done."], REAL, max_chars=300)
    told = results(episode)
    for said, (_, _, expected) in zip(told, CALLS, strict=True):
        assert said.startswith(expected)
    assert told[9].count("ab") < 150
    assert "characters left out" in told[9]
    assert episode.scores["agent"]["tool_calls"] == len(CALLS)
    assert episode.scores["agent"]["tool_errors"] == 6
    shown = {tool["function"]["name"]: tool["function"] for tool in episode.turns[0].tools}
    assert shown["add"]["description"] == "Add two numbers.\n\nOf any size."
    assert shown["add"]["parameters"]["required"] == ["a"]
    assert "CALL add: {" in (text := describe_lines(episode.turns[0].tools))
    assert " - Add two numbers. Of any size.\n" in text


async def test_what_it_started_ends_with_it() -> None:
    async with rayrl.mcp(f"stdio:{sys.executable} {HERE / 'server.py'}", prefix="x_") as tools:
        pids = json.loads(await tools.call("x_family"))
        assert [tool.name for tool in tools][:2] == ["x_add", "x_count"]
        assert await tools[0](a=1) == "1"
        for name, arguments, what in [
            ("x_ad", {}, "there is no tool 'x_ad'. Did you mean 'x_add'?"),
            ("x_add", {}, "'a' is a required property"),
            ("x_fails", {"reason": "no luck"}, "no luck"),
        ]:
            with pytest.raises(EnvError, match=what):
                await tools.call(name, **arguments)
    assert len(pids) == 3
    assert_gone(pids)
    with pytest.raises(EnvError, match="its session is over"):
        await tools.call("x_count")


# --- sessions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
def test_who_shares_a_server(shared: bool) -> None:
    told = [results(e) for e in play([call("pid") * 2, ""], ROUGH, size=3, shared=shared)]
    assert len({pid for pids in told for pid in pids}) == (1 if shared else 3)
    assert_gone([int(pids[0]) for pids in told])


async def test_a_shared_session_is_kept_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    async def pid() -> int:
        async with rayrl.mcp(ROUGH, shared=True) as tools:
            return int(await tools.call("pid", text=""))

    first = await pid()
    assert await pid() == first
    monkeypatch.setattr(sessions, "LINGER_S", 0)
    assert await pid() == first
    while psutil.pid_exists(first):  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert await pid() != first


def test_two_servers_in_one_episode() -> None:
    @rayrl.env(tasks=[Task()], rewards={"n": 1.0})
    async def both(task: Task, agent: Agent) -> rayrl.Scores:
        async with rayrl.mcp(ROUGH) as one, rayrl.mcp(ROUGH, prefix="other_") as two:
            await agent("Go.", tools=[*one, *two], protocol="text")
            with pytest.raises(ConfigError, match=r"got echo, pid, .* more than once: .*prefix="):
                Toolkit([*one, *one])
        return {"n": 1.0}

    replies = iter(["CALL echo: a\nCALL other_echo: b\nCALL pid: c\nCALL other_pid: d", "."])
    player = ScriptedPlayer(lambda messages, rng: next(replies))
    episode = asyncio.run(rayrl.play_episode(both, Task(), {"agent": player}, id="e"))
    a, b, c, d = results(episode)[0].splitlines()
    assert (a, b) == ("RESULT echo: a", "RESULT other_echo: b")
    assert c.split()[-1] != d.split()[-1]


# --- servers that fail --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("server", "tool", "what"),
    [
        (ROUGH, "die", "' ended with status 3: no more"),
        (ROUGH, "hang", "did not answer a call of 'hang' within 5 s: this is no message"),
        (ROUGH, "long_line", "writes to its stdout without being asked, more than 16 MiB"),
        (ROUGH, "many_lines", "writes to its stdout without being asked, more than 16 MiB"),
        (ROUGH, "deaf", "closed its stdout"),
        (ROUGH, "odd", "does not speak MCP: ValidationError"),
        ([*ROUGH, "mute"], "", "did not list its tools within 1 s"),
        ([*ROUGH, "endless"], "", "its list of tools does not end"),
        (["no-such"], "", "MCP server 'no-such' cannot be started: there is no such command"),
        ([sys.executable, "-c", "raise SystemExit('x')"], "", "ended with status 1: x"),
        (["cat"], "", "MCP server 'cat' "),
    ],
)
def test_failures_are_the_environments_and_spare_siblings(
    server: list[str], tool: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rayrl.rollout.mcp.transports.GRACE_S", 0.2)
    turns = iter([call(tool)] if tool else [])
    first, *siblings = sorted(
        play(
            lambda messages, rng: next(turns, "") if len(messages) == 1 else "",
            server,
            size=2 if tool else 1,
            timeout_s=next((s for s in (1, 5) if f"within {s} s" in what), 60),
        ),
        key=lambda episode: episode.failure is None,
    )
    assert first.failure is not None
    assert first.failure.kind == "env"
    assert what in first.failure.message
    assert [sibling.failure for sibling in siblings] == [None] * len(siblings)


def test_an_environment_may_score_the_end_of_a_server() -> None:
    @rayrl.env(tasks=[Task()], rewards={"n": 1.0})
    async def scores(task: Task, agent: Agent) -> rayrl.Scores:
        async with rayrl.mcp(ROUGH) as tools:
            try:
                await agent("Go.", tools=tools)
            except EnvError:
                with pytest.raises(EnvError, match="ended with status 3"):
                    await tools.call("echo", text="")
                return {"n": -1.0}
        return {"n": 1.0}

    player = ScriptedPlayer(lambda messages, rng: call("die"))
    episode = asyncio.run(rayrl.play_episode(scores, Task(), {"agent": player}, id="e"))
    assert episode.rewards == {"agent": -1.0}


def test_a_shared_server_that_ends_is_started_again(tmp_path: Path) -> None:
    """Whose call it was is not known, so both episodes go on from their recorded turns."""
    server = [*ROUGH, "", tmp_path / "died"]
    episodes = play([call("die_once", "a"), ""], server, size=2, shared=True, retries=1)
    assert [results(episode) for episode in episodes] == [["a"]] * 2
    assert {episode.replayed for episode in episodes} <= {0, 1}
    assert any(episode.replayed for episode in episodes)
    (episode,) = play([call("die", "a"), ""], ROUGH, shared=True)
    assert episode.failure is not None
    assert episode.failure.kind == "infra"


@pytest.mark.parametrize("shared", [False, True])
def test_the_deadline_kills_the_server(shared: bool, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    (episode,) = play([call("hang")], [*ROUGH, "", pid], deadline_s=4, shared=shared)
    assert episode.failure is not None
    assert episode.failure.kind == "env"
    assert "did not end within 4 s" in episode.failure.message
    assert_gone([int(pid.read_text())])


async def test_cancelling_kills_the_server(tmp_path: Path) -> None:
    pid = tmp_path / "pid"

    async def use() -> None:
        async with rayrl.mcp([*ROUGH, "", pid]) as tools:
            await tools.call("hang", text="")

    using = asyncio.create_task(use())
    while not pid.exists() or not pid.read_text():  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    using.cancel()
    with pytest.raises(asyncio.CancelledError):
        await using
    assert_gone([int(pid.read_text())])


async def test_a_call_that_the_server_refuses_is_told() -> None:
    async with rayrl.mcp(ROUGH) as tools:
        session = tools[0].function.args[0]  # type: ignore[attr-defined]
        with pytest.raises(Exception, match="unknown tool"):
            await session.call("no-such", {"text": ""})
        assert await tools.call("echo", text="on") == "on"


# --- HTTP ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    port = free_port()
    words = [*REAL, "--http", str(port)]
    with subprocess.Popen(words, stderr=subprocess.DEVNULL) as running:
        while True:
            with suppress(httpx.TransportError):
                httpx.get(f"http://127.0.0.1:{port}/", trust_env=False)
                break
            assert running.poll() is None
        yield f"http://127.0.0.1:{port}/mcp"
        running.kill()


def test_a_server_with_a_url(url: str) -> None:
    count = rayrl.format_call("count", {})
    for shared in (False, True):
        told = [results(e) for e in play([count, count, ""], url, size=2, shared=shared)]
        assert {said for of_one in told for said in of_one} == set("1234" if shared else "12")
    (episode,) = play([rayrl.format_call("fails", {"reason": "é"}), ""], url)
    assert results(episode) == ["Error: fails: Error executing tool fails: é"]


async def test_a_url_without_a_server(url: str) -> None:
    with pytest.raises(EnvError, match="HTTP status 404"):
        async with rayrl.mcp(url.removesuffix("mcp") + "other"):
            pass
    with pytest.raises(InfraError, match=r"MCP server 'http://127.0.0.1:.* ConnectError"):
        async with rayrl.mcp(f"http://127.0.0.1:{free_port()}/mcp"):
            pass


REFUSED = '{"jsonrpc": "2.0", "id": 1, "error": {"code": -32600, "message": "no luck"}}'


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("first", "then", "kind", "what"),
    [
        (503, 0, InfraError, "HTTP status 503"),
        (429, 0, InfraError, "HTTP status 429"),
        (401, 0, EnvError, "HTTP status 401"),
        (400, 0, EnvError, "refuses the session: no luck"),
        (200, 404, InfraError, "HTTP status 404: it has lost the session"),
        (200, 500, InfraError, "HTTP status 500"),
        (200, 403, EnvError, "HTTP status 403"),
    ],
)
async def test_http_statuses(
    first: int, then: int, kind: type[Exception], what: str, shared: bool
) -> None:
    async def answer(request: web.Request) -> web.Response:
        asked = await request.json() if request.method == "POST" else {}
        if "id" not in asked:
            return web.Response(status=202 if asked else 405)
        assert request.headers["x-key"] == "k"
        result: dict[str, Any] = {"tools": [{"name": "go", "inputSchema": {"type": "object"}}]}
        status = then if asked["method"] == "tools/call" else first
        if asked["method"] == "initialize":
            result = {"protocolVersion": "2025-06-18", "capabilities": {"tools": {}}}
            result["serverInfo"] = {"name": "http", "version": "1"}
        if status == 400:
            return web.Response(status=400, text=REFUSED, content_type="application/json")
        if status != 200:
            return web.Response(status=status, text="no")
        body = {"jsonrpc": "2.0", "id": asked["id"], "result": result}
        return web.json_response(body, headers={"mcp-session-id": "s"})

    app = web.Application()
    app.router.add_route("*", "/mcp", answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    at = f"http://127.0.0.1:{runner.addresses[0][1]}/mcp"
    with pytest.raises(InfraError if shared else kind, match=what):
        async with rayrl.mcp(at, headers={"x-key": "k"}, shared=shared) as tools:
            await tools.call("go")
    await runner.cleanup()


# --- what can be wrong --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("server", "options", "what"),
    [
        ("python server.py", {}, "write 'stdio:COMMAND', a list of words"),
        ("stdio:", {}, "there is no command"),
        ([], {}, "there is no command"),
        ("stdio:echo 'x", {}, "cannot be split into words: No closing quotation"),
        ("http://a/mcp", {"env": {"A": "b"}}, "env and cwd are for servers that are started"),
        ("stdio:a", {"headers": {"A": "b"}}, "headers are for servers with a URL"),
        ("stdio:a", {"timeout_s": 0}, "timeout_s=0: must be above 0"),
        ("stdio:a", {"max_chars": 10}, "max_chars=10"),
    ],
)
async def test_arguments_are_checked(server: Any, options: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        async with rayrl.mcp(server, **options):
            pass


async def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'rayrl\[mcp\]'"):
        async with rayrl.mcp(ROUGH):
            pass


def test_a_server_must_be_opened_first() -> None:
    with pytest.raises(ConfigError, match=r"async with rayrl\.mcp"):
        Toolkit(rayrl.mcp(ROUGH))  # type: ignore[arg-type]
