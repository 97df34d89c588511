"""Programs that know nothing of rayrl, as agents: what they say becomes turns with exact ids."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import rayrl
from rayrl import Agent, Episode, Task
from rayrl.conversations import transcripts
from rayrl.rollout.players import PolicyPlayer
from rayrl.rollout.resume import EpisodeResume
from rayrl.types import Completion, Request, Sampling, Turn, VersionSpan
from tests.act import chat

AGENTS = Path(__file__).parent / "agents"


class Calculator:
    """An engine that calls the tool with the question's numbers, then says what it returned."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    async def generate(self, request: Request) -> Completion:
        self.requests.append(request)
        *_, asked, _ = re.split(r"<\|im_start\|>", chat().tokenizer.decode(request.prompt_ids))
        numbers = re.findall(r"\d+", asked)
        text = f"It is {numbers[-1]}." if numbers else "Fine."
        if "Sum of" in asked:
            given = {"a": int(numbers[0]), "b": int(numbers[1])}
            text = f'<tool_call>\n{{"name": "add", "arguments": {json.dumps(given)}}}\n</tool_call>'
        ids = chat().reply(text)
        return Completion(ids, (-0.5,) * len(ids), (VersionSpan(0, 0, len(ids)),), "stop")


@rayrl.env(tasks=[Task()], rewards={"n": 1.0})
async def asks(task: Task, agent: Agent) -> rayrl.Scores:
    async with agent.endpoint() as at:
        words = [sys.executable, AGENTS / f"{RUN['file']}.py"]
        done = await rayrl.program(words, at, stdin=json.dumps(RUN["stdin"]))
    SAID.append(done.stdout)
    return {"n": 1.0}


RUN: dict[str, Any] = {}
SAID: list[str] = []


async def play(
    file: str, recorded: tuple[Turn, ...] = (), **more: Any
) -> tuple[Episode, Calculator]:
    RUN.update(file=file, stdin={"a": 17, "b": 25, **more})
    SAID.clear()
    engine = Calculator()
    players = {"agent": PolicyPlayer(chat(), engine, Sampling(max_tokens=99))}
    resume = EpisodeResume(recorded)
    episode = await rayrl.play_episode(asks, Task(), players, id="e", seed=3, resume=resume)
    assert episode.failure is None, episode.failure.message
    return episode, engine


def assert_exact(episode: Episode, engine: Calculator) -> None:
    """What the model read is what its conversations' turns say, id by id."""
    for path in transcripts(episode.turns):
        ids: tuple[int, ...] = ()
        for k in path:
            turn = episode.turns[k]
            assert engine.requests[k].prompt_ids == (*ids, *turn.prompt_ids)
            assert turn.offset == len(ids)
            ids = (*engine.requests[k].prompt_ids, *turn.completion_ids)


@pytest.mark.parametrize(
    ("file", "stream"),
    [
        ("chat_loop", True),
        ("openai_agents", False),
        ("openai_agents", True),
        ("graph", False),
        ("claude", False),
        ("claude", True),
    ],
)
async def test_an_agent_of_another_library_is_one_conversation(file: str, stream: bool) -> None:
    episode, engine = await play(file, stream=stream)
    assert SAID == ["It is 42.\n"]
    assert len(episode.turns) == 2
    assert len(transcripts(episode.turns)) == 1
    assert_exact(episode, engine)
    call, answer = episode.turns
    assert [message.role for message in call.prompt] == ["system", "user"]
    assert [(message.role, message.content) for message in answer.prompt] == [("tool", "42")]
    assert [tool["function"]["name"] for tool in call.tools] == ["add"]


async def test_a_team_replays_in_whatever_order_it_asks() -> None:
    calm, engine = await play("team")
    assert SAID == ["It is 25.\n"] or SAID == ["Fine.\n"]
    assert len(calm.turns) == 7
    assert len(transcripts(calm.turns)) == 4
    assert_exact(calm, engine)

    def by_conversation(episode: Episode) -> list[Turn]:
        return sorted(episode.turns, key=lambda turn: (turn.conversation, turn.offset))

    for made in range(8):
        for late in ([0, 0], [0.2, 0], [0, 0.2]):
            again, engine = await play("team", calm.turns[:made], late=late)
            assert again.replayed == made
            assert len(engine.requests) == 7 - made
            assert by_conversation(again) == by_conversation(calm)
