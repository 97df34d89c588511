"""Facts that an environment returns beside its scores: who sees them, and what is refused."""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rayrl
from rayrl import Result, Task
from rayrl.report.console import task_text
from rayrl.rollout.check import check_env
from rayrl.rollout.episode_io import episode_from_json, episode_to_json
from rayrl.rollout.records import group_from_bytes, group_to_bytes
from rayrl.rollout.rollout import play_episode, play_group
from rayrl.rollout.subprocess_env import SubprocessEnv
from rayrl.types import Episode
from tests.act import instant, says

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=6,
)


def returning(facts: Any, **rewards: Any) -> rayrl.Environment:
    @rayrl.env(tasks=[Task(seed=k) for k in range(4)], rewards={"score": 1.0, **rewards})
    async def asked(task: Task, agent: Any) -> Result:
        answer = await agent("?")
        return Result({"score": 0.0}, facts(answer) if callable(facts) else facts)

    return asked


@settings(max_examples=25)
@given(st.dictionaries(st.text(), plain, max_size=4))
async def test_facts_are_stored_as_they_are(facts: dict[str, Any]) -> None:
    group = await play_group(returning(facts), Task(seed=1), instant(), id="g", size=2)
    assert [dict(episode.facts) for episode in group.episodes] == [facts, facts]
    assert group_from_bytes(group_to_bytes(group)) == group
    for episode in group.episodes:
        stored = json.loads(json.dumps(episode_to_json(episode)))
        assert episode_from_json(stored).facts == facts


class Unequal:
    def __eq__(self, other: object) -> bool:
        raise SystemExit


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (5, "not JSON: 'int' object is not iterable"),
        ({"a": {1, 2}}, "not JSON: Object of type set"),
        ({"a": float("nan")}, "not JSON: Out of range float"),
        ({"a": (1, 2)}, "JSON reads them otherwise"),
        ({1: "a"}, "JSON reads them otherwise"),
        ({"a": Unequal()}, "not JSON"),
        ({"a": "x" * 1_000_001}, "1,000,010 characters, more than 1,000,000"),
    ],
)
async def test_what_cannot_be_a_fact(facts: dict[Any, Any], said: str) -> None:
    env = returning(facts)
    episode = await play_episode(env, Task(seed=1), instant(), id="e")
    assert episode.failure is not None
    assert episode.failure.kind == "env"
    assert said in episode.failure.message
    assert len(episode.failure.message) < 2000


async def test_a_group_reward_reads_facts() -> None:
    def majority(episodes: Sequence[Episode]) -> list[float]:
        counts = Counter(episode.facts["answer"] for episode in episodes)
        return [counts[episode.facts["answer"]] / len(episodes) for episode in episodes]

    env = returning(lambda answer: {"answer": len(answer) % 2}, agreed=rayrl.group_reward(majority))
    group = await play_group(env, Task(seed=1), instant(), id="g", size=8)
    counts = Counter(len(episode.turns[0].text) % 2 for episode in group.episodes)
    for episode in group.episodes:
        expected = counts[len(episode.turns[0].text) % 2] / 8
        assert episode.rewards["agent"] == expected


async def test_an_isolated_environment_has_facts(tmp_path: Path) -> None:
    path = tmp_path / "far.py"
    path.write_text(
        textwrap.dedent(
            """
            import rayrl

            @rayrl.env(tasks=[rayrl.Task(seed=1)], rewards={"score": 1.0})
            async def far(task, agent):
                return rayrl.Result({"score": 1}, {"heard": str(await agent("?")), "n": 10**30})
            """
        )
    )
    async with SubprocessEnv(rayrl.load_env(str(path)), slots=1) as env:
        episode = await play_episode(env, Task(seed=1), says("hm"), id="e")
    assert episode.failure is None, episode.failure
    assert episode.facts == {"heard": "hm", "n": 10**30}
    assert episode.scores == {"agent": {"score": 1.0}}


def test_facts_that_change_are_not_deterministic() -> None:
    calls = iter(range(10**6))
    (problem, *_) = check_env(returning(lambda answer: {"call": next(calls)}))
    assert "not deterministic: the same task and replies had the facts {'call': 0}" in problem


async def test_a_person_sees_them() -> None:
    episode = await play_episode(returning({"answer": "b"}), Task(seed=1), instant(), id="e")
    assert "facts: answer b" in task_text(episode).plain
