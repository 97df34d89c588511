from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import rayrl
from rayrl import Agent, Scores, Task, evaluate, load_env
from rayrl.cluster.rollouts import Collection
from rayrl.config import Config, from_dict
from rayrl.evaluate import cell_of, check_args, evaluation_plans, run_checks
from rayrl.figures import Share, Split
from rayrl.players import ScriptedPlayer
from rayrl.results import Result
from rayrl.rollout import play_groups
from rayrl.rundir import RunDir
from rayrl.stage import row_name, seats_of
from rayrl.train import plans as training_plans
from rayrl.types import Episode, Failure, Group

CELLS = {
    "random": {"random_min": 1.0, "random_max": 1.0, "max_turns": 8},
    "optimal": {"random_min": 0.0, "random_max": 0.0, "max_turns": 8},
}


def config(folder: Path | str = "unused", **of_eval: object) -> Config:
    return from_dict(
        {
            "run": {"dir": str(folder)},
            "env": {"name": "tictactoe", "args": {"max_turns": 7}},
            "eval": {"episodes": 30, "cells": CELLS, **of_eval},
        }
    )


# --- what is played ------------------------------------------------------------------------------


def test_every_model_meets_the_same_tasks_and_no_training_task() -> None:
    env = load_env("tictactoe").configure(CELLS["random"])
    cfg = config()
    plans = evaluation_plans(env, cfg, "random")
    other = from_dict({**as_dict(cfg), "model": {"path": "elsewhere"}, "run": {"name": "b"}})
    assert plans == evaluation_plans(env, other, "random")
    assert len(plans) == 30
    assert len({plan.id for plan in plans}) == 30
    trained = {plan.task.seed for step in range(20) for plan in training_plans(cfg, step)}
    assert trained.isdisjoint(plan.task.seed for plan in plans)
    optimal = evaluation_plans(env, cfg, "optimal")
    assert {p.task.seed for p in plans}.isdisjoint(p.task.seed for p in optimal)


def as_dict(cfg: Config) -> dict[str, Any]:
    from rayrl.config import to_dict

    return to_dict(cfg)


def test_the_player_takes_the_seats_of_the_policy() -> None:
    env = load_env("tictactoe_versus")
    cfg = from_dict({"env": {"name": env.name, "seats": {"o": "player:optimal"}}})
    assert seats_of(env, cfg, "model") == {"x": "policy", "o": "player:optimal"}
    assert seats_of(env, cfg, "teacher") == {"x": "player:teacher", "o": "player:optimal"}
    assert seats_of(env, cfg, "endpoint")["x"] == "endpoint"


@pytest.mark.parametrize(
    ("path", "player", "row"),
    [
        ("embedded", "model", "base"),
        ("runs/t/rl1/model", "model", "rl1"),
        ("/models/llama", "model", "llama"),
        ("embedded", "teacher", "teacher"),
        ("embedded", "endpoint", "gpt"),
    ],
)
def test_rows_are_called_after_who_plays(path: str, player: str, row: str) -> None:
    cfg = from_dict({"model": {"path": path}, "endpoint": {"model": "gpt"}})
    assert row_name(cfg, player) == row


# --- figures -------------------------------------------------------------------------------------


def test_failed_episodes_are_counted_and_not_measured() -> None:
    def one(win: float) -> Episode:
        scores = {"agent": {"win": win, "format": 1.0, "invalid": 0.0}}
        return Episode("e", "t", Task(), 0, (), scores, {"agent": win})

    failed = Episode("f", "t", Task(), 0, (), failure=Failure("env", "broke"))
    groups = tuple(Group(str(w), Task(), (one(w),)) for w in (1.0, 0.5, 0.5))
    played = Collection(groups, dropped=(Group("f", Task(), (failed,)),))
    cell = cell_of(load_env("tictactoe"), {"a": 1}, played)
    assert (cell.episodes, cell.failed) == (3, 1)
    assert cell.figures["win/draw/loss"] == Split({"win": 1, "draw": 2, "loss": 0}, 3)
    assert cell.figures["invalid %"] == Share(0, 3)


# --- exhaustive checks ---------------------------------------------------------------------------


def test_checks_run_with_what_all_cells_agree_on() -> None:
    env = load_env("tictactoe").configure({"max_turns": 7, "random_min": 0.2})
    args = check_args(env, CELLS)
    assert args["max_turns"] == 8
    assert args["random_min"] == 0.2  # cells differ
    assert check_args(env, {})["max_turns"] == 7
    assert check_args(env, {"a": {"max_turns": 8}, "b": {}})["max_turns"] == 7


async def talk(task: Task, agent: Agent) -> Scores:
    """Never played here."""
    return {"s": 1.0}


async def test_checks_get_fresh_agents_that_are_closed_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    env = rayrl.env(tasks=[Task()], rewards={"s": 1.0})(talk)
    made: list[Agent] = []

    @env.check("says hello")
    async def check(new_agent: Callable[[], Agent], args: Mapping[str, Any]) -> dict[str, float]:
        made.extend([new_agent(), new_agent()])
        said = [await agent("hi") for agent in made]
        return {"hellos": float(sum(text == "hello" for text in said))}

    player = ScriptedPlayer(lambda messages, rng: "hello")
    monkeypatch.setattr(evaluate, "players_here", lambda rollouts: {"agent": player})
    found = await run_checks(env, {}, rollouts=None)  # type: ignore[arg-type]
    assert found == {"says hello": {"hellos": 2.0}}
    assert [agent.episode for agent in made] == ["check-says hello-0", "check-says hello-1"]
    assert all(agent.closed for agent in made)


# --- the program ---------------------------------------------------------------------------------


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[Mapping[str, str]]:
    """Hosts in this process; models play like the optimal player. Keeps the seats asked for."""
    asked: list[Mapping[str, str]] = []

    class Here:
        def __init__(self, cfg: Config, seats: Mapping[str, str]) -> None:
            self.env = load_env(cfg.env.name)
            names = {s: who.partition(":")[2] or "optimal" for s, who in seats.items()}
            self.players = {s: ScriptedPlayer(self.env.players[n]) for s, n in names.items()}

        async def collect(self, plans, on_group, known):  # type: ignore[no-untyped-def]
            groups = dict(known)
            missing = [plan for plan in plans if plan.id not in known]
            async for group in play_groups(self.env, missing, self.players, concurrency=8):
                groups[group.id] = group
                on_group(group)
            return Collection(tuple(groups[plan.id] for plan in plans))

    @asynccontextmanager
    async def open_here(cfg, *, seats, sampling):  # type: ignore[no-untyped-def]
        asked.append(seats)
        yield Here(cfg, seats)

    monkeypatch.setattr(evaluate, "open_rollouts", open_here)
    monkeypatch.setattr(evaluate, "players_here", lambda rollouts: rollouts.players)
    return asked


def test_a_run_writes_the_table_its_settings_and_the_episodes(
    tmp_path: Path, in_process: list[Mapping[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = config(tmp_path / "run", player="optimal")
    evaluate.run(cfg)
    result = Result.load(tmp_path / "run" / "eval.json")
    assert in_process == [{"agent": "player:optimal"}]
    assert result.name == "optimal"
    assert list(result.cells) == ["random", "optimal"]
    counts = result.cells["optimal"].figures["win/draw/loss"]
    assert counts == Split({"win": 0, "draw": 30, "loss": 0}, 30)
    assert result.settings["seed"] == 0
    assert result.checks == {}  # only a greedy model can be checked to the end
    files = sorted((tmp_path / "run" / "episodes").glob("*.jsonl"))
    assert [len(file.read_text().splitlines()) for file in files] == [30, 30]
    first = json.loads(files[0].read_text().splitlines()[0])
    assert first["task"]["max_turns"] == 8
    assert "0/100/0" in capsys.readouterr().out

    evaluate.run(cfg)  # finished: printed again, not played again
    assert len(in_process) == 1
    assert "0/100/0" in capsys.readouterr().out


async def test_a_greedy_model_is_checked_to_the_end(
    tmp_path: Path, in_process: list[Mapping[str, str]]
) -> None:
    cfg = config(tmp_path, episodes=2)
    with RunDir(tmp_path, cfg) as folder:
        result = await evaluate.evaluate(cfg, folder)
    assert result.name == "base"
    assert result.checks["unbeatable"]["losing"] == 0
    assert result.checks["unbeatable"]["lines"] > 100
    for skipped in ({"exhaustive": False}, {"temperature": 0.5}):
        assert (await evaluate.evaluate(config(tmp_path, episodes=2, **skipped))).checks == {}
