from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import rayrl
from rayrl import Scores, Task
from rayrl.errors import DataError
from rayrl.rollout.episode_io import (
    LoggedTask,
    episode_from_json,
    episode_to_json,
    read_episodes,
    write_episodes,
)
from rayrl.types import Episode, Failure, Message, ToolCall, Turn, VersionSpan, tool, user
from tests.act import instant, says


@dataclass(frozen=True)
class Spot:
    x: int
    y: int


@dataclass(frozen=True, kw_only=True)
class Errand(Task):
    words: tuple[str, ...] = ("a", "b")
    spots: tuple[Spot, ...] = (Spot(1, 2),)
    rate: float = 0.5


@rayrl.env(tasks=[Errand(seed=3)], rewards={"win": 1.0, "luck": 0.1})
async def errand(task: Errand, agent: Any) -> Scores:
    await agent(task.words[0])
    await agent("ü\n\u2028 next", state="key")
    return {"win": 1 / 3, "luck": 0.1}


async def played(players: Any) -> Episode:
    task = errand.tasks(0, 1)[0]
    return await rayrl.play_episode(errand, task, players, id="g/0", index=2, seed=1)


EDGE = Episode(
    id="e",
    env="errand",
    task=Errand(seed=2**62 + 1, words=(), rate=1e-17),
    index=0,
    turns=(
        Turn(
            "x",
            (
                Message("assistant", "", (ToolCall("call_0", "f", {"a": [1, None]}),)),
                tool("3", "call_0"),
            ),
            "",
            "length",
            offset=7,
            prompt_ids=(1,),
            completion_ids=(5, 6, 7),
            rollout_logprobs=(-0.1, -1e-30, -12.345678901234567),
            versions=(VersionSpan(3, 0, 1), VersionSpan(4, 1, 3)),
            state="",
            temperature=0.7,
        ),
        Turn("o", (user("u"),), "reply", "abort", state="u"),
    ),
    failure=Failure("env", "it broke", "Traceback\n  line"),
)


async def test_roundtrip_is_exact(tmp_path: Path) -> None:
    episodes = [await played(instant()), await played(says()), EDGE]
    path = tmp_path / "episodes.jsonl"
    assert write_episodes(path, episodes[:2]) == 2
    assert write_episodes(path, episodes[2:], append=True) == 1
    back = list(read_episodes(path))
    assert back == episodes
    assert [type(e.task) for e in back] == [Errand] * 3
    assert back[0].turns[0].rollout_logprobs == episodes[0].turns[0].rollout_logprobs
    assert write_episodes(path, []) == 0
    assert list(read_episodes(path)) == []


async def test_a_person_can_read_it() -> None:
    data = episode_to_json(await played(says("hello")))
    keys = ["id", "env", "index", "rewards", "scores", "task", "turns", "seed"]
    keys += ["began", "seconds"]
    assert list(data) == keys
    assert data["task"]["words"] == ["a", "b"]
    assert data["turns"][0] == {
        "seat": "agent",
        "prompt": [{"role": "user", "content": "a"}],
        "text": "hello",
        "finish": "stop",
    }
    assert data["turns"][1]["state"] == "key"


def test_a_task_of_an_unknown_class(tmp_path: Path) -> None:
    data = json.loads(json.dumps(episode_to_json(EDGE)))
    data["task"]["type"] = "some_module_that_must_not_be_imported:Gone"
    episode = episode_from_json(data)
    assert isinstance(episode.task, LoggedTask)
    assert episode.task.seed == 2**62 + 1
    assert episode.task.fields["words"] == []
    assert json.loads(json.dumps(episode_to_json(episode)))["task"] == data["task"]


def broken(change: Any) -> str:
    data = json.loads(json.dumps(episode_to_json(EDGE)))
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1]", "expected an object, got '\\[1\\]'"),
        ("{}", "needs the key 'id'"),
        (broken(lambda d: d.pop("turns")), "needs the key 'turns'"),
        (broken(lambda d: d.update(turns="no")), "turns must be list"),
        (broken(lambda d: d["turns"][1].update(finish="end")), "turn 1: finish must be one of"),
        (
            broken(lambda d: d["turns"][0].update(rollout_logprobs=[0.0])),
            "3 completion_ids but 1 rollout_logprobs",
        ),
        (broken(lambda d: d["turns"][0].update(prompt_ids=["a"])), "expected int, got 'a'"),
        (broken(lambda d: d["turns"][0]["prompt"][0].update(content=None)), "content must be str"),
        (broken(lambda d: d["turns"][0].pop("seat")), "needs the key 'seat'"),
        (broken(lambda d: d.update(scores={"x": {"win": "1"}})), "expected float, got '1'"),
        (broken(lambda d: d.update(rewards=3)), "expected dict"),
        (broken(lambda d: d["task"].update(wrods=1)), "no field 'wrods'.*mean 'words'"),
        (broken(lambda d: d.update(failure={"kind": "env"})), "message"),
        (broken(lambda d: d.update(task=None)), "not an episode"),
    ],
)
def test_a_malformed_line_names_file_and_line(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "bad.jsonl"
    good = json.dumps(episode_to_json(replace(EDGE, seconds=1.5)))
    path.write_text(f"{good}\n\n{line}\n")
    reading = read_episodes(path)
    assert next(reading) == EDGE
    with pytest.raises(DataError, match=f"bad.jsonl:3: .*{said}"):
        next(reading)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no\.jsonl: cannot read episodes: No such file"):
        list(read_episodes(tmp_path / "no.jsonl"))


def test_a_file_is_filtered_in_place_and_survives_what_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "e.jsonl"
    episodes = [replace(EDGE, id=f"e/{k}") for k in range(4)]
    assert write_episodes(file, episodes) == 4
    kept = (episode for episode in read_episodes(file) if episode.id != "e/1")
    assert write_episodes(file, kept) == 3
    left = [*read_episodes(file)]
    assert [episode.id for episode in left] == ["e/0", "e/2", "e/3"]
    bad = replace(EDGE, facts={"a": object()})
    for append in (False, True):
        with pytest.raises(TypeError):
            write_episodes(file, [EDGE, bad], append=append)
        assert [*read_episodes(file)] == (left if not append else [*left, EDGE])
    assert [one.name for one in tmp_path.iterdir()] == ["e.jsonl"]
