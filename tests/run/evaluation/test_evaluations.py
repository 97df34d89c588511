from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from rayrl.config import Config, from_dict
from rayrl.errors import InfraError
from rayrl.run.evaluation.evaluations import (
    CellValues,
    Evaluations,
    VersionValues,
    best_evaluation,
    eval_metrics,
    gain,
    pass_at_k,
)
from rayrl.run.folder import RunDir
from rayrl.run.metrics import summary
from tests.replicas import Replicas

Values = Sequence[float | None]


def version(number: int, values: Values, tasks: Sequence[int] = (), name: str = "win") -> (
    VersionValues
):  # fmt: skip
    tasks = tasks or range(len(values))
    return VersionValues(number, {"tasks": CellValues(tasks, {name: values})})


@pytest.mark.parametrize(
    ("n", "correct", "k", "share"),
    [
        (4, 0, 2, 0.0),
        (4, 1, 1, 1 / 4),
        (4, 1, 2, 1 / 2),  # 3 of the 6 pairs have the correct one
        (4, 2, 2, 5 / 6),  # all but one pair
        (4, 2, 3, 1.0),  # 2 wrong ones cannot fill three
        (10, 3, 5, 1 - 21 / 252),  # C(7, 5) of C(10, 5)
        (4, 4, 4, 1.0),
    ],
)
def test_pass_at_k(n: int, correct: int, k: int, share: float) -> None:
    assert pass_at_k(n, correct, k) == pytest.approx(share)


@pytest.mark.parametrize(("n", "correct", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)])
def test_pass_at_k_of_what_there_is_not(n: int, correct: int, k: int) -> None:
    with pytest.raises(ValueError, match=r"pass@k needs"):
        pass_at_k(n, correct, k)


def test_samples_of_a_task_are_counted_together() -> None:
    # four samples each of three tasks: 0, 1 and 2 of them are right
    wins, tasks = [0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 1, 0], [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    found = eval_metrics(version(3, wins, tasks), samples=4)
    assert found["eval/win"] == 3 / 12
    assert found["eval/win/pass@2"] == pytest.approx((0 + 1 / 2 + 5 / 6) / 3)
    assert found["eval/win/pass@4"] == pytest.approx(2 / 3)
    assert "eval/win/pass@3" not in found
    assert (found["eval/version"], found["eval/failed"]) == (3, 0)


def test_a_score_that_is_no_event_has_no_pass_at_k() -> None:
    found = eval_metrics(version(1, [0.5, 1, 0, 1], [0, 0, 1, 1]), samples=2)
    assert [name for name in found if "pass" in name] == []


def test_the_difference_is_paired() -> None:
    """Differences 0.1, 0.2 and 0.3: mean 0.2, s = 0.1, t(2) = 4.30265, half width 0.24841.

    Unpaired, the tasks' own spread of 0 to 10 would hide it.
    """
    then, now = version(0, [0, 5, 10]), version(1, [0.1, 5.2, 10.3])
    found = gain(now, then, "eval/win")
    assert found == pytest.approx((0.2, 0.2 - 0.24841, 0.2 + 0.24841), abs=1e-5)
    metrics = eval_metrics(now, then)
    assert metrics["eval/win/gain"] == pytest.approx(0.2)
    assert metrics["eval/win/gain_low"] == pytest.approx(-0.04841, abs=1e-5)
    assert metrics["eval/win/high"] - metrics["eval/win/low"] > 20


def test_pairs_are_of_the_same_task_and_whole() -> None:
    """The second episode failed once, the third the other time: 1.0 and 3.0 are left."""
    found = gain(version(1, [2, None, 5, 7]), version(0, [1, 1, None, 4]), "eval/win")
    assert found is not None
    # s = √2, over √2 tasks: 1; t(1) = 12.7062
    assert found == pytest.approx((2.0, 2 - 12.7062, 2 + 12.7062), abs=1e-4)
    assert gain(version(1, [None, 1]), version(0, [1, None]), "eval/win") is None
    assert gain(version(1, [1.0]), version(0, [1.0], name="other"), "eval/win") is None


def test_samples_of_one_task_are_one_observation() -> None:
    """Differences 1, 1 of one task and 0, 0 of another: as the two means 1 and 0 would be."""
    then = version(0, [0, 0, 0, 0], [0, 0, 1, 1])
    found = gain(version(1, [1, 1, 0, 0], [0, 0, 1, 1]), then, "eval/win")
    alone = gain(version(1, [1, 0]), version(0, [0, 0]), "eval/win")
    assert found is not None
    assert alone is not None
    assert found == pytest.approx(alone)


def test_the_best_is_not_a_lucky_maximum() -> None:
    base = version(0, [0.0, 0.2, 0.4, 0.6])
    lucky = version(1, [0.9, 0.0, 0.4, 0.7])  # higher by 0.2, but by one task
    better = version(2, [0.11, 0.3, 0.5, 0.7])  # by 0.1 everywhere
    assert best_evaluation([base], "eval/win").version == 0
    assert best_evaluation([base, lucky], "eval/win").version == 0
    assert best_evaluation([base, lucky, better], "eval/win").version == 2
    assert best_evaluation([base, better, lucky], "eval/win").version == 2


def test_cells_and_names() -> None:
    cells = {
        "easy": CellValues([0, 1], {"reward": [1, 1], "score/reward": [0, 1]}),
        "hard": CellValues([0, 1], {"reward": [0, None]}),
    }
    metrics = eval_metrics(VersionValues(2, cells, failed=1))
    assert metrics["eval/easy/reward"] == 1
    assert metrics["eval/easy/score/reward"] == 0.5
    assert metrics["eval/hard/reward"] == 0
    assert "eval/hard/reward/low" not in metrics, "a single task has no interval"
    assert metrics["eval/failed"] == 1


def test_its_line() -> None:
    then, now = version(0, [0, 5, 10], name="reward"), version(1, [0.1, 5.2, 10.3], name="reward")
    line = summary(eval_metrics(now, then), {"eval/every_line/lost": 2.0})
    assert line.startswith("evaluation of version 1: eval/reward 5.200 (-7.")
    assert line.endswith(", gain +0.200 (-0.048 to 0.448); eval/every_line/lost 2")


# --- on the disk ----------------------------------------------------------------------------------


def settings(folder: Path) -> Config:
    data = {"episodes": 6, "samples": 2, "every": 1, "temperature": 0.5}
    return from_dict({"run": {"dir": str(folder)}, "env": {"name": "copyword"}, "eval": data})


async def test_an_evaluation_resumes_episode_by_episode(tmp_path: Path) -> None:
    config, notes = settings(tmp_path), list[str]()
    with RunDir(tmp_path, config, verb="train") as folder:
        found = Evaluations(config, folder, notes.append)
        cut = Replicas(stop_after=4)
        with pytest.raises(InfraError):
            await found.play(cut, 0)
        assert 0 not in found
        rest = Replicas()
        assert await Evaluations(config, folder, notes.append).play(rest, 0)
        assert notes == ["4 of 6 episodes of the evaluation were played before"]
        assert [plan.id for plan in cut.played + rest.played] == [
            f"eval-0-tasks-{k}" for k in range(6)
        ]
        assert all(plan.temperature == 0.5 for plan in rest.played)
        whole = Replicas(made_by=1)
        assert await found.play(whole, 1)
        ours = [(plan.task, plan.seed) for plan in cut.played + rest.played]
        assert [(plan.task, plan.seed) for plan in whole.played] == ours, "the same each time"
        tasks = [plan.task for plan in whole.played]
        assert tasks[::2] == tasks[1::2]
        assert len({plan.seed for plan in whole.played}) == 6

        again = Evaluations(config, folder, notes.append)
        assert [one.version for one in again.until(5)] == [0, 1]
        assert again.metrics(1)["eval/win/gain"] == 0
        again.forget_after(0)
        assert 1 not in again
        assert 1 not in Evaluations(config, folder, notes.append)
        assert 0 in again
        assert sorted(p.name for p in (tmp_path / "evaluations").iterdir()) == [
            "version_000000.json",
            "version_000000.jsonl",
        ]


async def test_figures_of_two_versions_are_left_out(tmp_path: Path) -> None:
    config, notes = settings(tmp_path), list[str]()
    with RunDir(tmp_path, config, verb="train") as folder:
        found = Evaluations(config, folder, notes.append)
        assert not await found.play(Replicas(made_by=3), 2)
        assert 2 not in found
        assert notes[-1].startswith("the evaluation of version 2 is left out")
        assert [*(tmp_path / "evaluations").iterdir()] == []
