"""The agent program of `examples/clerk`, played by scripts."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

import pytest

import rayrl
from rayrl import Message, ScriptedPlayer, load_env
from tests.documents import ROOT


def call(city: str, name: str = "population") -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': {'city': city}})}</tool_call>"


def asked(messages: Sequence[Message]) -> str:
    return messages[-1].content.removeprefix("How many people live in ").removesuffix("?")


def knows(messages: Sequence[Message], rng: random.Random) -> str:
    if messages[-1].role == "user":
        return call(asked(messages))
    return f"There are {messages[-1].content} of them."


def guesses(messages: Sequence[Message], rng: random.Random) -> str:
    return "421000"


def repeats_itself(messages: Sequence[Message], rng: random.Random) -> str:
    return call("Rome")


def is_wrong(messages: Sequence[Message], rng: random.Random) -> str:
    return call("Atlantis") if messages[-1].role == "user" else "None."


def invents_a_tool(messages: Sequence[Message], rng: random.Random) -> str:
    return call("Rome", "area")


@pytest.mark.parametrize(
    ("play", "score", "turns"),
    [
        (knows, 1.0, 2),
        (guesses, 0.0, 1),
        (repeats_itself, 0.2, 3),
        (is_wrong, 0.2, 2),
        (invents_a_tool, 0.0, 1),
    ],
)
async def test_its_scores(
    play: rayrl.PlayerFunction,
    score: float,
    turns: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    args = {"score": "examples/clerk/grade.py:grade", "preload": ["agents"]}
    env = load_env("program:examples/clerk/agent.py").configure(args)
    (task,) = env.tasks(3, 1)
    episode = await rayrl.play_episode(env, task, {"agent": ScriptedPlayer(play)}, id="e")
    assert episode.failure is None, episode.failure
    assert episode.scores == {"agent": {"score": score, "failed": 0.0}}
    assert len(episode.turns) == turns
