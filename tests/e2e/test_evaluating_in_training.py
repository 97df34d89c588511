"""A data file to the checkpoint that a held-out metric has chosen, killed twice on the way."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from rayrl.run.files import read_jsonl
from tests.runs import ENVS, Going, command, episodes, figures, rows, train, weights

pytestmark = pytest.mark.slow

STEPS, GROUPS, SIZE, EPISODES = 4, 2, 16, 16  # one epoch of 8 rows


def settings(folder: Path) -> list[str]:
    """Of a run on two data files; they end it after the evaluations of versions 0, 2 and 4."""
    for name, numbers in (("train", range(8)), ("test", range(8, 12))):
        lines = [json.dumps({"k": k}) for k in numbers]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return [
        f"env.name={folder}/train.jsonl",
        f"env.args.eval_rows={folder}/test.jsonl",
        'env.args.prompt="the number is {k}"',
        f"env.args.reward=[{ENVS}:vowels,{ENVS}:has_vowel]",
        "env.rewards.has_vowel=0",
        "train.steps=9",
        f"train.groups={GROUPS}",
        f"train.group_size={SIZE}",
        "sampling.max_tokens=16",
        "learner.lr=0.1",
        "eval.every=2",
        f"eval.episodes={EPISODES}",
        "eval.samples=2",
        "eval.temperature=1.0",
        "run.keep_best=eval/vowels",
        "train.stop_when='eval/has_vowel >= 0 for 3'",
    ]


def evaluated(folder: Path, version: int) -> list[dict[str, Any]]:
    """Episodes of an evaluation without what differs between equal ones."""
    chance = ("began", "seconds", "replayed", "checksum")
    file = folder / "evaluations" / f"version_{version:06d}.jsonl"
    found = read_jsonl(file) if file.is_file() else []
    return [{k: v for k, v in row.items() if k not in chance} for row in found]


def test_killed_in_an_evaluation_and_in_a_step_it_ends_as_if_unbroken(
    tiny: Path, tmp_path: Path
) -> None:
    calm, killed, more = tmp_path / "calm", tmp_path / "killed", settings(tmp_path)
    train(tiny, calm, *more)

    half = EPISODES // 2  # of the evaluation of version 2, while step 2 waits to be played
    limits = {"EVAL_OPEN": str(EPISODES + half), "TRAIN_OPEN": str(2 * GROUPS * SIZE)}
    with Going(command(tiny, killed, *more), {**os.environ, **limits}) as run:
        run.until(lambda: len(evaluated(killed, 2)) == half)
    before = evaluated(killed, 2)
    assert not (killed / "evaluations" / "version_000002.json").exists()
    limits = {"TRAIN_OPEN": str(GROUPS * SIZE + GROUPS * SIZE // 2)}  # step 2, and half of step 3
    with Going(command(tiny, killed, *more), {**os.environ, **limits}) as run:
        run.until(lambda: rows(killed) == 3)
    assert f"{half} of {EPISODES} episodes of the evaluation were played before" in run.said
    with Going(command(tiny, killed, *more)) as run:
        assert run.wait() == 0, run.said

    assert figures(killed) == figures(calm)
    assert weights(killed) == weights(calm)
    assert episodes(killed) == episodes(calm)
    assert all(row in evaluated(killed, 2) for row in before), "they were not played again"
    for version in (0, 2, 4):
        assert evaluated(killed, version) == evaluated(calm, version)
    results = [json.loads((run / "result.json").read_text()) for run in (calm, killed)]
    assert results[0]["best"] == results[1]["best"]
    models = [(run / "model_best" / "model.safetensors").read_bytes() for run in (calm, killed)]
    assert models[0] == models[1]
    assert [(result["steps"], result["stopped"]) for result in results] == [(STEPS, True)] * 2
    check_epoch(calm)
    check_figures(calm)
    assert results[0]["best"]["version"] == 4


def check_epoch(folder: Path) -> None:
    """Training drew each of its rows once."""
    played = [*episodes(folder).values()]
    drawn = [{episode["task"]["columns"]["k"] for episode in step} for step in played]
    assert [len(one) for one in drawn] == [GROUPS] * STEPS
    assert set.union(*drawn) == set(range(8))


def check_figures(folder: Path) -> None:
    """What is logged of the evaluations follows from their episodes."""
    played = {version: evaluated(folder, version) for version in (0, 2, 4)}
    tasks = [[episode["task"] for episode in of_version] for of_version in played.values()]
    assert tasks[0] == tasks[1] == tasks[2], "the same tasks each time"
    assert {task["columns"]["k"] for task in tasks[0]} == {8, 9, 10, 11}
    lines = figures(folder)
    assert [row["step"] for row in lines if "eval/version" in row] == [1, 3]
    for row in (lines[1], lines[3]):
        assert row["eval/version"] == row["step"] + 1
        means = [
            sum(episode["scores"]["agent"]["vowels"] for episode in played[version]) / EPISODES
            for version in (row["step"] + 1, 0)
        ]
        assert row["eval/vowels"] == row["eval/reward"] == pytest.approx(means[0])
        assert row["eval/vowels/gain"] == pytest.approx(means[0] - means[1])
        assert row["eval/vowels/low"] < means[0] < row["eval/vowels/high"]
        assert row["eval/has_vowel"] <= row["eval/has_vowel/pass@2"] <= 1
    assert lines[0]["eval_start/version"] == 0
    assert "eval_start/version" not in lines[1]
