from __future__ import annotations

import asyncio
import contextlib
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest

import rayrl
from rayrl import ConfigError, GroupPlan, InfraError, Scores, Task
from rayrl.environment.scoring import with_group_rewards
from rayrl.rollout.agent import Agent, Options
from rayrl.rollout.conversation import Conversation
from rayrl.rollout.players import PolicyPlayer, ScriptedPlayer
from rayrl.rollout.rollout import play_episode, play_group, play_groups
from rayrl.types import Episode, Failure, Message, Sampling, Turn
from tests.act import Flaky, Instant, chat, collect, instant, says


@dataclass(frozen=True, kw_only=True)
class Job(Task):
    rounds: int = 2
    act: str = ""


def jobs(seed: int, u: float, act: str = "") -> Job:
    return Job(seed=seed, act=act)


@rayrl.env(tasks=jobs, rewards={"length": 1.0, "luck": 0.0})
async def talk(task: Job, agent: Agent) -> Scores:
    said = ""
    for k in range(task.rounds):
        said += await agent(f"{k} {task.rng(said).randrange(1000)}")
    return {"length": len(said), "luck": task.rng(said).random()}


@rayrl.env(tasks=jobs, rewards={"win": 1.0})
async def misbehaves(task: Job, agent: Agent) -> Scores:
    await agent("go")
    if task.act == "raise":
        raise ValueError("the board is on fire")
    if task.act == "hang":
        await asyncio.Event().wait()
    if task.act == "swallow":
        while True:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(60)
    if task.act == "exit":
        sys.exit(3)
    if task.act == "cancel":
        raise asyncio.CancelledError
    if task.act == "loop":
        while True:
            await agent("again")
    return {"nan": {"win": math.nan}, "typo": {"wim": 1.0}, "none": {}}.get(task.act, {"win": 1.0})


async def test_an_episode() -> None:
    episode = await play_episode(
        talk, Job(seed=1, rounds=3), says("ab"), id="g/4", index=4, seed=9, deadline_s=600
    )
    assert (episode.id, episode.env, episode.index, episode.failure) == ("g/4", "talk", 4, None)
    assert episode.scores["agent"]["length"] == 6.0
    assert episode.rewards == {"agent": 6.0}
    assert [turn.text for turn in episode.turns] == ["ab"] * 3


@pytest.mark.parametrize(
    ("act", "said"),
    [
        ("raise", "ValueError: the board is on fire"),
        ("nan", "nan as score 'win'"),
        ("typo", "undeclared score 'wim'. Did you mean 'win'"),
        ("none", "no score 'win'"),
        ("exit", "called sys.exit\\(3\\)"),
        ("cancel", "cancelled itself"),
        ("hang", "did not end within 0.5 s, and was not waiting for an answer"),
        ("loop", "did not end within 0.5 s"),
    ],
)
async def test_environment_errors_become_failures(act: str, said: str) -> None:
    task = Job(seed=1, act=act)
    deadline_s = 0.5 if "0.5 s" in said else 600  # it answers once before
    episode = await play_episode(misbehaves, task, says(), id="e", deadline_s=deadline_s)
    assert episode.failure is not None
    assert episode.failure.kind == "env"
    assert re.search(said, episode.failure.message)
    assert "'misbehaves'" in episode.failure.message
    assert repr(task) in episode.failure.message
    assert (episode.scores, episode.rewards) == ({}, {})
    assert len(episode.turns) >= 1
    if act == "raise":
        assert "the board is on fire" in episode.failure.traceback
        assert 'raise ValueError("the board is on fire")' in episode.failure.traceback


async def test_code_that_swallows_its_cancellation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayrl.rollout.limits._GRACE_S", 0.01)
    task = Job(act="swallow")
    stuck = asyncio.create_task(play_episode(misbehaves, task, says(), id="e", deadline_s=0.05))
    episode = await asyncio.wait_for(stuck, 600)
    assert episode.failure is not None
    for left in asyncio.all_tasks() - {asyncio.current_task()}:
        left.get_coro().close()  # type: ignore[union-attr]  # or the loop could never end


@pytest.mark.parametrize("error", [InfraError("died"), ConnectionError("reset"), TimeoutError()])
async def test_infra_failures_are_retried_with_the_same_seed(error: Exception) -> None:
    player = Flaky(2, error)
    group = await play_group(
        misbehaves, Job(), {"agent": player}, id="g", size=1, retries=2, backoff_s=0.001
    )
    assert group.complete
    assert group.episodes[0].id == "g/0"
    assert len(set(player.seeds)) == 1
    assert player.sessions == ["g/0/agent", "g/0~1/agent", "g/0~2/agent"]


async def test_infra_failures_are_recorded_when_retries_are_exhausted() -> None:
    group = await play_group(
        misbehaves, Job(), {"agent": Flaky(9)}, id="g", size=2, retries=1, backoff_s=0.001
    )
    kinds = [episode.failure and episode.failure.kind for episode in group.episodes]
    assert kinds == ["infra", "infra"]
    assert not group.complete


async def test_env_failures_are_not_retried() -> None:
    player = Flaky(0)
    group = await play_group(misbehaves, Job(act="raise"), {"agent": player}, id="g", size=1)
    assert len(player.sessions) == 1
    assert group.episodes[0].failure is not None


async def test_a_players_error_fails_the_episode_even_if_caught() -> None:
    @rayrl.env(tasks=jobs, rewards={"win": 1.0})
    async def catches(task: Job, agent: Agent) -> Scores:
        with contextlib.suppress(Exception):
            await agent("go")
        return {"win": 1.0}

    episode = await play_episode(catches, Job(), {"agent": Flaky(1)}, id="e")
    assert episode.failure is not None
    assert episode.failure.kind == "infra"
    assert episode.rewards == {}


async def test_a_player_that_does_not_answer_is_infra() -> None:
    stopped = []

    class Silent:
        async def answer(
            self, conversation: Conversation, new: Sequence[Message], options: Options
        ) -> Turn:
            try:
                await asyncio.Event().wait()
            finally:
                stopped.append(conversation.session)
            raise AssertionError

    episode = await play_episode(misbehaves, Job(), {"agent": Silent()}, id="e", deadline_s=0.05)
    assert episode.failure is not None
    assert episode.failure.kind == "infra"
    assert "the player did not answer within 0.05 s" in episode.failure.message
    assert stopped == ["e/agent"]  # the player was cancelled


@pytest.mark.parametrize("error", [TypeError("bug"), ConfigError("wrong key")])
async def test_errors_of_the_program_itself_propagate(error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)) as raised:
        await play_episode(misbehaves, Job(), {"agent": Flaky(1, error)}, id="e")
    if isinstance(error, TypeError):
        assert (
            "Raised by Flaky itself, for seat 'agent', and not by environment 'misbehaves'"
            in (raised.value.__notes__[0])
        )
    with pytest.raises(type(error), match=str(error)):
        await play_group(misbehaves, Job(), {"agent": Flaky(1, error)}, id="g", size=3)
    with pytest.raises(ConfigError, match=r"no player; of a function make rayrl\.ScriptedPlayer"):
        await play_episode(misbehaves, Job(), {"agent": print}, id="e")  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match="no player for seat 'agent'"):
        await play_episode(misbehaves, Job(), {}, id="e")


async def test_a_scripted_players_error_is_an_env_failure() -> None:
    def lost(messages: Sequence[Message], rng: Any) -> str:
        raise ValueError("no move left")

    episode = await play_episode(misbehaves, Job(), {"agent": ScriptedPlayer(lost)}, id="e")
    assert episode.failure is not None
    assert episode.failure.kind == "env"
    assert "player lost raised ValueError: no move left" in episode.failure.message


async def test_the_same_seeds_give_the_same_episodes() -> None:
    plans = [GroupPlan(f"g{k}", task, 4, k) for k, task in enumerate(talk.tasks(3, 5))]
    first = await collect(talk, plans, instant(), concurrency=100)
    second = await collect(talk, plans, instant(), concurrency=3)
    by_id = {group.id: group for group in second}
    assert len(first) == 5
    for group in first:
        assert group == by_id[group.id]
        assert [e.index for e in group.episodes] == [0, 1, 2, 3]
        assert [e.id for e in group.episodes] == [f"{group.id}/{k}" for k in range(4)]
        assert len({e.turns for e in group.episodes}) > 1
    assert first[0].trainable == ("agent",)


async def test_draws_differ_only_where_play_does() -> None:
    group = await play_group(talk, Job(seed=1), instant(), id="g", size=12)
    luck: dict[str, set[float]] = {}
    for episode in group.episodes:
        said = "".join(turn.text for turn in episode.turns)
        luck.setdefault(said, set()).add(episode.scores["agent"]["luck"])
    assert 1 < len(luck) < 12
    assert all(len(values) == 1 for values in luck.values())


async def test_concurrency_is_bounded_and_plans_are_drawn_lazily() -> None:
    live, most, drawn = 0, 0, 0

    @rayrl.env(tasks=jobs, rewards={"win": 1.0})
    async def counts(task: Job, agent: Agent) -> Scores:
        nonlocal live, most
        live += 1
        most = max(most, live)
        await asyncio.sleep(0.001)
        live -= 1
        return {"win": 1.0}

    def plans() -> Iterator[GroupPlan]:
        nonlocal drawn
        while True:
            drawn += 1
            yield GroupPlan(str(drawn), Job(), 3, drawn)

    seen = 0
    async with contextlib.aclosing(play_groups(counts, plans(), says(), concurrency=7)) as groups:
        async for _ in groups:
            seen += 1
            if seen == 10:
                break
    assert most == 7
    assert drawn <= 10 + 7
    await asyncio.sleep(0.01)
    assert asyncio.all_tasks() == {asyncio.current_task()}  # leaving early cancelled the rest
    with pytest.raises(ConfigError, match="concurrency=0"):
        await collect(counts, [], says(), concurrency=0)


async def test_groups_without_episodes() -> None:
    assert await collect(talk, [], says(), concurrency=2) == []
    (group,) = await collect(talk, [GroupPlan("g", Job(), 0, 0)], says(), concurrency=2)
    assert group.episodes == ()


async def test_cancelling_the_loop_cancels_the_episodes() -> None:
    ended = []

    @rayrl.env(tasks=jobs, rewards={"win": 1.0})
    async def waits(task: Job, agent: Agent) -> Scores:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(task.seed)
        return {"win": 1.0}

    plans = [GroupPlan(str(k), Job(seed=k), 1, 0) for k in range(3)]
    running = asyncio.create_task(collect(waits, plans, says(), concurrency=8))
    await asyncio.sleep(0.02)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert sorted(ended) == [0, 1, 2]


async def test_seats_have_separate_conversations() -> None:
    @rayrl.env(tasks=jobs, rewards={"win": 1.0})
    async def duel(task: Job, x: Agent, o: Agent) -> Scores:
        first = await x("you start")
        second = await o(f"x said {first}")
        await x(f"o said {second}")
        return {"x": {"win": 1.0}, "o": {"win": 0.0}}

    engine = Instant(chat(), ["one", "three"])
    players = {
        "x": PolicyPlayer(chat(), engine, Sampling()),
        "o": PolicyPlayer(chat(), engine, Sampling(), trainable=False),
    }
    group = await play_group(duel, Job(), players, id="g", size=2)
    episode = group.episodes[0]
    assert [turn.seat for turn in episode.turns] == ["x", "o", "x"]
    assert [turn.offset == 0 for turn in episode.turns] == [True, True, False]
    assert episode.rewards == {"x": 1.0, "o": 0.0}
    assert group.trainable == ("x",)
    assert sorted(engine.released) == ["g/0/o", "g/0/x", "g/1/o", "g/1/x"]
    named = await play_group(duel, Job(), players, id="g", size=1, trainable=["o"])
    assert named.trainable == ("o",)
    with pytest.raises(ConfigError, match="no seat 'y'"):
        await play_group(duel, Job(), players, id="g", size=1, trainable=["y"])


async def test_tools_are_counted_in_the_scores() -> None:
    def broken() -> int:
        """Fails."""
        raise RuntimeError("x")

    @rayrl.env(tasks=jobs, rewards={"win": 1.0})
    async def uses(task: Job, agent: Agent) -> Scores:
        return {"win": float(await agent("go", tools=[broken]) == "done")}

    def player(messages: Sequence[Message], rng: Any) -> str:
        return "done" if messages[-1].role == "tool" else '<tool_call>{"name": "broken"}'

    episode = await play_episode(uses, Job(), {"agent": ScriptedPlayer(player)}, id="e")
    assert episode.scores == {"agent": {"win": 1.0, "tool_calls": 1.0, "tool_errors": 1.0}}
    assert episode.rewards == {"agent": 1.0}


# ---- rewards over the group


def rank(episodes: Sequence[Episode]) -> list[float]:
    lengths = sorted(episode.scores["agent"]["length"] for episode in episodes)
    return [lengths.index(e.scores["agent"]["length"]) / len(episodes) for e in episodes]


def grouped(function: Any) -> rayrl.Environment:
    rewards = {"length": 1.0, "luck": 0.0, "rank": rayrl.group_reward(function, 0.5)}
    return rayrl.env(tasks=jobs, rewards=rewards, name="grouped")(talk.play)


async def test_group_rewards() -> None:
    env = grouped(rank)
    group = await play_group(env, Job(), instant(), id="g", size=6)
    for episode, value in zip(group.episodes, rank(group.episodes), strict=True):
        scores = episode.scores["agent"]
        assert scores["rank"] == value
        assert episode.rewards["agent"] == pytest.approx(scores["length"] + 0.5 * value)
    assert with_group_rewards(env, group.episodes) == list(group.episodes)
    doubled = await play_group(env.configure({}, {"rank": 1.0}), Job(), instant(), id="g", size=6)
    assert doubled.episodes[0].rewards["agent"] == pytest.approx(
        group.episodes[0].rewards["agent"] + 0.5 * group.episodes[0].scores["agent"]["rank"]
    )


async def test_group_rewards_leave_out_failed_episodes() -> None:
    seen = []

    def count(episodes: Sequence[Episode]) -> list[float]:
        seen.append(len(episodes))
        return [1.0] * len(episodes)

    env = grouped(count)
    group = await play_group(env, Job(), instant(), id="g", size=3)
    failed = replace(group.episodes[1], scores={}, rewards={}, failure=Failure("env", "x"))
    again = with_group_rewards(env, [group.episodes[0], failed, group.episodes[2]])
    assert seen == [3, 2]
    assert again[1] == failed


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda episodes: [1.0], "returned 1 scores for 2 episodes"),
        (lambda episodes: [math.nan, 0.0], "not finite"),
        (lambda episodes: 1 / 0, "ZeroDivisionError"),
    ],
)
async def test_a_group_reward_that_fails(function: Any, said: str) -> None:
    group = await play_group(grouped(function), Job(), instant(), id="g", size=2)
    for episode in group.episodes:
        assert episode.failure is not None
        assert "group reward 'rank'" in episode.failure.message
        assert said in episode.failure.message
        assert episode.rewards == {}


async def test_a_plan_may_have_a_temperature_of_its_own() -> None:
    players = instant()

    @rayrl.env(tasks=[Task()], rewards={"n": 1.0})
    async def one(task: Task, agent: Agent) -> Scores:
        return {"n": float(len(await agent("?")))}

    plans = [GroupPlan("own", Task(), 2, 0), GroupPlan("greedy", Task(), 1, 0, temperature=0.0)]
    groups = await collect(one, plans, players, concurrency=4)
    assert all(group.complete for group in groups)
    requests = players["agent"].client.requests
    seen = sorted((r.session.split("/")[0], r.sampling.temperature) for r in requests)
    assert seen == [("greedy", 0.0), ("own", 1.0), ("own", 1.0)]
