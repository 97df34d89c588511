"""Exhaustive checks: of which environments, with which settings, and in evaluations of a run."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import rayrl
from rayrl import Agent, Scores, Task
from rayrl.config import Config, from_dict
from rayrl.environment.environment import Environment
from rayrl.environment.registry import load_env
from rayrl.errors import ConfigError, EnvError
from rayrl.rollout.agent import Player
from rayrl.rollout.players import ScriptedPlayer
from rayrl.run.evaluation import evaluations
from rayrl.run.evaluation.checks import check_args, check_prefixes, run_checks
from rayrl.run.evaluation.evaluator import Evaluator, check_metrics
from rayrl.run.folder import RunDir
from tests.replicas import Replicas


async def talk(task: Task, agent: Agent) -> Scores:
    """Never played here."""
    return {"win": 1.0}


async def duel(task: Task, one: Agent, other: Agent) -> Scores:
    """Never played here."""
    return {}


def with_check(name: str = "every line", *, play: Any = talk) -> Environment:
    """Counts who says hello."""
    env = rayrl.env(tasks=[Task()], rewards={"win": 1.0})(play)

    @env.check(name)
    async def check(new_agent: Callable[[], Agent], args: Mapping[str, Any]) -> dict[str, float]:
        agents = [new_agent(), new_agent()]
        said = [await agent("hi") for agent in agents]
        assert [agent.session for agent in agents] == [f"check-{name}-{k}/agent" for k in (0, 1)]
        MADE.extend(agents)
        return {"hellos": sum(text == "hello" for text in said)}

    return env


MADE: list[Agent] = []


@asynccontextmanager
async def greeter(component: str) -> AsyncIterator[Player]:
    yield ScriptedPlayer(lambda messages, rng: "hello")


def config(**evaluation: Any) -> Config:
    return from_dict({"eval": evaluation})


CELLS = {
    "random": {"random_min": 1.0, "random_max": 1.0, "max_turns": 8},
    "optimal": {"random_min": 0.0, "random_max": 0.0, "max_turns": 8},
}


def test_they_run_with_what_all_cells_agree_on() -> None:
    env = load_env("tictactoe").configure({"max_turns": 7, "random_min": 0.2})
    args = check_args(env, CELLS)
    assert args["max_turns"] == 8
    assert args["random_min"] == 0.2  # cells differ
    assert check_args(env, {})["max_turns"] == 7
    assert check_args(env, {"a": {"max_turns": 8}, "b": {}})["max_turns"] == 7


async def test_they_get_fresh_agents_that_are_closed_afterwards() -> None:
    MADE.clear()
    assert await run_checks(config(), {"": with_check()}, greeter) == {"every line": {"hellos": 2}}
    assert len(MADE) == 2
    assert all(agent.activity.closed for agent in MADE)


@pytest.mark.parametrize(
    ("env", "evaluation"),
    [
        (with_check(), {"exhaustive": False}),
        (with_check(), {"temperature": 0.5}),
        (with_check(play=duel), {}),
        (rayrl.env(tasks=[Task()], rewards={})(talk), {}),
    ],
)
async def test_what_is_not_checked(env: Environment, evaluation: dict[str, Any]) -> None:
    assert check_prefixes(config(**evaluation), {"": env}) == {}
    assert await run_checks(config(**evaluation), {"": env}, greeter) == {}


async def test_a_mixture_has_the_checks_of_each_environment() -> None:
    environments = {"a": with_check("x"), "b": with_check("y z")}
    mixed = from_dict({"env": {"mix": {name: {"name": "copyword"} for name in environments}}})
    assert check_prefixes(mixed, environments) == {"a/x": "eval/a/x/", "b/y z": "eval/b/y_z/"}
    found = await run_checks(mixed, environments, greeter)
    assert found == {"a/x": {"hellos": 2}, "b/y z": {"hellos": 2}}


async def test_one_that_fails_is_named() -> None:
    env = rayrl.env(tasks=[Task()], rewards={})(talk)

    @env.check("broken")
    async def check(new_agent: Callable[[], Agent], args: Mapping[str, Any]) -> dict[str, float]:
        raise KeyError("board")

    with pytest.raises(EnvError, match=r"check 'broken' of environment 'talk' raised .*board"):
        await run_checks(config(), {"": env}, greeter)


class Learner:
    """Exports nothing."""

    async def export(self, folder: str | Path) -> None:
        raise AssertionError


@pytest.fixture
def env(monkeypatch: pytest.MonkeyPatch) -> Environment:
    """Its check finds as many as the version of the weights."""
    made = with_check()
    versions: list[int] = []

    @asynccontextmanager
    async def player(job: object, component: str, *, min_version: int) -> AsyncIterator[Player]:
        versions.append(min_version)
        count = iter(range(9))
        yield ScriptedPlayer(lambda messages, rng: "hello" if next(count) < min_version else "no")

    monkeypatch.setattr(evaluations, "greedy_player", player)
    monkeypatch.setattr(evaluations, "make_environment", lambda config, component: made)
    monkeypatch.setattr(Replicas, "job", versions, raising=False)
    return made


async def test_evaluations_of_a_run_have_them_and_may_end_it(
    env: Environment, tmp_path: Path
) -> None:
    settings = from_dict(
        {
            "run": {"dir": str(tmp_path)},
            "env": {"name": "copyword"},
            "eval": {"episodes": 2, "every": 1},
            "sft": {"steps": 7, "stop_when": "eval/every_line/hellos >= 2"},
        }
    )
    check_metrics(settings, {"": env}, "sft")
    notes: list[str] = []
    with RunDir(tmp_path, settings, verb="sft") as folder:
        replicas = Replicas()
        found = Evaluator(settings, folder, replicas, Learner(), "sft", notes.append)
        for version in range(3):
            metrics = await found.evaluate(version, held=version)
            assert metrics["eval/every_line/hellos"] == version
        assert "eval/every_line/hellos 2" in notes[-1]
        assert replicas.job == [0, 1, 2]  # type: ignore[attr-defined]
        # read again from the folder, and not run again
        again = Evaluator(settings, folder, replicas, Learner(), "sft", notes.append)
        for one in (found, again):
            assert [one.is_over(version) for version in range(3)] == [False, False, True]
        assert await again.evaluate(2, held=2) == metrics
        assert replicas.job == [0, 1, 2]  # type: ignore[attr-defined]


async def test_a_count_that_a_check_does_not_return(env: Environment, tmp_path: Path) -> None:
    settings = from_dict(
        {
            "run": {"dir": str(tmp_path)},
            "eval": {"episodes": 2, "every": 1},
            "sft": {"stop_when": "eval/every_line/hello > 0"},
        }
    )
    check_metrics(settings, {"": env}, "sft")
    with RunDir(tmp_path, settings, verb="sft") as folder:
        found = Evaluator(settings, folder, Replicas(), Learner(), "sft", lambda note: None)
        with pytest.raises(ConfigError, match=r"Did you mean 'eval/every_line/hellos'\?"):
            await found.evaluate(1, held=1)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ({"train": {"stop_when": "eval/unbeatabel/losing < 1"}}, r"Did you mean 'eval/unbeatable/"),
        ({"train": {"stop_when": "eval/unbeatable/losing not improved for 2"}}, "is no metric"),
        ({"run": {"keep_best": "eval/unbeatable/losing"}}, r"run\.keep_best: .* is no metric"),
        ({"eval": {"cells": {"unbeatable": {}, "b": {}}}}, r"eval\.cells\.unbeatable: .* check"),
        (
            {"train": {"stop_when": "eval/unbeatable/losing < 1"}, "eval": {"temperature": 1.0}},
            "is no metric",
        ),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(data: dict[str, Any], why: str) -> None:
    base = {"env": {"name": "tictactoe"}, "eval": {"every": 1}}
    whole = from_dict({key: {**base.get(key, {}), **data.get(key, {})} for key in {**base, **data}})
    with pytest.raises(ConfigError, match=why):
        check_metrics(whole, {"": load_env("tictactoe")}, "train")
