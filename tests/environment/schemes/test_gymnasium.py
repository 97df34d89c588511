"""Gymnasium's environments in text: what is shown, what is an action, and what is refused."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

import rayrl
from rayrl.environment.environment import Environment
from rayrl.environment.registry import environment_of
from rayrl.environment.schemes.spaces import choices, parse
from rayrl.errors import ConfigError
from rayrl.rollout.check import check_env
from rayrl.rollout.players import ScriptedPlayer
from rayrl.rollout.rollout import play_episode
from rayrl.types import Episode

LEFT, DOWN, RIGHT, UP = "0123"
numbers = itertools.count()  # in the names of environments
WALK = [RIGHT, RIGHT, DOWN, DOWN, DOWN, RIGHT]  # over the lake of 4 times 4


class Echo(gymnasium.Env[Any, Any]):
    """Any space of actions; rewards 1 for each, and ends after three."""

    def __init__(self, space: spaces.Space[Any]) -> None:
        self.action_space, self.observation_space = space, spaces.Discrete(1000)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.steps = 0
        return int(self.np_random.integers(1000)), {}

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action)
        self.steps += 1
        return self.steps, 1.0, self.steps == 3, False, {}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    before = dict(gymnasium.registry)
    yield
    gymnasium.registry.clear()
    gymnasium.registry.update(before)


def echo(space: spaces.Space[Any], **settings: Any) -> Environment:
    name = f"Echo{next(numbers)}-v0"  # spaces are read once per name
    gymnasium.register(name, entry_point=lambda: Echo(space))
    return rayrl.load_env(f"gymnasium:{name}").configure(settings)


def play(env: Environment, replies: list[str] | str, seed: int = 3) -> Episode:
    """An episode in which these are replied, or what a player of the environment does."""
    said = iter(replies)
    player = env.players[replies] if isinstance(replies, str) else lambda messages, rng: next(said)
    (task,) = env.tasks(seed, 1)
    agent = ScriptedPlayer(player)
    return asyncio.run(
        play_episode(env, task, {"agent": agent}, id="test", seed=task.seed, deadline_s=60)
    )


def scores(episode: Episode) -> dict[str, float]:
    assert episode.failure is None, episode.failure
    return dict(episode.scores["agent"])


def asked(episode: Episode) -> list[str]:
    return [turn.prompt[-1].content for turn in episode.turns]


def test_the_lake_is_shown_and_crossed() -> None:
    env = rayrl.load_env("gymnasium:FrozenLake-v1").configure({"make": {"is_slippery": False}})
    episode = play(env, WALK)
    assert scores(episode) == {"reward": 1.0, "illegal": 0.0}
    first, second, *_ = asked(episode)
    how = "Actions: 0 to 3. Answer with the number of one only."
    assert first == f"{how}\n\n*S*FFF\nFHFH\nFFFH\nHFFG"
    assert second == "Reward: 0\n\n(Right)\nS*F*FF\nFHFH\nFFFH\nHFFG"
    named = env.configure({"actions": ["left", "down", "right", "up"], "max_turns": 7})
    words = {LEFT: "left", DOWN: "Down", RIGHT: "so: <action> right </action>", UP: "up"}
    episode = play(named, ["over there", *(words[move] for move in WALK)])
    assert scores(episode) == {"reward": 1.0, "illegal": 1 / 7}
    how = "Actions: left, down, right, up. Answer with one of them only."
    assert asked(episode)[0].startswith(how)
    assert asked(episode)[1] == f"That is no action. {how}"


def test_colours_are_words() -> None:
    env = rayrl.load_env("gymnasium:Taxi-v3")
    shown = asked(play(env, "random"))[0]
    assert shown.count("(blue)") == shown.count("(magenta)") == 1, "passenger and destination"
    assert shown.count("*") == 2, "the taxi"
    assert "\x1b" not in shown


@pytest.mark.parametrize(
    ("space", "legal", "illegal"),
    [
        (
            spaces.Discrete(3, start=-1),
            {"-1": -1, " 1 ": 1, "<action>0</action>": 0, "1 or <action>0</action>": 0},
            ["2", "-2", "1.0", "1 1", "one", "", "<action></action>", "0 <action>7</action>"],
        ),
        (
            spaces.Box(-2, 2, (2,), np.float32),
            {"1 -1.5": [1, -1.5], "[0.5, .5]": [0.5, 0.5], "(2,-2e0)": [2, -2]},
            ["1", "1 2 1", "3 0", "nan 0", "inf 0", "1 and 1", "", "1e999 0", "1e300 0"],
        ),
        (spaces.Box(0, 9, (1,), np.int64), {"3": [3]}, ["3.5", "-1", "10", "1e300"]),
        (spaces.MultiDiscrete([2, 3]), {"1 2": [1, 2], "(0, 0)": [0, 0]}, ["2 0", "1", "0.5 1"]),
        (spaces.MultiBinary(3), {"0 1 1": [0, 1, 1]}, ["0 2 0", "1 1"]),
        (spaces.Text(3, charset="abc"), {"abc": "abc", " b ": "b"}, ["abcd", "x", ""]),
    ],
)
def test_what_is_an_action(
    space: spaces.Space[Any], legal: dict[str, Any], illegal: list[str]
) -> None:
    for reply, action in legal.items():
        assert np.array_equal(parse(reply, space, choices(space, ())), action), reply
    for reply in illegal:
        assert parse(reply, space, choices(space, ())) is None, reply
    env = echo(space, max_turns=4)
    assert scores(play(env, "random")) == {"reward": 3.0, "illegal": 0.0}
    reply, *_ = legal
    assert scores(play(env, [illegal[0], reply, reply, reply])) == {"reward": 3.0, "illegal": 0.25}
    assert scores(play(env, [illegal[0]] * 4)) == {"reward": 0.0, "illegal": 1.0}


@pytest.mark.parametrize(
    "name", ["FrozenLake-v1", "Taxi-v3", "Blackjack-v1", "CliffWalking-v1", "CartPole-v1"]
)
def test_it_is_ready_to_train_on(name: str) -> None:
    env = rayrl.load_env(f"gymnasium:{name}").configure({"max_turns": 5})
    assert check_env(env) == []
    episode = play(env, "random")
    assert play(environment_of(env.spec), "random") == episode, "the same in another process"
    assert asked(play(env, "random", seed=4)) != asked(episode)
    assert math.isfinite(scores(episode)["reward"])


@pytest.mark.parametrize(
    ("name", "args", "says"),
    [
        ("FrozenLak-v1", {}, "Did you mean: `FrozenLake`"),
        ("FrozenLake-v9", {}, "version `v9`"),
        ("no_such_module:Game-v0", {}, "no_such_module"),
        (
            "FrozenLake-v1",
            {"actions": ["a", "b"]},
            "has 2 names, and gymnasium:FrozenLake-v1 has 4",
        ),
        ("Pendulum-v1", {"actions": ["a"]}, "has no actions to name"),
        ("FrozenLake-v1", {"make": {"size": 9}}, "could not be made"),
        ("FrozenLake-v1", {"max_turns": 0}, "at least one turn"),
        ("FrozenLake-v1", {"slippery": False}, "no such setting"),
    ],
)
def test_what_is_wrong_is_said(name: str, args: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        rayrl.load_env(f"gymnasium:{name}").configure(args).tasks(0, 1)
    assert says in str(raised.value)


def test_a_module_may_register_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    code = (
        "gymnasium.register('zz/Lake-v1', entry_point=gymnasium.spec('FrozenLake-v1').entry_point)"
    )
    (tmp_path / "zz_lakes.py").write_text(f"import gymnasium\n{code}\n")
    env = rayrl.load_env("gymnasium:zz_lakes:zz/Lake-v1").configure({"make": {"map_name": "8x8"}})
    assert env.name == "Lake-v1"
    assert "*S*FFFFFFF" in asked(play(env, "random"))[0]


def test_actions_without_a_text_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"Tuple.*have no text here"):
        echo(spaces.Tuple([spaces.Discrete(2)] * 2)).tasks(0, 1)
