"""Servers of OpenEnv: what a reply must be, sessions, rejected actions, and bad servers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, WebSocket

from rayrl.environment.environment import Environment
from rayrl.environment.registry import environment_of, load_env
from rayrl.environment.schemes.schema_actions import NoAction, SchemaActions
from rayrl.errors import ConfigError
from rayrl.rollout.check import check_env
from rayrl.rollout.players import ScriptedPlayer
from rayrl.rollout.rollout import play_episode
from rayrl.types import Episode
from tests.documents import blocks

OPENENV = Path(sys.prefix, "openenv", "bin", "python")  # made by scripts/setup
SERVER = Path(__file__).with_name("openenv_server.py")


@contextlib.contextmanager
def openenv(*file: Path) -> Iterator[str]:
    """The URL of a process with OpenEnv's own server, of a file's `app` or of openenv_server.py."""
    assert OPENENV.exists(), "scripts/setup dev makes it"
    with subprocess.Popen(
        [OPENENV, SERVER, *file], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        port = server.stdout.readline().strip()
        assert port, "it did not start"
        yield f"http://127.0.0.1:{port}"
        assert server.stdin is not None
        server.stdin.close()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with openenv() as found:
        yield found


async def episode(env: Environment, replies: list[str] | str, number: int = 3) -> Episode:
    """An episode in which these are replied, or what a player of the environment does."""
    said = iter(replies)
    player = env.players[replies] if isinstance(replies, str) else lambda messages, rng: next(said)
    (task,) = env.tasks(number, 1)
    agents = {"agent": ScriptedPlayer(player)}
    return await play_episode(env, task, agents, id="e", seed=task.seed, deadline_s=60)


def play(env: Environment, replies: list[str] | str, number: int = 3) -> Episode:
    return asyncio.run(episode(env, replies, number))


def scores(played: Episode) -> dict[str, float]:
    assert played.failure is None, played.failure
    return dict(played.scores["agent"])


def asked(played: Episode) -> list[str]:
    return [turn.prompt[-1].content for turn in played.turns]


def failure(played: Episode) -> tuple[str, str]:
    assert played.failure is not None
    assert len(played.failure.message) < 1_000
    return played.failure.kind, played.failure.message


@pytest.mark.parametrize(
    ("name", "how", "legal", "illegal"),
    [
        (
            "text",
            "Your whole reply is the message. It is the message: what to say.",
            {"hi": "hi", " {} ": "{}", "so <action> I go </action>": "I go"},
            ["", "<action></action>"],
        ),
        (
            "number",
            "Answer with a whole number from 0 to 6 only.",
            {"3": 3, "Column 0, 0!": 0, "<action>6</action> not 5": 6, "2.0": 2},
            ["7", "-1", "1.5", "3 or 4", "three", "1e999", "x3", "", "9" * 400],
        ),
        (
            "measure",
            "Answer with a number from 0 up only.",
            {"0.5": 0.5, "1e2 mm": 100, "3": 3},
            ["0", "-1", "nan", "inf"],
        ),
        (
            "choice",
            "Answer with one of these only: left, right, left turn.",
            {"left": "left", "Right": "right", "go right.": "right", "LEFT TURN": "left turn"},
            ["up", "left or right", "", "rightly"],
        ),
        ("switch", "Answer with one of these only: true, false.", {"True": True}, ["1", "on"]),
        (
            "drawing",
            "Answer with an action, as a JSON object only. Its fields: {",
            {
                '{"title": "A"}': "A",
                'As JSON: ```{"title": "B", "points": [{"x": 1, "next": {"x": 2}}]}```': "B",
            },
            [
                "A",
                "[]",
                "{}",
                '{"title": 1}',
                '{"title": "A", "colour": 1}',
                '{"title": "A", "points": [{"y": 1}]}',
                '{"title": "A", "points": [{"x": NaN}]}',
                '{"title": "A", "points": [{"x": 1}, {"x": 1}, {"x": 1}, {"x": 1}]}',
                '{"a":' * 5_000 + "}" * 5_000,
                '{"title": "a"}',  # its pattern is checked by the server
            ],
        ),
        (
            "tools",
            (
                "Answer with the call of a tool, as a JSON object only: "
                '{"tool_name": …, "arguments": {…}}.'
                "\n\nTools:\n- add: Add two numbers. Arguments: "
            ),
            {'{"tool_name": "add", "arguments": {"a": 2}}': 3},
            [
                "add",
                '{"tool_name": "ad", "arguments": {"a": 2}}',
                '{"tool_name": "add", "arguments": {"a": "two"}}',
                '{"tool_name": "add"}',
                '{"tool_name": ["add"]}',
            ],
        ),
        ("nothing", "Any reply is a step.", {"": {}, "{": {}}, []),
    ],
)
def test_what_is_an_action(
    url: str, name: str, how: str, legal: dict[str, Any], illegal: list[str]
) -> None:
    env = load_env(f"openenv:{url}/{name}").configure({"max_turns": len(illegal) + 1})
    for reply, meant in legal.items():
        played = play(env.configure({"max_turns": 2}), [reply, reply])
        assert scores(played)["illegal"] == 0.0
        first, second = asked(played)
        assert first.startswith(how)
        assert str(meant) in second, "the environment shows what it got"
    reply, *_ = legal
    played = play(env, [*illegal, reply])
    assert scores(played)["illegal"] == len(illegal) / (len(illegal) + 1)
    for said in asked(played)[1:]:
        assert said.startswith("That is no action: ")
        assert len(said) < 1_200


def test_an_episode_is_a_session_with_the_seed_of_its_task(url: str) -> None:
    env = load_env(f"openenv:{url}/text")
    assert env.seats == ("agent",)
    played = play(env, ["a", "b", "c"])
    assert scores(played) == {"reward": 3.0, "illegal": 0.0}
    assert played.rewards == {"agent": 3.0}
    assert asked(played)[1:] == [
        "Reward: 1\n\n1: {'message': 'a'}",
        "Reward: 1\n\n2: {'message': 'b'}",
    ]
    assert play(environment_of(env.spec), ["a", "b", "c"]) == played, "the same elsewhere"
    assert asked(play(env, ["a"] * 3, number=4))[0] != asked(played)[0]
    same = env.configure({"seeded": False, "reset": {"seed": 7, "word": "now"}})
    starts = {asked(play(same, ["a"] * 3, number=number))[0] for number in range(3)}
    assert len(starts) == 1
    assert starts.pop().endswith("\n\nbegin 331 now")


@pytest.mark.parametrize(
    "name",
    [
        "text",
        "number",
        "measure",
        "choice",
        "switch",
        "nothing",
        "drawing",
        "even",
        "door",
        "lone",
        "three",
        "numbers",
        "tools",
    ],
)
def test_it_is_ready_to_train_on(url: str, name: str) -> None:
    env = load_env(f"openenv:{url}/{name}").configure({"max_turns": 4})
    if name not in ("door", "drawing", "even"):  # which have rules that no schema tells
        assert scores(play(env, "random"))["illegal"] == 0.0
    assert check_env(env) == []


def test_what_the_server_rejects_is_illegal_and_told(url: str) -> None:
    played = play(load_env(f"openenv:{url}/door"), ["left", "right", "left", "right", "right"])
    assert scores(played) == {"reward": 3.0, "illegal": 2 / 5}
    assert "no action: the left door is locked\nAnswer with one of" in asked(played)[1]
    played = play(load_env(f"openenv:{url}/drawing"), ['{"title": "a"}', *['{"title": "A"}'] * 3])
    assert scores(played) == {"reward": 3.0, "illegal": 1 / 4}
    assert "title: String should match pattern" in asked(played)[1]


def test_a_session_that_ends_with_a_rejected_action_is_no_failure(url: str) -> None:
    """OpenEnv's server cannot write down an error that a validator raised."""
    played = play(load_env(f"openenv:{url}/even"), ["2", "3"])
    assert scores(played) == {"reward": 1.0, "illegal": 1 / 2}


def test_as_many_episodes_at_once_as_the_server_takes(url: str) -> None:
    limits = {name: load_env(f"openenv:{url}/{name}").slots for name in ("lone", "three", "text")}
    assert limits == {"lone": 1, "three": 3, "text": 8}
    assert load_env(f"openenv:{url}/number").slots is None
    env = load_env(f"openenv:{url}/lone")
    assert {scores(play(env, "random"))["reward"] for _ in range(20)} == {3.0}, "one by one"


async def test_a_full_server_is_no_failure_of_the_environment(url: str) -> None:
    env = load_env(f"openenv:{url}/lone")
    async with asyncio.TaskGroup() as group:
        both = [group.create_task(episode(env, ["a"] * 3)) for _ in range(2)]
    kinds = [one.result().failure for one in both]
    assert kinds.count(None) == 1
    (other,) = [one for one in kinds if one is not None]
    assert other.kind == "infra"
    assert "is full (Server at capacity: 1/1 sessions active" in other.message
    assert "max_concurrent_envs" in other.message


def test_a_field_may_be_named(url: str) -> None:
    env = load_env(f"openenv:{url}/drawing").configure({"field": "title"})
    played = play(env, ["a", "A", "B", "C"])
    assert scores(played) == {"reward": 3.0, "illegal": 1 / 4}
    assert asked(played)[0].startswith("Your whole reply is the title.\n\nbegin")


@pytest.mark.parametrize(
    ("name", "args", "says"),
    [
        ("text", {"field": "mesage"}, "no such field. Did you mean 'message'"),
        ("drawing", {"field": "points"}, "needs title too"),
        ("tools", {"field": "arguments"}, "needs tool_name too"),
        ("text", {"max_turns": 0}, "max_turns=0: at least 1"),
        ("text", {"max_chars": 9}, "max_chars=9: at least 100"),
        ("text", {"timeout_s": 0}, "a number of seconds above 0"),
        ("text", {"reset": {"seed": 1}}, "set env.args.seeded=false"),
        ("text", {"resets": {}}, "Did you mean 'reset'"),
    ],
)
def test_settings_are_checked(url: str, name: str, args: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_env(f"openenv:{url}/{name}").configure(args).tasks(0, 1)
    assert says in str(raised.value)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("", "give the URL of a server, as openenv:http://localhost:8000"),
        ("localhost:8000", "give the URL of a server"),
        ("ftp://localhost", "give the URL of a server"),
        ("http://", "give the URL of a server"),
        ("http://localhost:port", "give the URL of a server"),
        ("http://localhost:8000/?a=1", r"without \? and #"),
        ("http://127.0.0.1:9", "no server answers there .*Start the server first"),
        ("{url}/nowhere", "answers 404 to GET /schema.*is its path right"),
        ("{url}/unmade", "no session at /ws: .* could not make its environment: .*Unmade"),
    ],
)
def test_what_is_no_server_is_refused(url: str, name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as raised:
        load_env(f"openenv:{name.format(url=url)}")
    assert len(str(raised.value)) < 1_000


def test_websocket_urls_and_slashes(url: str) -> None:
    for same in (f"ws{url.removeprefix('http')}/text", f"{url}/text/"):
        env = load_env(f"openenv:{same}")
        assert env.name.endswith("-text")
        assert scores(play(env, ["a"] * 3))["reward"] == 3.0


def test_a_reset_that_fails_is_a_failure_of_the_environment(url: str) -> None:
    env = load_env(f"openenv:{url}/text").configure({"reset": {"broken": True}})
    kind, message = failure(play(env, "random"))
    assert kind == "env"
    assert "could not reset" in message
    assert "the disk is full" in message


def test_a_server_that_does_not_answer(url: str) -> None:
    env = load_env(f"openenv:{url}/stuck").configure({"timeout_s": 3.0})
    try:
        kind, message = failure(play(env, ["a"]))
    finally:
        httpx.get(f"{url}/free")
    assert kind == "infra"
    assert "did not answer step within 3 s (env.args.timeout_s)" in message


def test_huge_observations_are_shortened_or_refused(url: str) -> None:
    env = load_env(f"openenv:{url}/huge").configure({"max_chars": 500})
    played = play(env, ["a", "b"])
    assert len(asked(played)[1]) < 520
    assert "characters left out" in asked(played)[1]
    kind, message = failure(played)
    assert kind == "env"
    assert "answered step with more than 16,777,216 bytes" in message


def test_a_server_that_goes_away() -> None:
    with openenv() as url:
        env = load_env(f"openenv:{url}/text")
    kind, message = failure(play(env, "random"))
    assert kind == "infra"
    assert f"{url}/text cannot be reached" in message


# What is below is no server of OpenEnv, and says what it likes.

SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}


@contextlib.contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """The URL of an application that a thread serves."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        app, log_level="critical", timeout_graceful_shutdown=1, ws="websockets-sansio"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def liar(schema: Any, answers: list[str]) -> FastAPI:
    app = FastAPI()

    @app.get("/schema")
    async def published() -> Any:
        return schema

    @app.websocket("/ws")
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        for answer in answers:
            asks = await websocket.receive_json()
            if asks["type"] == "state":
                await websocket.send_text('{"type": "state", "data": {}}')
                await websocket.receive_json()
                break
            await websocket.send_text(answer)
        await websocket.close()

    return app


def observed(**more: Any) -> str:
    data = {"observation": {"text": "x"}, "reward": None, "done": False, **more}
    return json.dumps({"type": "observation", "data": data})


@pytest.mark.parametrize(
    ("answers", "kind", "says"),
    [
        (["no JSON"], "env", "what is no message of OpenEnv: 'no JSON'"),
        (["[" * 100_000], "env", "no message of OpenEnv"),
        (["[]"], "env", "no message of OpenEnv"),
        (['{"type": "observation", "data": 3}'], "env", "no message of OpenEnv"),
        (['{"type": "observation", "data": {}}'], "env", "no observation and reward"),
        ([observed(), observed(reward="a lot")], "env", "no observation and reward"),
        ([observed(), observed(reward=float("nan"))], "env", "no observation and reward"),
        ([observed(), observed(reward=10**400)], "env", "no observation and reward"),
        ([observed()], "infra", "ended the session"),
        (['{"type": "error", "data": {"errors": [1, {"loc": [1]}]}}'], "env", "could not reset"),
    ],
)
def test_servers_that_talk_nonsense(answers: list[str], kind: str, says: str) -> None:
    with serving(liar({"action": SCHEMA}, answers)) as url:
        found, message = failure(play(load_env(f"openenv:{url}"), ["a", "b"]))
    assert (found, says in message) == (kind, True), message


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ([1], "its /schema is not OpenEnv's"),
        ({}, "its /schema is not OpenEnv's"),
        ({"action": "text"}, "'text' is no JSON schema"),
        ({"action": {"type": "thing"}}, "'thing' is not valid"),
        ({"action": {**SCHEMA, "x": "x" * 2**21}}, "/schema has more than 1,048,576 bytes"),
        (
            {
                "action": {
                    "properties": {"a": {"$ref": "#/$defs/0"}},
                    "$defs": {
                        str(k): {"anyOf": [{"$ref": f"#/$defs/{k + 1}"}] * 2} for k in range(60)
                    },
                }
            },
            "more than 20,000 parts",
        ),
    ],
)
def test_schemas_that_are_none(schema: Any, says: str) -> None:
    with serving(liar(schema, [])) as url, pytest.raises(ConfigError) as raised:
        load_env(f"openenv:{url}")
    assert says in str(raised.value)
    assert len(str(raised.value)) < 1_000


def test_references_are_not_fetched_and_patterns_not_run() -> None:
    """A pattern that takes ages, and a schema elsewhere: both are left to the server."""
    fields = {
        "a": {"type": "string", "pattern": "^(a+)+$"},
        "b": {"$ref": "http://127.0.0.1:9/schema"},
    }
    actions = SchemaActions.of({"type": "object", "properties": fields, "required": ["a"]})
    reply = json.dumps({"a": "a" * 60 + "!", "b": 1})
    assert actions.parse(reply) == json.loads(reply)
    with pytest.raises(NoAction, match="a: 1 is not of type 'string'"):
        actions.parse('{"a": 1}')


def test_the_server_of_the_page(tmp_path: Path) -> None:
    """It is played as the page shows it."""
    ((_, code),) = [block for block in blocks("docs/schemes/openenv.md") if block[0] == "python"]
    file = tmp_path / "heap_server.py"
    file.write_text(code)
    with openenv(file) as url:
        env = load_env(f"openenv:{url}")
        assert env.slots == 8
        assert check_env(env) == []
        played = play(env.configure({"reset": {"largest": 20}}), ["4", *["1"] * 20])
        first, second, third, *_ = asked(played)
        how = "Answer with a whole number from 1 to 3 only."
        start = f"{how} It is the stones: how many stones to take.\n\nleft: "
        assert first.startswith(start)
        assert second == (f"That is no action: stones: 4 is greater than the maximum of 3.\n{how}")
        left = int(first.removeprefix(start)) - 1
        assert third in [f"Reward: 0\n\nleft: {left - taken}" for taken in (1, 2, 3)]
