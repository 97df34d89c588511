"""Agent programs of other libraries are trained as they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import PROGRAMS, episodes, figures, train

pytestmark = pytest.mark.slow


def test_programs_of_four_libraries_and_a_team_train_with_exact_ids(
    tiny: Path, tmp_path: Path
) -> None:
    settings = [
        f"env.name={PROGRAMS}:asks",
        "train.steps=2",
        "train.groups=5",
        "train.group_size=2",
        "sampling.max_tokens=8",
        "engine.max_len=1024",
    ]
    train(tiny, tmp_path / "run", *settings)
    steps = figures(tmp_path / "run")
    assert len(steps) == 2
    for row in steps:
        assert row["episodes"] == 10
        assert row["failures/env"] == 0
        assert row["mismatch/max"] < 1e-4, "the learner sees what the engine sampled"
        assert row["grad_norm"] > 0
    played = [one for step in episodes(tmp_path / "run").values() for one in step]
    for episode in played:
        turns = episode["turns"]
        team = episode["task"]["file"] == "team"
        assert len({turn["conversation"] for turn in turns}) == (4 if team else 1)
        assert len(turns) == (7 if team else 1), "noise calls no tools"
