"""Whatever environment code raises or returns fails its episode, never the run."""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rayrl
from rayrl import Agent, Scores, Task
from rayrl.config import from_dict
from rayrl.environment.group_reward import MAX_SCORE
from rayrl.errors import MAX_TRACEBACK, EnvError, InfraError, clip, describe_error, safe_repr
from rayrl.learner.advantage import ADVANTAGES, NORMALIZERS, advantages
from rayrl.rollout.rollout import play_episode, play_group
from rayrl.types import Episode, Failure, Group, Message, Turn
from tests.act import says


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class Worse(ValueError):
    def __str__(self) -> str:
        raise SystemExit(4)

    __repr__ = __str__


class OwnBase(BaseException):
    pass


class MuteInfra(InfraError):
    def __str__(self) -> str:
        return 7  # type: ignore[return-value]


class Odd(SyntaxError):
    """An error that Python's traceback module cannot format."""

    def __init__(self) -> None:
        super().__init__("odd")
        self.lineno, self.filename, self.offset, self.text = 1, "f", 1, object()  # type: ignore[assignment]


def chained() -> Exception:
    error = ValueError("effect")
    error.__cause__ = Mute()
    return error


RAISED: list[tuple[Any, str]] = [
    (Mute, "whose __str__ raised RuntimeError"),
    (Worse, "whose __str__ raised SystemExit"),
    (OwnBase, "OwnBase"),
    (lambda: OwnBase("x" * 10_000), "characters left out"),
    (GeneratorExit, "GeneratorExit"),
    (StopIteration, "StopIteration"),
    (StopAsyncIteration, "StopAsyncIteration"),
    (lambda: SystemExit(3), "called sys.exit"),
    (lambda: SystemExit(Worse()), "called sys.exit"),
    (lambda: ExceptionGroup("two", [ValueError("a"), Mute()]), "ExceptionGroup"),
    (lambda: BaseExceptionGroup("two", [OwnBase(), ValueError("b")]), "BaseExceptionGroup"),
    (chained, "ValueError: effect"),
    (Odd, "Odd"),
    (lambda: EnvError(b"\\xff"), "xff"),
    (lambda: OSError(2, "no such"), "FileNotFoundError"),
    (lambda: MemoryError(), "MemoryError"),
    (lambda: RecursionError("deep"), "RecursionError"),
    (lambda: UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"), "UnicodeDecodeError"),
    (lambda: asyncio.CancelledError(), "cancelled itself"),
    (lambda: KeyError("win"), "KeyError: 'win'"),
]


@pytest.mark.parametrize(("make", "said"), RAISED)
@pytest.mark.parametrize("asks", [False, True])
async def test_whatever_is_raised_is_recorded(make: Any, said: str, asks: bool) -> None:
    @rayrl.env(tasks=[Task()], rewards={"win": 1.0})
    async def raises(task: Task, agent: Agent) -> Scores:
        if asks:
            await agent("go")
        raise make()

    group = await play_group(raises, Task(), says(), id="g", size=2)
    for episode in group.episodes:
        assert episode.failure is not None
        assert episode.failure.kind == "env"
        assert said in episode.failure.message
        assert "'raises'" in episode.failure.message
        assert len(episode.turns) == asks


async def test_an_infra_error_without_a_message() -> None:
    @rayrl.env(tasks=[Task()], rewards={"win": 1.0})
    async def raises(task: Task, agent: Agent) -> Scores:
        raise MuteInfra

    episode = await play_episode(raises, Task(), says(), id="e")
    assert episode.failure is not None
    assert (episode.failure.kind, "__str__ raised" in episode.failure.message) == ("infra", True)


async def test_a_person_can_still_interrupt() -> None:
    with pytest.raises(KeyboardInterrupt):
        describe_error(Interrupting())


class Interrupting(Exception):
    def __str__(self) -> str:
        raise KeyboardInterrupt


@dataclass(frozen=True, kw_only=True)
class Shy(Task):
    def __repr__(self) -> str:
        raise RuntimeError("secret")


async def test_a_task_whose_repr_raises() -> None:
    @rayrl.env(tasks=[Shy()], rewards={"win": 1.0})
    async def raises(task: Task, agent: Agent) -> Scores:
        raise ValueError("on fire")

    episode = await play_episode(raises, Shy(), says(), id="e")
    assert episode.failure is not None
    assert (
        "<Shy, whose __repr__ raised RuntimeError>: ValueError: on fire" in episode.failure.message
    )


# ---- how much is kept


async def test_a_message_of_50_megabytes_is_clipped_with_both_its_ends() -> None:
    @rayrl.env(tasks=[Task()], rewards={"win": 1.0})
    async def shouts(task: Task, agent: Agent) -> Scores:
        raise ValueError("begin" + "x" * 50_000_000 + "end")

    episode = await play_episode(shouts, Task(), says(), id="e")
    assert episode.failure is not None
    assert len(episode.failure.message) < 5_000
    assert "ValueError: begin" in episode.failure.message
    assert episode.failure.message.endswith("end")
    assert "characters left out" in episode.failure.message
    assert len(episode.failure.traceback) <= MAX_TRACEBACK
    assert "raise ValueError" in episode.failure.traceback


@settings(max_examples=50)
@given(st.text(max_size=500), st.integers(100, 300))
def test_clipping(text: str, most: int) -> None:
    once = clip(text, most)
    assert len(once) <= most
    assert clip(once, most) == once
    assert once == text or f"[{len(text) - (most - 60):,} characters left out]" in once


def test_a_failure_is_clipped_wherever_it_is_made() -> None:
    failure = Failure("env", "x" * 10**6, "y" * 10**6)
    assert len(failure.message) <= 4_000
    assert len(failure.traceback) <= MAX_TRACEBACK
    assert Failure(failure.kind, failure.message, failure.traceback) == failure


def test_values_are_clipped() -> None:
    assert safe_repr([1, 2]) == "[1, 2]"
    assert len(safe_repr("x" * 10**6)) <= 1_000


# ---- scores

GOOD = [0, 1, True, 0.5, -3.0, np.float32(0.5), np.int64(2), np.bool_(True), Decimal("0.25"),
        Fraction(1, 4), torch.tensor(0.5), np.array(2.0), MAX_SCORE]  # fmt: skip
BAD = [math.nan, math.inf, -math.inf, 1e308, -1e308, 1.1 * MAX_SCORE, 10**400, np.float64("nan"),
       np.float64("inf"), torch.tensor(math.nan), Decimal("NaN"), 1 + 2j, np.complex128(1 + 2j),
       "1", b"1", np.str_("1"), None, [], [1.0], {}, object(), torch.tensor([1.0, 2.0]),
       np.array([1.0, 2.0]), Worse()]  # fmt: skip


def scoring(value: Any) -> rayrl.Environment:
    @rayrl.env(tasks=[Task()], rewards={"win": 1.0})
    async def scores(task: Task, agent: Agent) -> Scores:
        return {"win": value}

    return scores


@pytest.mark.parametrize("value", GOOD, ids=repr)
async def test_scores_that_are_numbers(value: Any) -> None:
    episode = await play_episode(scoring(value), Task(), says(), id="e")
    assert episode.failure is None
    assert type(episode.scores["agent"]["win"]) is float
    assert episode.scores["agent"]["win"] == float(value)


@pytest.mark.parametrize("value", BAD, ids=[str(k) for k in range(len(BAD))])
async def test_values_that_are_not_scores(value: Any) -> None:
    episode = await play_episode(scoring(value), Task(), says(), id="e")
    assert episode.failure is not None
    assert episode.failure.kind == "env"
    assert (episode.scores, episode.rewards) == ({}, {})

    grouped = rayrl.env(
        tasks=[Task()], rewards={"rank": rayrl.group_reward(lambda episodes: [value] * 2)}
    )(_nothing)
    group = await play_group(grouped, Task(), says(), id="g", size=2)
    assert [e.failure and e.failure.kind for e in group.episodes] == ["env", "env"]


async def _nothing(task: Task, agent: Agent) -> Scores:
    return {}


async def test_weights_that_make_a_reward_too_large() -> None:
    env = scoring(1e6).configure(rewards={"win": 1e300})
    episode = await play_episode(env, Task(), says(), id="e")
    assert episode.failure is not None
    assert "give the reward 1e+306, which is too large" in episode.failure.message


@pytest.mark.parametrize("error", [SystemExit(1), OwnBase("x"), GeneratorExit(), Worse()])
async def test_whatever_a_group_reward_raises(error: BaseException) -> None:
    def rank(episodes: Sequence[Episode]) -> list[float]:
        raise error

    env = rayrl.env(tasks=[Task()], rewards={"rank": rayrl.group_reward(rank)})(_nothing)
    group = await play_group(env, Task(), says(), id="g", size=2)
    for episode in group.episodes:
        assert episode.failure is not None
        assert type(error).__name__ in episode.failure.message


REWARDS = st.floats(-MAX_SCORE, MAX_SCORE, allow_nan=False)


@settings(max_examples=60)
@given(
    st.lists(st.lists(REWARDS, min_size=2, max_size=4), min_size=1, max_size=3),
    st.sampled_from(list(ADVANTAGES)),
    st.sampled_from(NORMALIZERS),
)
def test_advantages_of_allowed_rewards_are_finite_in_float32(
    rewards: list[list[float]], method: str, normalize: str
) -> None:
    turn = Turn("agent", (), "x", "stop", state="s")
    groups = [
        Group(
            str(g),
            Task(),
            tuple(
                Episode(f"{g}/{k}", "e", Task(), k, (turn, turn), {}, {"agent": reward})
                for k, reward in enumerate(of_group)
            ),
        )
        for g, of_group in enumerate(rewards)
    ]
    algo = from_dict({"algo": {"advantage": method, "normalize": normalize}}).algo
    for of_group in advantages(groups, algo):
        found = torch.tensor([value for own in of_group.values() for value in own])
        assert found.dtype == torch.float32
        assert found.square().sum().isfinite()


# ---- what is asked, scripted players, tools

ASKED: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
    ((7,), {}, "TypeError"),
    (([7],), {}, "was called with 7"),
    ((Message("user", 7),), {}, "whose content is 7"),  # type: ignore[arg-type]
    ((Message("user", None),), {}, "whose content is None"),  # type: ignore[arg-type]
    ((Message("robot", "x"),), {}, "the role 'robot'"),  # type: ignore[arg-type]
    (("x",), {"state": (1, 2)}, "state=(1, 2)"),
    (("x",), {"max_tokens": -1}, "max_tokens=-1"),
    (("x",), {"max_tokens": "many"}, "max_tokens='many'"),
    (("x",), {"max_tokens": 2.5}, "max_tokens=2.5"),
    (([],), {}, "without a message"),
]


@pytest.mark.parametrize(("args", "keywords", "said"), ASKED)
async def test_an_invalid_call_is_an_env_failure(args: Any, keywords: Any, said: str) -> None:
    @rayrl.env(tasks=[Task()], rewards={"win": 1.0})
    async def asks(task: Task, agent: Agent) -> Scores:
        await agent(*args, **keywords)
        return {"win": 1.0}

    from tests.act import instant

    episode = await play_episode(asks, Task(), instant(), id="e")
    assert episode.failure is not None
    assert episode.failure.kind == "env"
    assert said in episode.failure.message


@pytest.mark.parametrize(
    "make", [Mute, Worse, OwnBase, lambda: SystemExit(2), lambda: TypeError("x")]
)
async def test_what_a_scripted_player_raises_is_an_env_failure(make: Any) -> None:
    def teacher(messages: Sequence[Message], rng: Any) -> str:
        raise make()

    @rayrl.env(tasks=[Task()], rewards={"win": 1.0})
    async def asks(task: Task, agent: Agent) -> Scores:
        await agent("go")
        return {"win": 1.0}

    players = {"agent": rayrl.ScriptedPlayer(teacher)}
    episode = await play_episode(asks, Task(), players, id="e")
    assert episode.failure is not None
    assert episode.failure.kind == "env"


class Unwritable:
    def __str__(self) -> str:
        raise OwnBase("no")

    __repr__ = __str__


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda: sys.exit(3), "raised SystemExit: 3"),
        (lambda: (_ for _ in ()).throw(OwnBase("x")), "raised OwnBase: x"),
        (lambda: (_ for _ in ()).throw(Mute()), "raised Mute: <Mute, whose __str__ raised"),
        (lambda: (_ for _ in ()).throw(ValueError("x" * 10**6)), "characters left out"),
        (lambda: Unwritable(), "raised OwnBase: no"),
    ],
)
async def test_whatever_a_tool_raises_is_reported_to_the_model(act: Any, said: str) -> None:
    def press() -> Any:
        """Press it."""
        result = act()
        return next(result) if hasattr(result, "__next__") else result

    told: list[str] = []

    @rayrl.env(tasks=[Task()], rewards={"win": 1.0})
    async def asks(task: Task, agent: Agent) -> Scores:
        await agent("go", tools=[press], tool_rounds=1)
        told.extend(m.content for m in agent.messages if m.role == "tool")
        return {"win": 1.0}

    call = '<tool_call>{"name": "press", "arguments": {}}</tool_call>'
    episode = await play_episode(asks, Task(), says(call), id="e")
    assert episode.failure is None
    assert episode.scores["agent"]["tool_errors"] == 1.0
    assert said in told[0]
    assert len(told[0]) < 5_000


def test_a_task_source_that_exits() -> None:
    def source(seed: int, u: float) -> Task:
        sys.exit(1)

    env = rayrl.env(tasks=source, rewards={"win": 1.0})(_nothing)
    with pytest.raises(EnvError, match="task source of '_nothing' raised SystemExit: 1"):
        env.tasks(0, 1)
