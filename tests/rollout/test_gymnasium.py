"""An environment as a `gymnasium.Env`: its steps are the turns of a seat."""

from __future__ import annotations

import asyncio
import gc
import itertools
import random
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import SyncVectorEnv

import rayrl
from rayrl import Agent, ConfigError, EnvError, Environment, Message, Scores, Task, system, user
from rayrl.rollout.check import find_problems
from rayrl.rollout.gymnasium import GymnasiumEnv
from rayrl.rollout.stepped import SteppedEpisodes

TASKS = [Task(seed=seed) for seed in range(40)]


def sums() -> Environment:
    """Three numbers to be added, one per turn, against a seat that guesses."""

    @rayrl.env(tasks=TASKS, rewards={"right": 1.0, "logged": 0.0}, name="sums")
    async def play(task: Task, adder: Agent, guesser: Agent) -> Scores:
        total = 0
        new = [system("Add up.")]
        for k in range(3):
            number = task.rng(k).randrange(3)
            total += number
            reply = await adder([*new, user(f"+{number}")], state=str(total))
            new = []
        guess = await guesser("0 to 6?")
        return {
            "adder": {"right": float(reply == str(total)), "logged": 1.0},
            "guesser": {"right": float(guess == str(total)), "logged": 2.0},
        }

    @play.player("three")
    def three(messages: Sequence[Message], rng: random.Random) -> str:
        return "3"

    @play.player("any")
    def guess_any(messages: Sequence[Message], rng: random.Random) -> str:
        return str(rng.randrange(7))

    return play


def numeric(env: Environment, **more: Any) -> Environment:
    def numbers(messages: Sequence[Message]) -> list[float]:
        said = [float(one.content[1:]) for one in messages if one.content.startswith("+")]
        return [*said, *[-1.0] * (3 - len(said))]

    given = {"shape": (3,), "low": -1.0, "high": 2.0, "actions": list("0123456"), **more}
    env.observation(**given)(numbers)
    return env


def sum_of(observation: Any) -> int:
    return int(observation[observation >= 0].sum())


def stepped(env: Environment, **more: Any) -> GymnasiumEnv:
    return rayrl.to_gymnasium(env, seat="adder", **{"opponents": {"guesser": "three"}, **more})


def test_text_goes_in_and_out() -> None:
    env = stepped(sums(), render_mode="ansi")
    seen, info = env.reset(options={"task": TASKS[5]})
    numbers = [TASKS[5].rng(k).randrange(3) for k in range(3)]
    assert seen == f"Add up.\n\n+{numbers[0]}"
    assert [message.role for message in info["messages"]] == ["system", "user"]
    assert info["state"] == str(numbers[0])
    assert env.step("?")[:4] == (f"+{numbers[1]}", 0.0, False, False)
    env.step("?")
    shown = env.render()
    assert shown is not None
    assert shown.endswith(f"[assistant]\n?\n\n[user]\n+{numbers[2]}")
    seen, reward, terminated, truncated, info = env.step(str(sum(numbers)))
    assert (seen, reward, terminated, truncated) == ("", 1.0, True, False)
    assert info["scores"] == {"right": 1.0, "logged": 1.0}
    assert [turn.text for turn in info["played"].turns] == ["?", "?", str(sum(numbers)), "3"]
    with pytest.raises(EnvError, match="reset"):
        env.step("?")
    env.close()


def test_numbers_where_there_is_a_view() -> None:
    env = stepped(numeric(sums()))
    assert env.observation_space == spaces.Box(-1.0, 2.0, (3,), np.float32)
    assert env.action_space == spaces.Discrete(7)
    rewards = []
    for _ in range(10):
        observation, _ = env.reset()
        assert observation.tolist()[1:] == [-1.0, -1.0]
        terminated, reward = False, 0.0
        while not terminated:
            observation, reward, terminated, _, _ = env.step(np.int64(sum_of(observation)))
        rewards.append(reward)
    assert rewards == [1.0] * 10
    text = stepped(numeric(sums()), numeric=False)
    assert isinstance(text.reset(seed=0)[0], str)
    env.close()
    text.close()


def test_legal_actions_are_a_mask() -> None:
    def from_two(messages: Sequence[Message]) -> list[int]:
        return [2, 5]

    env = stepped(numeric(sums(), legal=from_two))
    observation, _ = env.reset(seed=1)
    assert observation in env.observation_space
    assert observation["action_mask"].tolist() == [0, 0, 1, 0, 0, 1, 0]
    bare = stepped(numeric(sums(), legal=from_two), masked=False)
    assert np.array_equal(bare.reset(seed=1)[0], observation["observations"])
    everything = stepped(numeric(sums()), masked=True)
    assert everything.reset(seed=1)[0]["action_mask"].tolist() == [1.0] * 7
    for one in (env, bare, everything):
        one.close()


@pytest.mark.filterwarnings("ignore:.*render modes due to:UserWarning")
@pytest.mark.filterwarnings("ignore:.*A Box .* (minimum|maximum) value is:UserWarning")
@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("tictactoe", {}),
        ("tictactoe", {"masked": False}),
        ("tictactoe", {"numeric": False}),
        ("tictactoe_versus", {"seat": "o", "opponents": {"x": ["random", "optimal"]}}),
        ("copyword", {}),
        ("reverse_text", {}),
    ],
)
def test_gymnasium_finds_no_fault(name: str, given: Any) -> None:
    env = rayrl.to_gymnasium(name, **given)
    check_env(env)
    env.close()


def test_the_same_seed_is_the_same_episodes() -> None:
    """Task, opponent, its draws: all come from the generator that `reset` seeds."""

    def scores(seed: int | None, env: GymnasiumEnv, n: int) -> list[Any]:
        found = []
        for k in range(n):
            env.reset(seed=seed if k == 0 else None)
            for _ in range(3):
                *_, info = env.step("?")
            turns = [turn.text for turn in info["played"].turns]
            found.append((turns[-1], info["played"].task.seed))
        return found

    env = stepped(sums(), opponents={"guesser": ["three", "any"]})
    again = stepped(sums(), opponents={"guesser": ["three", "any"]})
    first = scores(3, env, 12)
    assert first == scores(3, again, 12) == scores(3, env, 12)
    assert len(set(first)) > 6
    assert {"3"} < {guess for guess, _ in first}
    assert first != scores(4, env, 12)
    env.close()
    again.close()


def test_many_are_stepped_at_once() -> None:
    many = SyncVectorEnv([lambda: stepped(numeric(sums())) for _ in range(3)])
    seen, _ = many.reset(seed=5)
    assert seen.shape == (3, 3)
    for _ in range(2):
        many.step(np.array([sum_of(one) for one in seen]))
    seen, *_ = many.step(np.zeros(3, int))
    many.close()


async def test_on_an_event_loop_too() -> None:
    """As in a notebook, whose cells run on one."""
    env = stepped(sums())
    env.reset(seed=0)
    env.reset(seed=1)
    for _ in range(3):
        *_, terminated, _, _ = env.step("1")
    assert terminated
    env.close()


def test_nothing_is_left_of_an_episode_that_was_given_up() -> None:
    ended = []

    @rayrl.env(tasks=TASKS, rewards={"x": 1.0})
    async def endless(task: Task, agent: Agent) -> Scores:
        try:
            while True:
                await agent("?")
        finally:
            ended.append(task.seed)

    env = rayrl.to_gymnasium(endless)
    env.reset(options={"task": TASKS[1]})
    env.step("on")
    env.reset(options={"task": TASKS[2]})
    assert ended == [1]
    env.close()
    env.close()
    assert ended == [1, 2]
    env.reset(options={"task": TASKS[3]})  # it opens again
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del env
        gc.collect()
    assert ended == [1, 2, 3]


def test_an_error_of_the_environment_is_raised_and_the_next_episode_plays() -> None:
    @rayrl.env(tasks=TASKS, rewards={"x": 1.0})
    async def fragile(task: Task, agent: Agent) -> Scores:
        return {"x": 1.0 / float(await agent("?"))}

    env = rayrl.to_gymnasium(fragile)
    for _ in range(2):
        env.reset(seed=0)
        with pytest.raises(EnvError, match="ZeroDivisionError"):
            env.step("0")
        env.reset(seed=0)
        assert env.step("0.5")[1] == 2.0
    env.close()


def test_seats_and_branches_that_ask_at_once() -> None:
    @rayrl.env(tasks=TASKS, rewards={"x": 1.0})
    async def crowd(task: Task, a: Agent, b: Agent) -> Scores:
        left, right = a.branch(), a.branch()
        replies = await asyncio.gather(left("a1"), right("a2"), b("b"))
        await asyncio.sleep(0)
        last = await a("last")
        return {seat: {"x": float("".join([*replies, last]))} for seat in "ab"}

    episodes = SteppedEpisodes(crowd, ["a", "b"])
    episodes.start(TASKS[0], 0, {})
    assert {k: q.new[0].content for k, q in episodes.questions.items()} == {"a": "a1", "b": "b"}
    episodes.answer({"a": "1", "b": "3"})
    assert {k: q.new[0].content for k, q in episodes.questions.items()} == {"a": "a2"}
    episodes.answer({"a": "2"})
    assert episodes.questions["a"].new[0].content == "last"
    assert episodes.episode is None
    episodes.answer({"a": "4"})
    assert episodes.episode is not None
    assert episodes.episode.rewards == {"a": 1234.0, "b": 1234.0}
    episodes.close()


def test_a_question_that_the_environment_takes_back() -> None:
    @rayrl.env(tasks=TASKS, rewards={"x": 1.0})
    async def impatient(task: Task, a: Agent, b: Agent) -> Scores:
        slow, _ = asyncio.ensure_future(a("first?")), await b("quick?")
        await asyncio.sleep(0)
        slow.cancel()
        await asyncio.gather(slow, return_exceptions=True)
        left = asyncio.ensure_future(a.branch()("left behind?"))
        reply = await b.branch()("and now?")
        return {seat: {"x": float(reply)} for seat in "ab" if left}

    episodes = SteppedEpisodes(impatient, ["a", "b"])
    for _ in range(2):
        episodes.start(TASKS[0], 0, {})
        assert {q.new[0].content for q in episodes.questions.values()} == {"first?", "quick?"}
        episodes.answer({"a": "in vain", "b": "1"})
        assert {q.new[0].content for q in episodes.questions.values()} == {
            "left behind?",
            "and now?",
        }
    episodes.close()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "say which one is stepped"),
        ({"seat": "ader", "opponents": {"guesser": "any"}}, "Did you mean 'adder'"),
        ({"seat": "adder"}, "say who plays it"),
        ({"seat": "adder", "opponents": {"guesser": []}}, "say who plays it"),
        ({"seat": "adder", "opponents": {"gueser": "any"}}, "Did you mean 'guesser'"),
        ({"seat": "adder", "opponents": {"adder": "any", "guesser": "any"}}, "guesser"),
        ({"seat": "adder", "opponents": {"guesser": "tree"}}, "Did you mean 'three'"),
        ({"seat": "adder", "opponents": {"guesser": "any"}, "numeric": True}, "@env.observation"),
        ({"seat": "adder", "opponents": {"guesser": "any"}, "masked": True}, "in text here"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(given: Any, words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        rayrl.to_gymnasium(sums(), **given)
    assert words in str(raised.value)


def _play_on(world: GymnasiumEnv) -> None:
    for seed in itertools.count():
        world.reset(seed=seed)
        world.step(0)


@pytest.mark.parametrize(
    ("view", "words"),
    [
        ({"shape": (4,)}, "returned the shape (3,), declared is (4,)"),
        ({"high": 0.5}, "between low=-1 and high=0.5"),
        ({"legal": lambda messages: []}, "name at least one action"),
        ({"legal": lambda messages: [7]}, "from 0 to 6"),
        ({"legal": lambda messages: messages[99]}, "IndexError"),
    ],
)
async def test_a_wrong_view_is_found_by_the_check_and_in_a_step(view: Any, words: str) -> None:
    env = numeric(sums(), **view)
    (problem,) = await find_problems(env, {})
    assert words in problem
    world = stepped(env)
    with pytest.raises(EnvError) as raised:
        _play_on(world)
    assert words in str(raised.value)
    world.close()


@pytest.mark.parametrize("actions", [[], ["only"], [1, 2]])
def test_a_view_needs_actions(actions: Any) -> None:
    with pytest.raises(ConfigError, match="the reply of each action"):
        numeric(sums(), actions=actions)


@pytest.mark.parametrize("action", [7, -1])
def test_an_action_that_there_is_not(action: int) -> None:
    env = stepped(numeric(sums()))
    env.reset(seed=0)
    with pytest.raises(EnvError, match="there are 0 to 6"):
        env.step(action)
    env.close()
