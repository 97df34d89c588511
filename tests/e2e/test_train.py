"""Whole training runs on a local Ray: repeatable, resumable, and not put off by a dead replica."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.runs import ROOT, STEPS, command, episodes, figures, until, weights

pytestmark = pytest.mark.slow


def test_it_learns_and_says_so(tiny: Path, calm: Path) -> None:
    rows = figures(calm)
    assert [row["step"] for row in rows] == list(range(STEPS))
    assert all(row["grad_norm"] > 0 and row["entropy"] > 0 for row in rows)
    assert all(row["mismatch/mean"] < 1e-4 for row in rows), "engine and learner agree"
    assert weights(calm) != (tiny / "model.safetensors").read_bytes()
    assert not (calm.parent / ".ray").exists(), "later `ray start`s would ask for its token"


def test_stopped_by_an_alarm_then_paused_on_other_processes_it_ends_as_if_uninterrupted(
    tiny: Path, calm: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    floor = "alarms.entropy_floor"  # in nats that no policy has
    settings = [f"{floor}.threshold=1000", f"{floor}.patience=3", f"{floor}.action=stop"]
    stopped = subprocess.run(
        command(tiny, folder, *settings), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert stopped.returncode == 1, stopped.stderr
    assert f"stopped after step 3 by {floor}.action=stop" in stopped.stderr
    assert "lower learner.lr" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert (folder / "checkpoints" / "step_000003" / "run.json").is_file()
    settings = [f"{floor}.threshold=1000", f"{floor}.patience=2", f"{floor}.action=pause"]
    settings += ["cluster.env_workers=2", "cluster.replicas=2", "cluster.concurrency=5"]
    settings += ["cluster.colocate=true"]  # the engines sleep while the learner works
    with subprocess.Popen(
        command(tiny, folder, *settings), cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as process:
        until((folder / "PAUSED").is_file, process)
        assert len(figures(folder)) == 5
        (folder / "PAUSED").unlink()
        assert process.wait(600) == 0
        assert process.stderr is not None
        assert "resumed" in process.stderr.read()
    assert figures(folder) == figures(calm)
    assert episodes(folder) == episodes(calm)
    assert weights(folder) == weights(calm)
    lines = (folder / "alarms.jsonl").read_text().splitlines()
    assert [(row["step"], row["action"]) for row in map(json.loads, lines)] == [
        (2, "stop"),
        (4, "pause"),
    ]
    timeline = [json.loads(line) for line in (folder / "timeline.jsonl").read_text().splitlines()]
    assert [row["step"] for row in timeline] == list(range(STEPS))
    for row in timeline:
        assert {"collect", "update", "push"} <= {name for name, _, _ in row["stages"]}
        assert 0 < max(row["requests"]["mean"]) <= 16
        assert 0 < max(row["episodes"]["mean"]) <= 16
