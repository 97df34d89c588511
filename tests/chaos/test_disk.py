"""A disk runs full while a run goes on; with space again, the same command goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rayrl.config import from_dict
from rayrl.errors import RunFailed
from rayrl.learner.reference import ReferenceLearner
from rayrl.run.folder import RunDir
from rayrl.run.group_log import GroupLog, Played
from rayrl.types import Episode, Group, Task, Turn
from tests.disks import small_disk
from tests.runs import Going, command, episodes, figures, rows, scraps, weights

pytestmark = pytest.mark.slow


def test_a_full_disk_stops_a_run_that_goes_on_when_there_is_space(
    tiny: Path, calm: Path, tmp_path: Path
) -> None:
    (one, *_) = (calm / "checkpoints").iterdir()
    needed = sum(path.stat().st_size for path in one.iterdir()) // 1024
    with small_disk(tmp_path / "disk", 16 * 1024) as disk:
        folder = disk.path / "run"
        line = command(tiny, folder)
        with small_disk(folder / "checkpoints", needed * 3 // 2) as checkpoints:
            with Going(line) as run:
                assert run.wait() == 1, run.said
            said = (
                f"{checkpoints.path}: the disk is full, so the checkpoint of step 4 was not saved"
            )
            assert said in run.said
            assert "is free). Free some space and run the same command again" in run.said
            assert stopped_whole(run, folder) == [2]
            checkpoints.resize(8 * 1024)
            with Going(line) as run:
                run.until(lambda: rows(folder) >= 6)
                disk.fill()
                assert run.wait() == 1, run.said
            assert "the disk is full" in run.said
            assert "Free some space and run the same command again" in run.said
            assert stopped_whole(run, folder)[-1] >= 4
            disk.empty()
            with Going(line) as run:
                assert run.wait() == 0, run.said
            assert weights(folder) == weights(calm)
            assert figures(folder) == figures(calm)
            assert episodes(folder) == episodes(calm)
            assert scraps(folder) == []


def stopped_whole(run: Going, folder: Path) -> list[int]:
    """The checkpoints there are; nothing is half written, and nobody saw a traceback."""
    assert "Traceback" not in run.said
    assert scraps(folder) == []
    found = sorted((folder / "checkpoints").iterdir())
    for one in found:
        assert {"state.pt", "learner.json", "run.json"} == {path.name for path in one.iterdir()}
    return [json.loads((one / "run.json").read_text())["step"] for one in found]


def test_groups_that_find_no_space_are_not_half_there(tmp_path: Path) -> None:
    turns = [Turn("agent", (), str(k) * 3000, "stop") for k in range(8)]
    played = [Episode(f"g/{k}", "e", Task(), k, (turn,)) for k, turn in enumerate(turns)]
    group = Group("g", Task(), tuple(played))
    with small_disk(tmp_path / "disk", 64) as disk:
        log = GroupLog(disk.path / "groups")
        log.begin(0, [])
        log.add(Played(0, group))
        disk.fill(leave=4096)
        with pytest.raises(RunFailed, match="a group that was played was not saved"):
            log.add(Played(1, group))
        log.close()
        disk.empty()
        assert log.read(0) == [Played(0, group)]
        log.add(Played(1, group))
        log.close()
        assert log.read(0) == [Played(0, group), Played(1, group)]
        log.close()


def test_an_export_that_finds_no_space_leaves_the_model_before_it(
    tiny: Path, tmp_path: Path
) -> None:
    config = from_dict({"learner": {"kind": "reference"}})
    learner = ReferenceLearner(config, tiny)
    with small_disk(tmp_path / "disk", 512) as disk, RunDir(disk.path / "run", config) as run:
        with run.whole("model") as path:
            learner.export(path)
        before = weights(run.path)
        disk.fill(leave=32 * 1024)
        said = r"so model/ was not saved \(0\.0 MiB is free\).*resumes from its last checkpoint"
        with pytest.raises(RunFailed, match=said), run.whole("model") as path:
            learner.export(path)
        assert weights(run.path) == before
        assert scraps(run.path) == []
        disk.empty()
        with run.whole("model") as path:
            learner.export(path)
        assert weights(run.path) == before
