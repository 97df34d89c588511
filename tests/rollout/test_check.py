from __future__ import annotations

import contextlib
import enum
import itertools
import random
import signal
import time
from dataclasses import dataclass
from typing import Any

import pytest

import rayrl
from rayrl import Scores, Task, check_env
from rayrl.rollout import check


@dataclass(frozen=True, kw_only=True)
class Plain(Task):
    word: str = ""
    thing: Any = None


def plain(seed: int, u: float, size: int = 3) -> Plain:
    return Plain(seed=seed, word="ab" * size)


def made(source: Any = plain, play: Any = None, **rewards: Any) -> rayrl.Environment:
    async def echo(task: Any, agent: Any) -> Scores:
        reply = await agent(f"{getattr(task, 'word', '')} {task.rng('start').random()}")
        return {"right": float(reply == "yes")}

    return rayrl.env(tasks=source, rewards=rewards or {"right": 1.0}, name="made")(play or echo)


def test_a_good_environment_has_no_problems() -> None:
    env = made()
    env.player("teacher")(lambda messages, rng: "yes")
    assert check_env(env) == []
    assert check_env(env, {"size": 5}) == []


def test_settings_are_checked() -> None:
    (problem,) = check_env(made(), {"szie": 5})
    assert "Did you mean 'size'" in problem


_count = itertools.count()


class Side(enum.StrEnum):
    LEFT = "left"


@dataclass(frozen=True, kw_only=True)
class Hinted(Task):
    side: Side
    counts: dict[int, tuple[str, ...]]


def test_a_task_with_enums_and_keys_that_are_numbers_has_no_problems() -> None:
    def source(seed: int, u: float) -> Hinted:
        return Hinted(seed=seed, side=Side.LEFT, counts={3: ("a",)})

    assert check_env(made(source)) == []


class Loose(Task):
    """Not decorated as a dataclass itself."""


@dataclass(frozen=True, kw_only=True)
class Holder(Task):
    thing: Any = None


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (lambda seed, u: Plain(seed=seed, word=str(random.random())), "not deterministic"),
        (lambda seed, u: Plain(word="a"), "every task has the same seed"),
        (lambda seed, u: Loose(seed=seed), "must be a frozen dataclass"),
        (lambda seed, u: Holder(seed=seed, thing={1, 2}), "episode log as JSON"),
        (lambda seed, u: Holder(seed=seed, thing=len), "episode log as JSON"),
        (lambda seed, u: Holder(seed=seed, thing=lambda: 0), "sent to another process"),
        (lambda seed, u: Holder(seed=seed, thing=(1, 2)), "'thing' (type hint Any) holds (1, 2)"),
        (lambda seed, u: Holder(seed=seed, thing=Side.LEFT), "would be read from a file as 'left'"),
        (lambda seed, u: None, "must return a rayrl.Task"),
    ],
)
def test_problems_of_tasks(source: Any, said: str) -> None:
    assert any(said in problem for problem in check_env(made(source)))


async def _silent(task: Task, agent: Any) -> Scores:
    return {"right": 1.0}


async def _fails(task: Task, agent: Any) -> Scores:
    raise KeyError("board")


async def _omits_scores(task: Task, agent: Any) -> Scores:
    await agent("a")
    return {"rigth": 1.0}


async def _talks_at_random(task: Task, agent: Any) -> Scores:
    await agent(str(next(_count)))
    return {"right": 1.0}


async def _scores_at_random(task: Task, agent: Any) -> Scores:
    await agent("a")
    return {"right": next(_count)}


async def _hangs(task: Task, agent: Any) -> Scores:
    import asyncio

    await agent("a")
    await asyncio.Event().wait()
    return {"right": 1.0}


@pytest.mark.parametrize(
    ("play", "said"),
    [
        (_silent, "no model was called"),
        (_fails, "KeyError: 'board'"),
        (_omits_scores, "Did you mean 'right'"),
        (_talks_at_random, "different messages at turn 0"),
        (_scores_at_random, "not deterministic: the same task and replies were scored"),
        (_hangs, "did not end within 0.1 s"),
    ],
)
def test_problems_of_play(play: Any, said: str) -> None:
    (problem,) = check_env(made(play=play), deadline_s=0.1)
    assert said in problem


def test_all_weights_zero() -> None:
    assert "every reward has weight 0" in check_env(made(right=0.0))[0]
    group = rayrl.group_reward(lambda episodes: [0.0] * len(episodes), 0.0)
    assert "every reward has weight 0" in check_env(made(right=0.0, rank=group))[0]
    assert check_env(made(right=0.0, rank=group).configure({}, {"rank": 0.5})) == []


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("text", "'agent' was sent different messages"),
        ("score", "the same task and replies were scored"),
    ],
)
def test_randomness_that_only_a_good_player_reaches(where: str, said: str) -> None:
    async def deep(task: Task, agent: Any) -> Scores:
        if await agent("a") != "the word":
            return {"right": 0.0}
        await agent(f"b {next(_count)}" if where == "text" else "b")
        return {"right": next(_count) if where == "score" else 1.0}

    env = made(play=deep)
    assert check_env(env) == []
    env.player("teacher")(lambda messages, rng: "the word")
    (problem,) = check_env(env)
    assert problem.startswith("with player 'teacher': not deterministic: ")
    assert said in problem
    assert "episodes start over instead of resuming when their process dies" in problem


def test_a_teacher_that_cannot_play() -> None:
    env = made()
    env.player("broken")(lambda messages, rng: messages[7].content)
    (problem,) = check_env(env)
    assert "with player 'broken'" in problem
    assert "IndexError" in problem


@pytest.mark.parametrize("catches", [False, True])
@pytest.mark.parametrize("kind", ["loop", "call"])
def test_code_that_never_awaits_is_interrupted_and_named(
    kind: str, catches: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "MARGIN_S", 0.1)
    before = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)

    def hang() -> None:
        while True:
            time.sleep(0 if kind == "loop" else 600)

    @rayrl.env(tasks=[Task(seed=1)], rewards={"n": 1.0})
    async def hangs(task: Task, agent: rayrl.Agent) -> Scores:
        await agent("a")
        if catches:
            with contextlib.suppress(Exception):
                hang()
        hang()
        return {"n": 1.0}

    (problem,) = check_env(hangs, deadline_s=0.1)
    assert "has not awaited anything for 0.2 s, and is at" in problem
    assert "test_check.py" in problem
    assert "in hang" in problem
    after = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)
    assert after[0] is before[0]
    assert after[1][1] == before[1][1]
    assert (after[1][0] > 0) == (before[1][0] > 0), "pytest-timeout's own goes on"
