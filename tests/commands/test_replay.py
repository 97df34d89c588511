"""Stored episodes played again: against the same code, and against code that has changed."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import rayrl
from rayrl import DataError, GroupPlan, Message, Scores, Task
from rayrl.cli import main
from rayrl.commands.replay import Replayed, replay, stored_episodes
from rayrl.rollout.agent import Agent
from rayrl.rollout.episode_io import LoggedTask, read_episodes, restore_task, write_episodes
from rayrl.rollout.players import ScriptedPlayer
from rayrl.types import Episode, Failure
from tests.act import collect, instant, says

GAME = """
from dataclasses import dataclass
import rayrl

@dataclass(frozen=True, kw_only=True)
class Part:
    word: str

@dataclass(frozen=True, kw_only=True)
class Game(rayrl.Task):
    parts: tuple[Part, ...]
    level: float = 0.5

def games(seed, u):
    return Game(seed=seed, level=u, parts=(Part(word="ab"), Part(word=str(seed % 7))))

def length(reply):
    return float(len(reply))

@rayrl.env(tasks=games, rewards={"length": 1.0, "short": 0.5})
async def game(task, agent):
    replies = [await agent(f"say {part.word}, at {task.level:.2f}") for part in task.parts]
    total = sum(map(length, replies))
    return {"length": total, "short": float(total < 5)}

@game.player("digits")
def digits(messages, rng):
    return "7" * rng.randrange(1, 5)
"""


def cli(*words: str) -> tuple[int, str, str]:
    """Status, output and errors of `rayrl` in a process of its own, which has loaded no class."""
    environment = {**os.environ, "COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, "-m", "rayrl", *words],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def counts(out: str) -> list[int]:
    """The table's one row."""
    row = next(line for line in out.splitlines() if line.startswith("│"))
    return [int(cell) for cell in row.strip("│").split("│")]


def test_a_stored_file_against_code_that_changes(tmp_path: Path) -> None:
    code, run = tmp_path / "game.py", tmp_path / "run"
    code.write_text(GAME)
    env = rayrl.load_env(str(code))
    plans = [GroupPlan(f"synth-{k}", task, 1, k) for k, task in enumerate(env.tasks(0, 6))]
    players = {"agent": ScriptedPlayer(env.players["digits"])}
    groups = asyncio.run(collect(env, plans, players, concurrency=1))
    file = run / "episodes.jsonl"
    run.mkdir()
    write_episodes(file, [group.episodes[0] for group in groups])
    (run / "config.yaml").write_text(json.dumps({"env": {"name": str(code)}}))
    old = list(read_episodes(file))
    assert 0 < sum(episode.scores["agent"]["short"] for episode in old) < 6

    status, out, err = cli("replay", str(file))
    assert (status, counts(out), err) == (0, [6, 0, 0, 0, 0], "")

    # the code moves and a reward function changes: the class is found by its name
    moved, new = tmp_path / "moved.py", tmp_path / "new.jsonl"
    moved.write_text(GAME.replace("float(len(reply))", "2.0 * len(reply)"))
    change = f"env.name={moved}"
    status, out, err = cli("replay", str(file), change)
    assert (status, counts(out)) == (1, [0, 6, 0, 0, 0])
    assert "6 of 6 episodes are not what they were with game" in err
    status, out, _ = cli("replay", str(file), change, "env.rewards.short=2", f"replay.out={new}")
    assert (status, counts(out)) == (0, [0, 6, 0, 0, 0])
    scored = list(read_episodes(new))
    for then, now in zip(old, scored, strict=True):
        total = 2.0 * sum(len(turn.text) for turn in then.turns)
        assert now.scores == {"agent": {"length": total, "short": float(total < 5)}}
        assert now.rewards == {"agent": total + 2.0 * (total < 5)}
        assert (now.id, now.turns, now.index) == (then.id, then.turns, then.index)
        was, is_ = (f"{value:g}" for value in (then.scores["agent"]["length"], total))
        assert f"{then.id}: scored differently length {was} → {is_}" in out
    mean = sum(episode.scores["agent"]["length"] for episode in old) / 6
    assert f"on average: length {mean:.4g} → {2 * mean:.4g}, reward " in out

    # and what is said changes, in the second turn of one of the tasks
    word = str(plans[0].task.seed % 7)
    said = f"say {{part.word + '!' * (part.word == '{word}')}}"
    code.write_text(GAME.replace("say {part.word}", said))
    n = sum(plan.task.seed % 7 == plans[0].task.seed % 7 for plan in plans)
    status, out, _ = cli("replay", str(file), "synth-0/0")
    assert (status, counts(out)) == (1, [0, 0, 1, 0, 0])
    assert "synth-0/0: diverged at turn 1 of 2: 'agent' was sent different messages" in out
    assert f"    -[user] say {word}, at" in out
    assert f"    +[user] say {word}!, at" in out
    status, out, _ = cli("replay", str(file), f"replay.out={new}")
    assert (status, counts(out)) == (1, [6 - n, 0, n, 0, 0])
    assert len(list(read_episodes(new))) == 6 - n


@dataclass(frozen=True, kw_only=True)
class Job(Task):
    act: str = ""


def rank(episodes: Sequence[Episode]) -> list[float]:
    lengths = sorted(episode.scores["agent"]["n"] for episode in episodes)
    return [float(lengths.index(episode.scores["agent"]["n"])) for episode in episodes]


def talk(rank_weight: float = 1.0, *, turns: int = 2, today: str = "") -> rayrl.Environment:
    @rayrl.env(
        tasks=lambda seed, u: Job(seed=seed),
        rewards={"n": 1.0, "rank": rayrl.group_reward(rank, rank_weight)},
        name="talk",
    )
    async def play(task: Job, agent: Agent) -> Scores:
        said = [await agent(f"{k}") for k in range(turns)]
        if today == "fork":
            side = agent.fork()
            try:
                await side("aside")
            except Exception:
                said = []
        if today == "raise" or task.act == "raise":
            raise ValueError("the board is on fire")
        return {"n": float(len("".join(said)))}

    return play


async def group_of(env: rayrl.Environment, task: Task, tmp_path: Path) -> list[Episode]:
    """Three episodes as a file gives them back."""
    (group,) = await collect(env, [GroupPlan("g", task, 3, 1)], instant(), concurrency=3)
    write_episodes(tmp_path / "episodes.jsonl", group.episodes)
    return stored_episodes(tmp_path / "episodes.jsonl", {"": env})


def kinds(found: Sequence[Replayed]) -> list[str]:
    return [one.kind for one in found]


async def test_rewards_over_a_group(tmp_path: Path) -> None:
    stored = await group_of(talk(), Job(seed=1), tmp_path)
    assert sorted(e.scores["agent"]["rank"] for e in stored)[-1] > 0
    assert kinds(await replay(talk(), stored)) == ["same"] * 3
    found = await replay(talk(0.0), stored)
    for one in found:
        assert one.episode is not None
        assert one.episode.rewards["agent"] == one.episode.scores["agent"]["n"]
        differs = one.stored.rewards["agent"] != one.episode.rewards["agent"]
        assert one.kind == ("scored differently" if differs else "same")
    assert kinds(await replay(talk(), stored[1:])) == ["same"] * 2  # the file lacks one
    # one of them cannot be scored today: the others keep their place among the three
    lost = replace(stored[1], turns=stored[1].turns[:1])
    assert kinds(await replay(talk(), [stored[0], lost, stored[2]])) == ["same", "diverged", "same"]


@pytest.mark.parametrize(
    ("today", "kind", "what"),
    [
        ({}, "same", ""),
        ({"turns": 3}, "diverged", "at turn 2 of 2: the environment asks for a reply that was not"),
        ({"turns": 1}, "diverged", "at turn 1 of 2: the environment ended 1 turn early"),
        ({"turns": 0}, "diverged", "at turn 0 of 2: the environment ended 2 turns early"),
        ({"today": "fork"}, "diverged", "a reply that was not recorded"),
        ({"today": "raise"}, "failed", "ValueError: the board is on fire"),
        ({"turns": 1, "today": "raise"}, "failed", "at turn 1 of 2: the environment failed"),
    ],
)
async def test_what_becomes_of_an_episode(
    today: dict[str, Any], kind: str, what: str, tmp_path: Path
) -> None:
    stored = await group_of(talk(), Job(seed=1), tmp_path)
    for one in await replay(talk(**today), stored):
        assert one.kind == kind
        assert what in one.what


async def test_episodes_that_had_failed(tmp_path: Path) -> None:
    stored = await group_of(talk(), Job(seed=1, act="raise"), tmp_path)
    assert all(episode.failure is not None for episode in stored)
    assert kinds(await replay(talk(), stored)) == ["same"] * 3
    mended = [replace(episode, task=Job(seed=1)) for episode in stored]
    (one, *_) = await replay(talk(), mended)
    assert one.kind == "scored differently"
    assert one.what.startswith("it had failed, n – → ")
    late = [replace(episode, failure=Failure("infra", "replica died")) for episode in stored]
    assert kinds(await replay(talk(), late)) == ["unfinished"] * 3


async def test_seats_at_once_and_a_call_that_was_given_up(tmp_path: Path) -> None:
    @rayrl.env(tasks=[Task()], rewards={"n": 1.0})
    async def race(task: Task, a: Agent, b: Agent) -> Scores:
        calls = [asyncio.ensure_future(agent("?")) for agent in (a, b)]
        done, late = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        for call in late:
            call.cancel()
        first = float(calls[0] in done)
        return {"a": {"n": first}, "b": {"n": 1.0 - first}}

    async def slow(messages: Sequence[Message], rng: Any) -> str:
        await asyncio.sleep(0.01)
        return "slow"

    players = {"a": ScriptedPlayer(slow), "b": says()["agent"]}
    (group,) = await collect(race, [GroupPlan("g", Task(), 1, 1)], players, concurrency=1)
    (episode,) = group.episodes
    assert [turn.seat for turn in episode.turns] == ["b"]
    write_episodes(tmp_path / "e.jsonl", [episode])
    (one,) = await replay(race, stored_episodes(tmp_path / "e.jsonl", {"": race}))
    assert (one.kind, one.episode) == ("same", episode)


@pytest.mark.parametrize("isolated", [False, True])
async def test_tools_are_played_again(isolated: bool, tmp_path: Path) -> None:
    env = rayrl.load_env("tools").configure({"failure_rate": 0.3})
    plans = [GroupPlan(f"g{k}", task, 1, k) for k, task in enumerate(env.tasks(3, 2))]
    players = {"agent": ScriptedPlayer(env.players["clumsy"])}
    groups = await collect(env, plans, players, concurrency=1)
    write_episodes(tmp_path / "e.jsonl", [group.episodes[0] for group in groups])
    stored = stored_episodes(tmp_path / "e.jsonl", {"": env})
    found = await replay(env, stored, deadline_s=60, isolated=isolated)
    assert kinds(found) == ["same", "same"]
    assert [one.episode for one in found] == stored
    assert stored[0].scores["agent"]["tool_calls"] > 1


def test_tasks_get_the_class_that_there_is() -> None:
    logged = LoggedTask(seed=3, type="elsewhere:Job", fields={"seed": 3, "act": "x"})
    episode = Episode("e", "talk", logged, 0, ())
    assert restore_task(episode, [Task, Job]).task == Job(seed=3, act="x")
    with pytest.raises(DataError, match="has a task of class Job; the environment has only Task"):
        restore_task(episode, [Task])
    wrong = replace(episode, task=replace(logged, fields={"seed": 3, "actt": "x"}))
    with pytest.raises(DataError, match=r"no field 'actt'\. Did you mean 'act'"):
        restore_task(wrong, [Job])


def test_what_is_wrong_with_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "e.jsonl"
    write_episodes(file, [Episode("g/0", "talk", Task(), 0, ())])
    wrong = {
        ("replay",): "which file?",
        ("replay", str(file)): "has episodes of talk, not of 'tictactoe'",
        ("replay", str(file), "g/0", "more"): "more: not understood",
        ("replay", str(file), "replay.show=-1"): "replay.show=-1",
        ("replay", str(file), "g/0", f"replay.out={file}"): "what is replayed would be lost",
        ("replay", str(tmp_path), f"replay.out={tmp_path}/x/y.jsonl"): "would be lost",
        ("replay", str(file), "replay.shw=1"): "Did you mean 'replay.show'",
    }
    for words, said in wrong.items():
        assert main(words) == 2
        assert said in capsys.readouterr().err
    assert main(("replay", str(tmp_path / "none"))) == 1
    assert "cannot read episodes" in capsys.readouterr().err
    write_episodes(file, [Episode("g/0", "tictactoe", Task(), 0, ())])
    assert main(("replay", str(file), "g/1")) == 2
    assert "has no episode 'g/1'. Did you mean 'g/0'" in capsys.readouterr().err
