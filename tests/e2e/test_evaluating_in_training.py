"""Evaluations in a training run: paired, with the best model, and resumed episode by episode."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from rayrl.run.files import read_jsonl
from tests.runs import ENVS, Going, command, figures, train, weights

pytestmark = pytest.mark.slow

EPISODES = 8
SETTINGS = [
    f"env.name={ENVS}:judged",
    "train.steps=4",
    "train.groups=2",
    "sampling.max_tokens=16",
    "eval.every=1",
    f"eval.episodes={EPISODES}",
    "eval.samples=2",
    "eval.temperature=1.0",
    "run.keep_best=eval/vowels",
]


def evaluated(folder: Path, version: int) -> list[dict[str, Any]]:
    """Episodes of an evaluation without what differs between equal ones."""
    chance = ("began", "seconds", "replayed", "checksum")
    file = folder / "evaluations" / f"version_{version:06d}.jsonl"
    rows = read_jsonl(file) if file.is_file() else []
    return [{k: v for k, v in row.items() if k not in chance} for row in rows]


def test_killed_in_the_middle_of_an_evaluation_it_ends_as_if_unbroken(
    tiny: Path, tmp_path: Path
) -> None:
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    train(tiny, calm, *SETTINGS)
    half = 2 * EPISODES + EPISODES // 2  # of the evaluation of version 2, after 0 and 1
    env = {**os.environ, "JUDGED_OPEN": str(half)}
    with Going(command(tiny, killed, *SETTINGS), env) as run:
        run.until(lambda: len(evaluated(killed, 2)) == EPISODES // 2)
    before = evaluated(killed, 2)
    assert not (killed / "evaluations" / "version_000002.json").exists()
    with Going(command(tiny, killed, *SETTINGS)) as run:
        assert run.wait() == 0, run.said
    assert (
        f"{EPISODES // 2} of {EPISODES} episodes of the evaluation were played before" in run.said
    )

    assert figures(killed) == figures(calm)
    assert weights(killed) == weights(calm)
    assert all(row in evaluated(killed, 2) for row in before), "they were not played again"
    for version in range(5):
        assert evaluated(killed, version) == evaluated(calm, version)
    best = [json.loads((run / "result.json").read_text())["best"] for run in (calm, killed)]
    assert best[0] == best[1]
    models = [(run / "model_best" / "model.safetensors").read_bytes() for run in (calm, killed)]
    assert models[0] == models[1]

    episodes = [evaluated(calm, version) for version in range(5)]
    tasks = [[episode["task"] for episode in of_version] for of_version in episodes]
    assert all(of_version == tasks[0] for of_version in tasks), "the same tasks each time"
    assert all(task["k"] >= 8 for task in tasks[0]), "which training does not see"
    rows = figures(calm)
    assert [row["eval/version"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        means = [
            sum(episode["scores"]["agent"]["vowels"] for episode in of_version) / EPISODES
            for of_version in (episodes[row["step"] + 1], episodes[0])
        ]
        assert row["eval/vowels"] == row["eval/reward"] == pytest.approx(means[0])
        assert row["eval/vowels/gain"] == pytest.approx(means[0] - means[1])
        assert row["eval/vowels/low"] < means[0] < row["eval/vowels/high"]
        assert row["eval/any"] <= row["eval/any/pass@2"] <= 1
    assert rows[0]["eval_start/version"] == 0
    assert "eval_start/version" not in rows[1]


def test_it_ends_when_an_evaluation_says_so(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = [*SETTINGS, "eval.every=2", "train.steps=9", "train.stop_when='eval/any>=0 for 3'"]
    train(tiny, folder, *settings)
    rows = figures(folder)
    assert len(rows) == 4, "the evaluations of versions 0, 2 and 4"
    assert [row["step"] for row in rows if "eval/any" in row] == [1, 3]
    result = json.loads((folder / "result.json").read_text())
    assert (result["steps"], result["stopped"]) == (4, True)
