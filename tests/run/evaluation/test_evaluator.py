"""When evaluations are due, which model is kept, and when a run ends early."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rayrl.config import Config, from_dict, validate
from rayrl.environment.registry import load_env
from rayrl.errors import ConfigError
from rayrl.run.evaluation.evaluator import Evaluator, check_metrics
from rayrl.run.folder import RunDir
from tests.replicas import Replicas

BETTER = {0: 0.0, 1: 0.1, 2: 0.05, 3: 0.1, 4: 0.2}  # than at the start, by version, in every task


class Learner:
    """Exports a file that says which version it is."""

    version = 0

    async def export(self, folder: str | Path) -> None:
        (Path(folder) / "config.json").write_text(str(self.version))


def settings(folder: Path, stop_when: str = "", **evaluation: object) -> Config:
    return from_dict(
        {
            "run": {"dir": str(folder), "keep_best": "eval/win"},
            "env": {"name": "copyword"},
            "eval": {"episodes": 4, "every": 1, **evaluation},
            "sft": {"steps": 7, "stop_when": stop_when},
        }
    )


def evaluator(config: Config, folder: RunDir, learner: Learner, notes: list[str]) -> Evaluator:
    replicas = Replicas(score=lambda version, k: 0.2 * k + BETTER[version])
    return Evaluator(config, folder, replicas, learner, "sft", notes.append)


@pytest.mark.parametrize(
    ("every", "at_start", "due"),
    [(3, True, [0, 3, 6, 7]), (3, False, [3, 6, 7]), (7, True, [0, 7]), (0, True, [])],
)
def test_when_they_are_due(tmp_path: Path, every: int, at_start: bool, due: list[int]) -> None:
    config = settings(tmp_path, every=every, at_start=at_start)
    with RunDir(tmp_path, config, verb="sft") as folder:
        found = evaluator(config, folder, Learner(), [])
        assert [version for version in range(8) if found.is_due(version)] == due


async def test_the_best_model_is_kept_and_no_progress_ends_the_run(tmp_path: Path) -> None:
    """Versions 1 and 4 are better than all before them; 3 is no better than 1."""
    config, notes = settings(tmp_path, "eval/win not improved for 2"), list[str]()
    kept: list[str] = []
    with RunDir(tmp_path, config, verb="sft") as folder:
        learner = Learner()
        found = evaluator(config, folder, learner, notes)
        assert found.start_metrics() == {}
        for version in BETTER:
            learner.version = version
            metrics = await found.evaluate(version, held=version)
            assert metrics["eval/win"] == pytest.approx(0.3 + BETTER[version])
            kept.append((tmp_path / "model_best" / "config.json").read_text())
        assert kept == ["0", "1", "1", "1", "4"]
        assert found.start_metrics()["eval_start/win"] == pytest.approx(0.3)
        # it says of a version what it said before there were later ones, also after a restart
        for one in (found, evaluator(config, folder, learner, notes)):
            assert [one.is_over(version) for version in range(6)] == [False] * 3 + [
                True,
                False,
                False,
            ]
            best = {"model": "model_best", "version": 1, "eval/win": pytest.approx(0.4)}
            assert one.result(3) == {"best": best}
            assert one.result(4)["best"]["version"] == 4
            assert [*one.by_step(2)] == [-1, 0, 1]
        assert notes[-1] == "ended by sft.stop_when=eval/win not improved for 2"


async def test_a_bound_ends_the_run(tmp_path: Path) -> None:
    config = settings(tmp_path, "eval/win >= 0.34 for 2")
    with RunDir(tmp_path, config, verb="sft") as folder:
        found = evaluator(config, folder, Learner(), [])
        for version in BETTER:
            await found.evaluate(version, held=version)
        assert [found.is_over(version) for version in BETTER] == [False] * 2 + [True] * 3


async def test_weights_that_replicas_no_longer_hold(tmp_path: Path) -> None:
    config, notes = settings(tmp_path), list[str]()
    with RunDir(tmp_path, config, verb="sft") as folder:
        found = evaluator(config, folder, Learner(), notes)
        await found.evaluate(2, held=2)
        assert await found.evaluate(1, held=2) == {}
        assert notes[-1] == "version 1 is not evaluated: replicas have newer ones"
        assert await found.evaluate(2, held=3), "it was played before"


async def test_a_metric_of_a_setting_must_be_measured(tmp_path: Path) -> None:
    config = settings(tmp_path, "eval/wins > 1", samples=2, temperature=1.0)
    with RunDir(tmp_path, config, verb="sft") as folder:
        found = evaluator(config, folder, Learner(), [])
        why = r"sft\.stop_when: 'eval/wins' .* Did you mean 'eval/win'\?.*reward"
        with pytest.raises(ConfigError, match=why):
            await found.evaluate(0, held=0)
    data = json.loads((tmp_path / "evaluations" / "version_000000.json").read_text())
    assert data["cells"]["tasks"]["tasks"] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ({"eval": {"every": 5, "episodes": 10, "samples": 4}}, r"set eval\.episodes=8"),
        ({"eval": {"every": 5, "samples": 4}}, r"eval\.samples=4: .* set eval\.temperature"),
        ({"run": {"keep_best": "eval/win"}}, r"run\.keep_best=eval/win: .*set eval\.every"),
        ({"train": {"stop_when": "eval/win > 1"}}, r"train\.stop_when=.*: .*set eval\.every"),
        ({"eval": {"every": 5}, "run": {"keep_best": "win"}}, r"Did you mean 'eval/win'"),
        ({"eval": {"every": 5}, "train": {"stop_when": "eval/win => 1"}}, r"Did you mean '>='"),
        ({"sft": {"stop_when": "eval/win > 1"}}, r"sft\.stop_when=.*: .*set eval\.every"),
        ({"eval": {"every": 5}, "env": {"name": ""}}, r"env\.name=: no environment"),
        ({"eval": {"every": 5}, "learner": {"dtype": "bfloat16", "kind": "reference"}}, "in fp32"),
    ],
)
def test_settings_that_do_not_fit(data: dict[str, dict[str, object]], why: str) -> None:
    base: dict[str, dict[str, object]] = {"env": {"name": "copyword"}, "sft": {"data": "d.jsonl"}}
    whole = from_dict({key: {**base.get(key, {}), **data.get(key, {})} for key in {**base, **data}})
    verbs = ["sft"] if "sft" in data else ["train"] if "train" in data else ["train", "sft"]
    for verb in verbs:
        with pytest.raises(ConfigError, match=why):
            validate(whole, verb)


@pytest.mark.parametrize(
    ("keep_best", "stop_when", "why"),
    [
        ("eval/win", "eval/win/pass@2 > 0.9", ""),
        ("eval/reward", "eval/reward/gain_low > 0", ""),
        ("eval/wins", "", r"run\.keep_best: 'eval/wins' .* Did you mean 'eval/win'\?.*eval/reward"),
        ("eval/win/gain", "", r"run\.keep_best: 'eval/win/gain'"),
        ("", "eval/win not improved for 3", ""),
        ("", "eval/win/low not improved for 3", r"train\.stop_when: 'eval/win/low' is no metric"),
        ("", "eval/win/pass@3 > 0.9", r"train\.stop_when: 'eval/win/pass@3' .*'eval/win/pass@"),
    ],
)
def test_a_metric_that_cannot_be_is_said_before_anything_is_written(
    keep_best: str, stop_when: str, why: str
) -> None:
    data = {"run": {"keep_best": keep_best}, "train": {"stop_when": stop_when}}
    config = from_dict({"env": {"name": "tictactoe"}, "eval": {"samples": 4, "every": 1}, **data})
    if not why:
        check_metrics(config, {"": load_env("tictactoe")}, "train")
        return
    with pytest.raises(ConfigError, match=why):
        check_metrics(config, {"": load_env("tictactoe")}, "train")


@pytest.mark.parametrize("verb", ["train", "sft"])
def test_metrics_of_a_mixture_name_its_components(verb: str) -> None:
    data = {"words": {"name": "copyword"}, "games": {"name": "tictactoe", "cells": {"all": {}}}}
    environments = {name: load_env(str(one["name"])) for name, one in data.items()}

    def check(metric: str) -> None:
        config = from_dict({"env": {"mix": data}, verb: {"stop_when": f"{metric} > 0"}})
        check_metrics(config, environments, verb)

    check("eval/words/copied")
    check("eval/games/all/win/low")
    with pytest.raises(ConfigError, match=rf"{verb}\.stop_when: 'eval/words/win' is no metric"):
        check("eval/words/win")
