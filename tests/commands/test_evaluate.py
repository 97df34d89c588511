from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import rayrl
from rayrl import Agent, Scores, Task, load_env
from rayrl.cli import compose
from rayrl.cluster.rollouts import CollectedGroups
from rayrl.commands import evaluate
from rayrl.commands.evaluate import cell_of
from rayrl.config import Config, from_dict
from rayrl.errors import ConfigError, DataError, RunFailed
from rayrl.report.statistics import Share, Split
from rayrl.report.table import Result
from rayrl.rollout.episode_io import read_episodes
from rayrl.run.folder import RunDir
from rayrl.run.sampling.task_sampler import UniformSampler
from rayrl.run.stage import evaluation_plans, row_name, seats_of
from rayrl.types import Episode, Failure, Group, Usage
from tests.act import collect, says
from tests.documents import ROOT
from tests.here import Here, killing
from tests.rollout.test_endpoint import said, serving

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
    sampler = UniformSampler(env, cfg)
    trained = {sampler.plan(index).task.seed for index in range(20 * cfg.train.groups)}
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
    assert seats_of(env, cfg, "own.py:best") == {"x": "own.py:best", "o": "player:optimal"}
    assert seats_of(env, cfg, "endpoint")["x"] == "endpoint"


@pytest.mark.parametrize(
    ("path", "player", "row"),
    [
        ("embedded", "model", "base"),
        ("runs/t/rl1/model", "model", "rl1"),
        ("/models/llama", "model", "llama"),
        ("embedded", "teacher", "teacher"),
        ("embedded", "endpoint", "gpt"),
        ("embedded", "/mine/rivals.py:best", "rivals:best"),
        ("embedded", "object:best", "best"),
    ],
)
def test_rows_are_called_after_who_plays(path: str, player: str, row: str) -> None:
    cfg = from_dict({"model": {"path": path}, "endpoint": {"model": "gpt"}})
    assert row_name(cfg, player) == row


# --- figures -------------------------------------------------------------------------------------


async def test_held_out_rows_played_four_times_are_worth_their_number() -> None:
    @rayrl.env(tasks=[Task(seed=k) for k in range(100)], rewards={"right": 1.0})
    async def rows(task: Task, agent: Agent) -> Scores:
        await agent("?")
        return {"right": float(task.seed % 10 > 0)}

    cells = {}
    for episodes in (100, 400):
        of_rows = from_dict({"env": {"name": "rows"}, "eval": {"episodes": episodes}})
        plans = evaluation_plans(rows, of_rows, "tasks")
        groups = await collect(rows, plans, says("yes"), concurrency=8)
        cells[episodes] = cell_of(rows, {}, CollectedGroups(tuple(groups)))
    once, repeated = cells[100], cells[400]
    assert (once.tasks, once.size) == (0, "100 episodes")
    assert (repeated.tasks, repeated.size) == (100, "400 episodes of 100 tasks")
    assert once.statistics["right"].text() == repeated.statistics["right"].text() == "0.900"
    assert once.statistics["right"].interval_text() == "0.826–0.945"
    assert repeated.statistics["right"].interval_text() == "0.825–0.945"


def test_failed_episodes_are_counted_and_not_measured() -> None:
    def one(win: float, seed: int) -> Episode:
        scores = {"agent": {"win": win, "format": 1.0, "invalid": 0.0}}
        return Episode("e", "t", Task(seed=seed), 0, (), scores, {"agent": win})

    failed = Episode("f", "t", Task(), 0, (), failure=Failure("env", "broke"))
    groups = tuple(Group(str(k), Task(), (one(w, k),)) for k, w in enumerate((1.0, 0.5, 0.5)))
    played = CollectedGroups(groups, dropped=(Group("f", Task(), (failed,)),))
    cell = cell_of(load_env("tictactoe"), {"a": 1}, played)
    assert (cell.episodes, cell.failed, cell.tasks) == (3, 1, 0)
    assert cell.statistics["win/draw/loss"] == Split({"win": 1, "draw": 2, "loss": 0}, 3)
    assert cell.statistics["invalid %"] == Share(0, 3)


# --- the program ---------------------------------------------------------------------------------


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[Here]:
    """Env workers in this process; keeps them."""
    opened: list[Here] = []

    @asynccontextmanager
    async def open_here(cfg, *, seats, temperature):  # type: ignore[no-untyped-def]
        async with killing(0)(cfg, seats=seats) as here:  # type: ignore[attr-defined]
            opened.append(here)
            yield here

    monkeypatch.setattr(evaluate, "open_rollouts", open_here)

    @asynccontextmanager
    async def player_here(job, component):  # type: ignore[no-untyped-def]
        yield job[component]["agent"]

    monkeypatch.setattr(evaluate, "greedy_player", player_here)
    return opened


def test_a_run_writes_the_table_its_settings_and_the_episodes(
    tmp_path: Path, in_process: list[Here], capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = config(tmp_path / "run", player="optimal")
    evaluate.run(cfg)
    result = Result.load(tmp_path / "run" / "eval.json")
    here = in_process[0]
    assert here.players[""]["agent"].function == here.envs[""].players["optimal"]
    assert result.name == "optimal"
    assert list(result.cells) == ["random", "optimal"]
    counts = result.cells["optimal"].statistics["win/draw/loss"]
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


async def test_a_greedy_model_is_checked_to_the_end(tmp_path: Path, in_process: list[Here]) -> None:
    cfg = config(tmp_path, episodes=2)
    with RunDir(tmp_path, cfg) as folder:
        result = await evaluate.play_cells(cfg, folder)
    assert result.name == "base"
    assert result.checks["unbeatable"]["losing"] == 0
    assert result.checks["unbeatable"]["lines"] > 100
    for skipped in ({"exhaustive": False}, {"temperature": 0.5}):
        assert (await evaluate.play_cells(config(tmp_path, episodes=2, **skipped))).checks == {}


async def test_a_mixture_plays_the_cells_of_each_environment(
    tmp_path: Path, in_process: list[Here]
) -> None:
    words = {"name": "copyword", "seats": {"agent": "player:perfect"}}
    easy = {"easy": {"random_min": 1.0}, "hard": {"random_max": 0.0}}
    games = {"name": "tictactoe", "rewards": {"win": 0.5}, "cells": easy}
    cfg = from_dict(
        {
            "run": {"dir": str(tmp_path)},
            "env": {"mix": {"words": words, "games": games}},
            "eval": {"episodes": 6},
        }
    )
    with RunDir(tmp_path, cfg) as folder:
        result = await evaluate.play_cells(cfg, folder)
    assert [*result.cells] == ["words", "games/easy", "games/hard"]
    assert [cell.args for cell in result.cells.values()] == [{}, *easy.values()]
    assert result.cells["words"].statistics["copied"].value == 1
    assert [*result.checks] == ["games/unbeatable"]
    assert result.settings["env"] == "words + games"
    names = [{episode.env for episode in of_cell} for of_cell in episodes_in(tmp_path)]
    assert names == [{"words"}, {"games"}, {"games"}]
    (won, *_) = [e for e in episodes_in(tmp_path)[1] if e.scores["agent"]["win"] == 1]
    scores = won.scores["agent"]
    assert won.rewards["agent"] == 0.5 + 0.2 * scores["format"] + scores["invalid"]


# --- what is stopped goes on ----------------------------------------------------------------------


def episodes_in(folder: Path) -> list[list[Any]]:
    files = sorted((folder / "episodes").glob("*.jsonl"))
    return [list(read_episodes(file)) for file in files]


KILLED = """
import sys
from rayrl.commands import evaluate
from rayrl.cli import compose
from tests.here import killing
evaluate.open_rollouts = killing(40)
evaluate.run(compose(sys.argv[1:]))
"""


def test_a_killed_evaluation_plays_only_what_is_missing(
    tmp_path: Path, in_process: list[Here]
) -> None:
    cells = "{a: {random_min: 1.0, random_max: 1.0}, b: {random_min: 0.0, random_max: 0.0}}"
    words = ["env=tictactoe", "eval.episodes=30", "eval.player=random", f"eval.cells={cells}"]
    words = [*words, f"run.dir={tmp_path / 'killed'}"]
    done = subprocess.run([sys.executable, "-c", KILLED, *words], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    first, second = sorted((tmp_path / "killed" / "episodes").glob("*"))
    assert len(first.read_text().splitlines()) == 30
    kept = second.read_text().splitlines()
    assert len(kept) == 10
    second.write_text("\n".join(kept)[:-50])  # a torn last line: the tenth episode is lost

    evaluate.run(compose(words))
    missing = {f"b-{k}" for k in range(30)} - {json.loads(line)["id"][:-2] for line in kept[:-1]}
    assert set(in_process[0].played) == missing
    assert len(missing) == 21
    evaluate.run(compose([*words[:-1], f"run.dir={tmp_path / 'whole'}"]))
    killed, whole = (Result.load(tmp_path / name / "eval.json") for name in ("killed", "whole"))
    assert killed == whole
    assert episodes_in(tmp_path / "killed") == episodes_in(tmp_path / "whole")
    assert (tmp_path / "killed" / "result.json").is_file()


def test_a_broken_line_that_is_not_the_last_is_named(
    tmp_path: Path, in_process: list[Here]
) -> None:
    cfg = config(tmp_path, player="optimal")
    (tmp_path / "episodes").mkdir()
    (tmp_path / "episodes" / "step_000000.jsonl").write_text('{"id": "random-\n{}\n')
    with pytest.raises(DataError, match=r"step_000000\.jsonl:1: not valid JSON"):
        evaluate.run(cfg)


def test_episodes_of_other_tasks_are_not_taken_for_ours(
    tmp_path: Path, in_process: list[Here]
) -> None:
    cfg = config(tmp_path, player="optimal")
    evaluate.run(cfg)
    (tmp_path / "result.json").unlink()
    file = tmp_path / "episodes" / "step_000000.jsonl"
    file.write_text(file.read_text().replace('"max_turns": 8', '"max_turns": 6', 1))
    with pytest.raises(RunFailed, match="random-0/0 is of another task"):
        evaluate.run(cfg)


ASKED = {"prompt_tokens": 50, "completion_tokens": 10}


async def test_a_servers_tokens_are_summed_and_a_budget_stops(
    tmp_path: Path, in_process: list[Here], capsys: pytest.CaptureFixture[str]
) -> None:
    """A one-turn game: an episode costs 60 tokens."""
    async with serving(said("<copy>no</copy>", usage=ASKED)) as server:
        asked = {"url": server.url, "model": "m", "price_in": 2.0, "price_out": 10.0}

        async def run(**more: object) -> Result:
            cfg = from_dict(
                {
                    "run": {"dir": str(tmp_path)},
                    "env": {"name": "copyword"},
                    "eval": {"episodes": 20, "player": "endpoint"},
                    "endpoint": {**asked, **more},
                }
            )
            await asyncio.to_thread(evaluate.run, cfg)
            return Result.load(tmp_path / "eval.json")

        with pytest.raises(RunFailed, match=r"max_tokens_total=300 is spent: \d+ tokens for"):
            await run(max_tokens_total=300)
        kept = len(in_process[0].played)
        # what ended together with the fifth counts, and what was live then is played to its end
        assert 5 <= kept <= 5 + 2 * 4
        with pytest.raises(RunFailed, match=f"{60 * kept} tokens for {kept} of 20 episodes"):
            await run(max_tokens_total=300)
        assert len(in_process) == 1  # nothing was started
        with pytest.raises(ConfigError, match=r"endpoint\.extra: {} there, {'seed': 1} now"):
            await run(extra={"seed": 1})
        result = await run()
        assert len(server.seen) == 20
        dearer = await run(price_out=100.0)  # finished: only the money is new
        assert len(server.seen) == 20
    assert result.usage == Usage(20, 0, 1000, 200)
    assert result.cost(result.usage) == pytest.approx((1000 * 2 + 200 * 10) / 1e6)
    assert dearer.cost(result.usage) == pytest.approx((1000 * 2 + 200 * 100) / 1e6)
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        "m, tasks: 20 server calls, 1,000 prompt tokens, 200 completion tokens, cost 0.004."
        in shown
    )


async def test_a_server_that_dies_leaves_what_was_played(
    tmp_path: Path, in_process: list[Here]
) -> None:
    from tests.rollout.test_endpoint import hang_up

    data = {"run": {"dir": str(tmp_path)}, "env": {"name": "copyword"}}
    data["eval"] = {"episodes": 12, "player": "endpoint"}  # type: ignore[dict-item]
    answers = [said("<copy>no</copy>") for _ in range(6)]
    async with serving(*answers, hang_up) as server:
        server.status = 0  # hangs up
        data["endpoint"] = {"url": server.url, "model": "m", "retries": 0}
        with pytest.raises(RunFailed, match=r"no longer responds.*same command resumes"):
            await asyncio.to_thread(evaluate.run, from_dict(data))
    (kept,) = episodes_in(tmp_path)
    assert 1 <= len(kept) <= 6
    async with serving(said("<copy>no</copy>")) as server:
        data["endpoint"] = {"url": server.url, "model": "m", "retries": 0}
        await asyncio.to_thread(evaluate.run, from_dict(data))
        assert len(server.seen) == 12 - len(kept)
    assert Result.load(tmp_path / "eval.json").cells["tasks"].episodes == 12


async def test_episodes_that_a_server_failed_are_played_again(
    tmp_path: Path, in_process: list[Here], capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"run": {"dir": str(tmp_path)}, "env": {"name": "copyword"}}
    data["eval"] = {"episodes": 8, "player": "endpoint"}  # type: ignore[dict-item]
    busy = (503, {}, "busy")
    async with serving(busy, busy, said("<copy>no</copy>")) as server:  # alive, but busy
        data["endpoint"] = {"url": server.url, "model": "m", "retries": 0}
        await asyncio.to_thread(evaluate.run, from_dict(data))
        assert "2 episodes are missing" in capsys.readouterr().out
        assert Result.load(tmp_path / "eval.json").cells["tasks"].failed == 2
        await asyncio.to_thread(evaluate.run, from_dict(data))
        assert len(server.seen) == 8 + 2
    cell = Result.load(tmp_path / "eval.json").cells["tasks"]
    assert (cell.episodes, cell.failed, cell.usage) == (8, 0, Usage(10 - 2, 8))
    assert (tmp_path / "result.json").is_file()


async def test_a_server_plays_one_seat_of_two(tmp_path: Path, in_process: list[Here]) -> None:
    move = "<think></think><move>4</move>"
    async with serving(said(move, usage=ASKED)) as server:
        cfg = from_dict(
            {
                "run": {"dir": str(tmp_path)},
                "env": {"name": "tictactoe_versus", "seats": {"o": "endpoint"}},
                "eval": {"episodes": 4, "player": "optimal"},
                "endpoint": {"url": server.url, "model": "m"},
            }
        )
        await asyncio.to_thread(evaluate.run, cfg)
    ((first, *_),) = episodes_in(tmp_path)
    assert {turn.seat: turn.usage is not None for turn in first.turns} == {"x": False, "o": True}
    usage = Result.load(tmp_path / "eval.json").usage
    assert usage is not None
    assert usage.calls == len(server.seen)


FILTERED = (400, {}, {"error": {"code": "content_filter", "message": "hate"}})


async def test_what_a_server_refuses_counts_and_is_not_asked_again(
    tmp_path: Path, in_process: list[Here], capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"run": {"dir": str(tmp_path)}, "env": {"name": "copyword"}}
    data["eval"] = {"episodes": 8, "player": "endpoint"}  # type: ignore[dict-item]
    async with serving(FILTERED, (503, {}, "busy"), FILTERED, said("<copy>no</copy>")) as server:
        data["endpoint"] = {"url": server.url, "model": "m", "retries": 0}
        await asyncio.to_thread(evaluate.run, from_dict(data))
        shown = " ".join(capsys.readouterr().out.split())
        assert "1 episodes are missing" in shown
        assert "3 of 8 episodes failed and are not counted, 2 of them refused" in shown
        await asyncio.to_thread(evaluate.run, from_dict(data))
        assert len(server.seen) == 8 + 1
    cell = Result.load(tmp_path / "eval.json").cells["tasks"]
    assert (cell.episodes, cell.failed, cell.unplayed, cell.refused) == (6, 2, 0, 2)
    assert (tmp_path / "result.json").is_file()
    (episodes,) = episodes_in(tmp_path)
    assert [e.failure.kind for e in episodes if e.failure] == ["refused", "refused"]


async def test_a_cell_of_which_all_is_refused_is_a_result(
    tmp_path: Path, in_process: list[Here]
) -> None:
    data = {"run": {"dir": str(tmp_path)}, "env": {"name": "copyword"}}
    data["eval"] = {"episodes": 3, "player": "endpoint"}  # type: ignore[dict-item]
    async with serving(FILTERED) as server:
        data["endpoint"] = {"url": server.url, "model": "m", "retries": 0}
        await asyncio.to_thread(evaluate.run, from_dict(data))
    cell = Result.load(tmp_path / "eval.json").cells["tasks"]
    assert (cell.episodes, cell.failed, cell.refused, cell.statistics) == (0, 3, 3, {})
    assert (tmp_path / "result.json").is_file()
