"""A call without `await` is named as such: at run time, and by `rayrl env check`."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from typing import Any

import pytest

import rayrl
from rayrl import Agent, Environment, Scores, Task, check_env, play_episode
from tests.act import says

pytestmark = pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning")


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """Collect coroutines that were not awaited while Python's warning about them is ignored."""
    yield
    gc.collect()


async def judged(text: str) -> float:
    return float(text == "yes")


async def all_scores() -> dict[str, float]:
    return {"right": 1.0}


async def reply_is_used(task: Task, agent: Agent) -> Scores:
    reply: Any = agent("hello")
    return {"right": float(reply.strip() == "yes")}


async def reply_is_not_used(task: Task, agent: Agent) -> Scores:
    agent("hello")  # type: ignore[unused-coroutine]
    return {"right": 1.0}


async def second_reply_is_compared(task: Task, agent: Agent) -> Scores:
    await agent("hello")
    return {"right": float(agent("again") == "yes")}


async def reply_is_unpacked(task: Task, agent: Agent) -> Scores:
    first, *_ = agent("hello")  # type: ignore[misc]
    return {"right": float(first == "y")}


async def score_is_a_coroutine(task: Task, agent: Agent) -> Scores:
    return {"right": judged(await agent("hello"))}  # type: ignore[dict-item]


async def scores_are_a_coroutine(task: Task, agent: Agent) -> Scores:
    await agent("hello")
    return all_scores()  # type: ignore[return-value]


async def helper_is_not_awaited(task: Task, agent: Agent) -> Scores:
    await agent("hello")
    score: Any = judged("yes")
    return {"right": score + 1.0}


def env(play: Any) -> Environment:
    return rayrl.env(tasks=[Task(seed=k) for k in range(8)], rewards={"right": 1.0})(play)


@pytest.mark.parametrize(
    ("play", "said"),
    [
        (reply_is_used, "agent(…) was called without `await`, 1 of 1 times"),
        (reply_is_not_used, "agent(…) was called without `await`, 1 of 1 times"),
        (second_reply_is_compared, "agent(…) was called without `await`, 1 of 2 times"),
        (reply_is_unpacked, "write `reply = await agent(…)`"),
        (score_is_a_coroutine, "Write `await` before the call of judged"),
        (scores_are_a_coroutine, "Write `await` before the call of all_scores"),
        (helper_is_not_awaited, "was not awaited: write `await` before it"),
    ],
)
async def test_a_missing_await_is_named(play: Any, said: str) -> None:
    environment = env(play)
    episode = await play_episode(environment, Task(seed=0), says(), id="e")
    assert episode.failure is not None
    assert episode.failure.kind == "env"
    assert said in episode.failure.message
    (problem,) = await asyncio.to_thread(check_env, environment)
    assert said in problem


async def test_a_task_source_that_must_be_awaited() -> None:
    async def source(seed: int, u: float) -> Task:
        return Task(seed=seed)

    async def play(task: Task, agent: Agent) -> Scores:
        return {"right": float(await agent("hello") == "yes")}

    environment = rayrl.env(tasks=source, rewards={"right": 1.0})(play)  # type: ignore[arg-type]
    (problem,) = await asyncio.to_thread(check_env, environment)
    assert "Write `await` before the call of" in problem


async def test_gather_counts_as_awaiting() -> None:
    async def play(task: Task, x: Agent, o: Agent) -> Scores:
        replies = await asyncio.gather(x("hello"), o("hello"))
        later = asyncio.create_task(x("again"))
        return {"right": float(replies == ["yes", "yes"]), "later": float(await later == "yes")}

    async def both(task: Task, x: Agent, o: Agent) -> Scores:
        scores = await play(task, x, o)
        return {"x": scores, "o": scores}  # type: ignore[dict-item]

    environment = rayrl.env(tasks=[Task(seed=0)], rewards={"right": 1.0, "later": 1.0})(both)
    players = dict.fromkeys(("x", "o"), says()["agent"])
    episode = await play_episode(environment, Task(seed=0), players, id="e")
    assert episode.failure is None
    assert episode.rewards == {"x": 2.0, "o": 2.0}
