"""How a run reacts to alarms: logs, pauses or stops; and what it remembers when resumed."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rayrl.cluster.rollouts import CollectedGroups
from rayrl.config import Config, from_dict
from rayrl.errors import RunFailed
from rayrl.run import monitor
from rayrl.run.folder import RunDir
from rayrl.run.metrics import Clock
from rayrl.run.monitor import ALARMS, PAUSED, Monitor
from rayrl.types import Episode, Group, Task

FINE = {"mismatch/mean": 0.0, "entropy": 1.0, "reward": 0.5, "groups/zero_variance_share": 0.0}
EQUAL = {**FINE, "groups/zero_variance_share": 1.0}


def config(folder: Path, **alarms: Mapping[str, Any]) -> Config:
    return from_dict(
        {"run": {"dir": str(folder)}, "env": {"name": "tictactoe"}, "alarms": dict(alarms)}
    )


class Run:
    """A run with made-up metrics that uses a `Monitor` as the loop does."""

    def __init__(self, folder: RunDir, config: Config) -> None:
        self.folder, self.messages = folder, list[str]()
        self.monitor = Monitor(config, folder, self.messages.append)
        self.step = max((row["step"] for row in folder.metrics()), default=-1) + 1

    def finish(self, *rows: Mapping[str, float]) -> list[list[str]]:
        """Finish steps with these metrics; return the names of the alarms raised at each."""
        names = []
        for row in rows:
            clock = Clock()
            with clock("collect"):
                pass
            self.folder.log(self.step, row)
            raised = self.monitor.observe(self.step, row, clock, CollectedGroups((GROUP,)))
            names.append([alarm.rule.name for alarm in raised])
            if self.monitor.will_halt:
                with self.folder.checkpoint(self.step + 1) as path:
                    (path / "weights").write_text("w")
            self.step += 1
        return names


GROUP = Group("0-0", Task(), (Episode("0-0/0", "e", Task(), 0, (), began=50.0, seconds=2.0),))


def lines(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text().splitlines()]


async def test_an_alarm_is_raised_once_until_it_was_within_bounds(tmp_path: Path) -> None:
    cfg = config(tmp_path)  # zero_variance_groups: three steps in a row
    with RunDir(tmp_path, cfg) as folder:
        run = Run(folder, cfg)
        raised = ["zero_variance_groups"]
        assert run.finish(EQUAL, EQUAL, FINE, EQUAL, EQUAL, EQUAL, EQUAL) == [
            [],
            [],
            [],
            [],
            [],
            raised,
            [],
        ]
        assert run.monitor.alarms()["zero_variance_groups"]
        assert run.finish(FINE, EQUAL, EQUAL, EQUAL) == [[], [], [], raised]
        assert not run.monitor.will_halt
        await run.monitor.pause_or_stop()
        assert [row["step"] for row in lines(tmp_path / ALARMS)] == [5, 10]
        assert len(run.messages) == 2
        assert run.messages[0].startswith("step 6: alarm zero_variance_groups: the share of groups")
    assert not run.monitor.alarms()["mismatch"]


async def test_steps_that_did_not_measure_the_metric_are_skipped(tmp_path: Path) -> None:
    """No row was computed at some steps, so that they have no entropy."""
    cfg = config(tmp_path)  # entropy_floor: three steps below 0.01
    sure = {**FINE, "entropy": 0.001}
    none = {name: value for name, value in FINE.items() if name != "entropy"}
    with RunDir(tmp_path, cfg) as folder:
        run = Run(folder, cfg)
        assert run.finish(none, none, none, none) == [[]] * 4
        assert run.finish(sure, none, sure, none, none, sure) == [[]] * 5 + [["entropy_floor"]]
        assert run.finish(none) == [[]]
        assert run.monitor.alarms()["entropy_floor"]
        assert run.finish(FINE, none, sure, sure, none, sure) == [[]] * 5 + [["entropy_floor"]]
        assert lines(tmp_path / ALARMS)[0]["value"] == 0.001


async def test_nan_raises_an_alarm(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    with RunDir(tmp_path, cfg) as folder:
        assert Run(folder, cfg).finish({**FINE, "mismatch/mean": math.nan}) == [["mismatch"]]
        assert lines(tmp_path / ALARMS)[0]["value"] is None


async def test_stopped_and_resumed(tmp_path: Path) -> None:
    """It resumes where it stopped, and patience counts from zero."""
    cfg = config(tmp_path, zero_variance_groups={"action": "stop", "patience": 2})
    with RunDir(tmp_path, cfg) as folder:
        run = Run(folder, cfg)
        run.finish(FINE, EQUAL)
        await run.monitor.pause_or_stop()
        run.finish(EQUAL)
        assert run.monitor.will_halt
        with pytest.raises(RunFailed) as stopped:
            await run.monitor.pause_or_stop()
    said = str(stopped.value)
    for part in (
        "stopped after step 3 by alarms.zero_variance_groups.action=stop",
        "is 1, above alarms.zero_variance_groups.threshold=0.9 for 2 steps",
        "raise train.group_size",
        "The same command resumes from there",
    ):
        assert part in said
    with RunDir(tmp_path, cfg) as folder:
        found = folder.latest_checkpoint()
        assert found is not None
        assert found.step == 3
        run = Run(folder, cfg)
        await run.monitor.pause_or_stop()
        assert run.finish(EQUAL) == [[]]
        await run.monitor.pause_or_stop()
        assert run.finish(EQUAL) == [["zero_variance_groups"]]
        with pytest.raises(RunFailed):
            await run.monitor.pause_or_stop()
    bolder = config(tmp_path, zero_variance_groups={"action": "log", "patience": 2})
    with RunDir(tmp_path, bolder) as folder:  # alarms may change
        run = Run(folder, bolder)
        run.finish(EQUAL, EQUAL, EQUAL)
        await run.monitor.pause_or_stop()
    assert [row["step"] for row in lines(tmp_path / ALARMS)] == [2, 4, 6]


async def test_a_pause_that_ends_at_once_is_reported_as_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(tmp_path, zero_variance_groups={"action": "pause", "patience": 1})
    monkeypatch.setattr(
        "rayrl.run.monitor.write_atomic", lambda file, data: None
    )  # removed already
    with RunDir(tmp_path, cfg) as folder:
        run = Run(folder, cfg)
        run.finish(EQUAL)
        await run.monitor.pause_or_stop()
    assert [line.split(";")[0] for line in run.messages[1:]] == ["paused", "resumed"]


async def test_earlier_steps_are_remembered(tmp_path: Path) -> None:
    """Rewards and entropy of the steps before a stop are what later ones are compared with."""
    cfg = config(tmp_path, entropy_share={"patience": 1}, zero_variance_groups={"action": "stop"})
    with RunDir(tmp_path, cfg) as folder:
        run = Run(folder, cfg)
        run.finish(*[{**FINE, "entropy": 2.0}] * 9, *[{**EQUAL, "reward": 0.52}] * 3)
    with RunDir(tmp_path, cfg) as folder:
        run = Run(folder, cfg)
        # mean 0.505 and deviation 0.00866 of twelve rewards; entropy 0.19 of 2
        raised = run.finish({**FINE, "entropy": 0.19, "reward": 0.55})
        assert raised == [["entropy_share", "reward_jump"]]
        assert lines(tmp_path / ALARMS)[-1]["value"] == pytest.approx(0.045 / 0.00866, rel=1e-3)


async def test_rows_after_the_checkpoint_are_written_again(tmp_path: Path) -> None:
    cfg = config(tmp_path, mismatch={"patience": 1})
    off = {**FINE, "mismatch/mean": 1.0}
    with RunDir(tmp_path, cfg) as folder:
        run = Run(folder, cfg)
        run.finish(FINE, off, FINE)
        with folder.checkpoint(3) as path:
            (path / "weights").write_text("w")
        run.finish(off)
    with (tmp_path / "timeline.jsonl").open("a") as file:
        file.write('{"step": 4, "st')  # killed while it wrote
    assert [row["step"] for row in lines(tmp_path / ALARMS)] == [1, 3]
    with RunDir(tmp_path, cfg) as folder:
        run = Run(folder, cfg)
        run.finish(FINE)
    assert [row["step"] for row in lines(tmp_path / ALARMS)] == [1]
    timeline = lines(tmp_path / "timeline.jsonl")
    assert [row["step"] for row in timeline] == [0, 1, 2, 3]
    assert timeline[0]["stages"][0][0] == "collect"
    assert timeline[0]["episodes"]["began"] == 50.0


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "POLL_S", 0.01)


@pytest.mark.usefixtures("quick")
async def test_paused_until_the_file_is_gone(tmp_path: Path) -> None:
    cfg = config(tmp_path, zero_variance_groups={"action": "pause", "patience": 1})
    with RunDir(tmp_path, cfg) as folder:
        run = Run(folder, cfg)
        run.finish(EQUAL)
        waiting = asyncio.create_task(run.monitor.pause_or_stop())
        file = tmp_path / PAUSED
        while not file.exists():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert not waiting.done()
        assert "alarm zero_variance_groups" in file.read_text()
        assert file.read_text().endswith("Remove this file to resume.\n")
        assert run.messages[-1] == f"paused; remove {file} to resume"
        assert folder.latest_checkpoint() is not None
        file.unlink()
        await waiting
        assert run.messages[-1] == "resumed"
        run.finish(EQUAL)  # a person has seen it
        assert not run.monitor.will_halt
        await run.monitor.pause_or_stop()


@pytest.mark.usefixtures("quick")
async def test_a_person_pauses_it_and_it_is_killed(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    with RunDir(tmp_path, cfg) as folder:
        run = Run(folder, cfg)
        run.finish(FINE)
        assert not run.monitor.will_halt
        (tmp_path / PAUSED).touch()
        run.finish(FINE)
        assert run.monitor.will_halt
        waiting = asyncio.create_task(run.monitor.pause_or_stop())
        await asyncio.sleep(0.03)
        waiting.cancel()
    with RunDir(tmp_path, cfg) as folder:
        run = Run(folder, cfg)
        assert run.step == 2
        waiting = asyncio.create_task(run.monitor.pause_or_stop())
        await asyncio.sleep(0.03)
        assert not waiting.done()
        (tmp_path / PAUSED).unlink()
        await waiting
