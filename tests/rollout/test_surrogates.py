"""Lone surrogates are replaced on every path that text takes."""

from __future__ import annotations

import io
import json
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import rayrl
from rayrl.chat.text_protocol import parse_lines
from rayrl.chat.tools import Tool, format_call, parse_calls
from rayrl.config import EndpointConfig
from rayrl.report.console import episode_panel
from rayrl.rollout.agent import Agent
from rayrl.rollout.endpoint import EndpointPlayer
from rayrl.rollout.episode_io import read_episodes, write_episodes
from rayrl.rollout.players import HumanPlayer, PolicyPlayer, ScriptedPlayer
from rayrl.rollout.rollout import GroupPlan
from rayrl.server.app import Service
from rayrl.types import (
    Failure,
    Message,
    Sampling,
    Task,
    ToolCall,
    Turn,
    derive_seed,
    replace_surrogates,
    user,
)
from tests.act import Instant, chat, collect
from tests.server.test_app import Scripted, listening

few = settings(max_examples=100)
HALF, OTHER = "\ud83d", "\ude00"
WHOLE, LOST = "😀", "\ufffd"


def look(word: str) -> str:
    """Look a word up, \ud83d or not.

    Args:
        word: what to look up, such as \ud83d.
    """
    return json.loads(f'["\\ude00", {json.dumps(word)}]')  # a result that is not a string


LOOK = [Tool.from_function(look).schema]


@given(st.text(st.sampled_from([HALF, OTHER, "a", "é", WHOLE, "\uffff", "\ufeff"])))
@few
def test_each_lone_surrogate_is_replaced(text: str) -> None:
    paired = text.replace(HALF + OTHER, WHOLE)
    wanted = paired.replace(HALF, LOST).replace(OTHER, LOST)
    assert replace_surrogates(text) == wanted
    assert replace_surrogates({text: [text, (text, {"x": text}), 1, None]}) == {
        wanted: [wanted, (wanted, {"x": wanted}), 1, None]
    }
    assert replace_surrogates(wanted) is wanted or wanted == ""
    assert json.loads(json.dumps(paired)) == paired  # JSON has them, escaped, as it has pairs


@pytest.mark.parametrize(
    "made",
    [
        lambda text: Message("user", text).content,
        lambda text: Message("tool", "3", tool_call_id=text).tool_call_id,
        lambda text: ToolCall(text, "f", {}).id,
        lambda text: ToolCall("c", text, {}).name,
        lambda text: ToolCall("c", "f", {"a": [{text: 1}]}).arguments["a"][0].popitem()[0],
        lambda text: ToolCall("c", "f", {"a": ({"b": text},)}).arguments["a"][0]["b"],
        lambda text: Turn("agent", (), text, "stop").text,
        lambda text: Turn("agent", (), "", "stop", state=text).state,
        lambda text: Sampling(stop=("a", text)).stop[1],
        lambda text: Failure("env", text).message,
        lambda text: Failure("env", "", text).traceback,
        lambda text: parse_calls(format_call("f", {"a": [text]}))[0].arguments["a"][0],
        lambda text: parse_calls(
            f'<tool_call>{{"name": "f", "arguments": {json.dumps({"a": text})}}}</tool_call>'
        )[0].arguments["a"],
        lambda text: parse_lines(f"CALL look: {json.dumps(text)}", LOOK)[0].arguments["word"],
    ],
)
def test_the_core_types(made: Any) -> None:
    assert made(f"a{HALF}b") == f"a{LOST}b"
    assert made(HALF + OTHER) == WHOLE
    assert made("né") == "né"


def test_seeds_come_from_any_text() -> None:
    assert derive_seed(HALF) != derive_seed(OTHER)
    assert derive_seed(1, "é") == 2683186989879277381
    Task(seed=1).rng(HALF)


@dataclass(frozen=True, kw_only=True)
class Odd(Task):
    words: dict[str, Any] = field(default_factory=lambda: {HALF: [HALF, OTHER]})


def env_of(protocol: Any) -> rayrl.Environment:
    @rayrl.env(name="odd", tasks=lambda seed, u: Odd(seed=seed), rewards={"all": 1.0})
    async def odd(task: Odd, agent: rayrl.Agent) -> rayrl.Scores:
        await agent(f"begin {HALF}", tools=[look], protocol=protocol, state=HALF)
        await agent([user(HALF + OTHER)])
        return {"all": 1.0}

    return odd


def answers(messages: Any, rng: Any) -> str:
    if "begin" in messages[-1].content:
        return '<tool_call>{"name": "look", "arguments": {"word": "\\ud83d"}}</tool_call>'
    return f"I said {HALF}"


@pytest.mark.parametrize("protocol", ["native", "text"])
async def test_an_episode_is_played_written_and_read(tmp_path: Path, protocol: Any) -> None:
    env = env_of(protocol)
    policy = PolicyPlayer(chat(), Instant(chat(), ["CALL look: \\ud83d"]), Sampling(stop=(HALF,)))
    for player in (ScriptedPlayer(answers), policy):
        plans = [GroupPlan("g", Odd(), 1, 0)]
        (group,) = await collect(env, plans, {"agent": player}, concurrency=1)
        (episode,) = group.episodes
        assert episode.failure is None
        assert write_episodes(tmp_path / "e.jsonl", [episode]) == 1
        (again,) = read_episodes(tmp_path / "e.jsonl")
        assert again.turns == episode.turns == pickle.loads(pickle.dumps(episode.turns))
        assert again.turns[0].prompt[0].content.endswith(f"begin {LOST}") or protocol == "text"
        assert again.turns[-1].prompt[0].content == WHOLE
        ((key, words),) = again.task.to_dict()["words"].items()
        assert set(key) == {LOST}
        assert words == [LOST, LOST]
        out = io.TextIOWrapper(io.BytesIO(), "utf-8")
        Console(file=out).print(episode_panel(episode))
    assert (
        Tool.from_function(look).schema["function"]["description"]
        == f"Look a word up, {LOST} or not."
    )


async def test_surrogates_from_environment_errors_and_typed_lines() -> None:
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")
    agent = Agent(HumanPlayer(lambda prompt: HALF, out))
    assert await agent(HALF, tools=[look]) == LOST


@pytest.mark.parametrize("arguments", ['{"word": "\\ud83d"}', '{"word": "\ud83d"}', "\ud83d"])
async def test_surrogates_from_a_server(arguments: str) -> None:
    function = {"name": "look", "arguments": arguments}
    calls = [{"id": HALF, "type": "function", "function": function}]
    said: list[dict[str, Any]] = [{"content": HALF, "tool_calls": calls}, {"content": f"a{HALF}"}]
    seen: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.content.decode())
        message = {"message": said[len(seen) - 1], "finish_reason": "stop"}
        return httpx.Response(200, content=json.dumps({"choices": [message]}))

    player = EndpointPlayer(EndpointConfig(url="http://server/v1", model="m"))
    player._client = httpx.AsyncClient(transport=httpx.MockTransport(answer))
    async with player:
        agent = Agent(player)
        assert await agent(HALF, tools=[look]) == f"a{LOST}"
    assert len(seen) == 2
    assert agent.record[0].text.startswith(f"{LOST}\n<tool_call>")
    assert "\\ud83d" not in seen[1]


WEATHER = {"name": "weather", "parameters": {"type": "object"}}


@pytest.mark.parametrize(
    "more",
    [
        {"messages": [{"role": "user", "content": "\ud83d"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "\ud83d"}]}]},
        {"messages": [{"role": "user", "content": "u", "name": "\ud83d"}]},
        {"messages": [{"role": "\ud83d", "content": "u"}]},
        {"messages": [{"role": "user", "\ud83d": "u"}]},
        {"stop": "\ud83d"},
        {"stop": ["x", "\ud83d\ud83d"]},
        {"model": "\ud83d"},
        {"user": "\ud83d", "metadata": {"\ud83d": "\ud83d"}},
        {"\ud83d": 1},
        {"tools": [{"type": "function", "function": {**WEATHER, "description": "\ud83d"}}]},
        {"tools": [{"type": "function", "function": {**WEATHER, "name": "\ud83d"}}]},
        {"tools": [{"type": "function", "function": {**WEATHER, "parameters": {"\ud83d": 1}}}]},
        {"tool_choice": "\ud83d"},
        {"response_format": "\ud83d"},
        {"temperature": "\ud83d"},
    ],
    ids=str,
)
async def test_surrogates_from_a_client(more: dict[str, Any]) -> None:
    call = '<tool_call>{"name": "weather", "arguments": {"city": "\\ud83d"}}</tool_call>'
    engine = Scripted(chat(), call)
    body = {"model": "m", "messages": [{"role": "user", "content": "u"}], **more}
    async with listening(Service(engine, chat(), "m")) as url, httpx.AsyncClient() as client:
        for stream in (False, True):
            for data in (
                json.dumps({**body, "stream": stream}).encode(),
                json.dumps({**body, "stream": stream}, ensure_ascii=False).encode(
                    "utf-8", "surrogatepass"
                ),
            ):
                response = await client.post(f"{url}/v1/chat/completions", content=data)
                assert response.status_code < 500
    for request in engine.requests:
        assert all(stop.encode() for stop in request.sampling.stop)


async def test_a_completion() -> None:
    engine = Scripted(chat(), "yes")
    async with listening(Service(engine, chat(), "m")) as url, httpx.AsyncClient() as client:
        body = json.dumps({"model": "m", "prompt": ["\ud83d", "a"]})
        response = await client.post(f"{url}/v1/completions", content=body)
    assert response.status_code == 200
    assert [chat().decode(request.prompt_ids) for request in engine.requests] == [LOST, "a"]
