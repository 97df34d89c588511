from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rayrl.config import Config, from_dict
from rayrl.errors import ConfigError, DataError, RunFailed
from rayrl.run.files import write_atomic
from rayrl.run.folder import RunDir, read_config
from rayrl.types import Episode, Group, Task


def config_of(**sections: Any) -> Config:
    return from_dict({"env": {"name": "tictactoe"}, "train": {"steps": 4}, **sections})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def scalars(folder: Path) -> dict[int, float]:
    """What TensorBoard shows of "reward": step -> value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen = EventAccumulator(str(folder / "tensorboard"))
    seen.Reload()
    return {event.step: event.value for event in seen.Scalars("reward")}


def test_new_run(folder: Path) -> None:
    config = config_of(run={"name": "a", "dir": str(folder)})
    with RunDir(folder, config) as run:
        assert not run.resumed
        assert run.latest_checkpoint() is None
        assert run.finished is None
        run.log(0, {"reward": 0.5, "bad": float("nan"), "worse": float("inf"), "name": "x"})
        assert lines(folder) == [
            {"step": 0, "reward": 0.5, "bad": None, "worse": None, "name": "x"}
        ]
    assert read_config(folder) == config
    assert scalars(folder) == {0: 0.5}


def test_numbers_of_arrays_are_plain(folder: Path) -> None:
    import numpy as np

    with RunDir(folder, config_of()) as run:
        run.log(0, {"reward": np.float32(0.25), "n": np.int64(3)})  # type: ignore[dict-item]
    assert lines(folder) == [{"step": 0, "reward": 0.25, "n": 3.0}]


def train(folder: Path, start: int, stop: int, value: float, steps: int = 4) -> None:
    """A loop that logs every step and saves every second; it stops before `stop`."""
    with RunDir(folder, config_of(train={"steps": steps})) as run:
        found = run.latest_checkpoint()
        assert (found.step if found else 0) == start
        for step in range(start, stop):
            run.log(step, {"reward": value + step})
            if step % 2 == 1:
                with run.checkpoint(step + 1, {"version": step + 1}) as path:
                    (path / "weights").write_text(f"{step}")


def test_resumed_metrics_equal_uninterrupted_ones(tmp_path: Path) -> None:
    train(tmp_path / "unbroken", 0, 4, 10.0)
    train(tmp_path / "broken", 0, 3, 10.0)  # steps 0 to 2; the checkpoint is of step 2
    with RunDir(tmp_path / "broken", config_of()) as run:
        assert run.resumed
        # what was logged before the checkpoint stays, what came after it is done again
        assert [row["step"] for row in run.metrics()] == [0, 1]
        found = run.latest_checkpoint()
        assert found is not None
        assert (found.step, dict(found.state)) == (2, {"version": 2})
        assert (found.path / "weights").read_text() == "1"
    train(tmp_path / "broken", 2, 4, 10.0)
    unbroken = (tmp_path / "unbroken" / "metrics.jsonl").read_bytes()
    assert (tmp_path / "broken" / "metrics.jsonl").read_bytes() == unbroken
    assert scalars(tmp_path / "broken") == scalars(tmp_path / "unbroken")


def test_without_a_checkpoint_it_starts_over(folder: Path) -> None:
    with RunDir(folder, config_of()) as run:
        run.log(0, {"reward": 1.0})
    with RunDir(folder, config_of()) as run:
        assert run.metrics() == []


def test_only_the_newest_checkpoints_stay(folder: Path) -> None:
    with RunDir(folder, config_of(run={"keep_checkpoints": 2})) as run:
        for step in (2, 4, 6, 10):
            with run.checkpoint(step) as path:
                (path / "weights").write_text("w")
        assert [path.name for path in run.checkpoints()] == ["step_000006", "step_000010"]


def test_saving_a_step_again_replaces_it(folder: Path) -> None:
    with RunDir(folder, config_of(run={"keep_checkpoints": 1})) as run:
        for text in ("old", "new"):
            with run.checkpoint(3) as path:
                (path / "weights").write_text(text)
        found = run.latest_checkpoint()
        assert found is not None
        assert (found.path / "weights").read_text() == "new"
        assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step_000003"]


def test_partial_checkpoints_do_not_count(folder: Path) -> None:
    with RunDir(folder, config_of()) as run, run.checkpoint(2) as path:
        (path / "weights").write_text("w")
    (folder / "checkpoints" / ".partial-step_000004-1").mkdir()
    (folder / "checkpoints" / "step_000006").mkdir()  # no run.json: never sealed
    with RunDir(folder, config_of()) as run:
        found = run.latest_checkpoint()
        assert found is not None
        assert found.step == 2
        assert not list((folder / "checkpoints").glob(".partial-*"))


def test_stopped_between_the_two_renames(folder: Path) -> None:
    with RunDir(folder, config_of()) as run, run.checkpoint(2) as path:
        (path / "weights").write_text("w")
    os.replace(folder / "checkpoints" / "step_000002", folder / "checkpoints" / ".old-step_000002")
    with RunDir(folder, config_of()) as run:
        found = run.latest_checkpoint()
        assert found is not None
        assert found.step == 2


def test_error_while_saving_keeps_the_previous(folder: Path) -> None:
    with RunDir(folder, config_of()) as run:
        with run.checkpoint(2) as path:
            (path / "weights").write_text("w")
        with pytest.raises(ZeroDivisionError), run.checkpoint(4):
            raise ZeroDivisionError
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_000002"]


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("No space left on device")],
)
def test_full_disk_keeps_the_previous_and_says_so(folder: Path, error: Exception) -> None:
    with RunDir(folder, config_of()) as run:
        with run.checkpoint(2) as path:
            (path / "weights").write_text("w")
        message = r"disk is full.*step 4.*resumes.*step 2 is intact"
        with pytest.raises(RunFailed, match=message), run.checkpoint(4):
            raise error
        found = run.latest_checkpoint()
        assert found is not None
        assert found.step == 2


def test_full_disk_while_sealing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with RunDir(folder, config_of()) as run:
        with run.checkpoint(2):
            pass
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(RunFailed, match="disk is full"), run.checkpoint(4):
            pass
        assert [path.name for path in run.checkpoints()] == ["step_000002"]


KILLED = """
import sys, os, signal
from pathlib import Path
from rayrl.run.folder import RunDir, read_config
folder = Path(sys.argv[1])
run = RunDir(folder, read_config(folder))
run.log(2, {"reward": 2.0})
with run.checkpoint(3) as path:
    (path / "weights").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_while_saving(folder: Path) -> None:
    with RunDir(folder, config_of()) as run:
        run.log(1, {"reward": 1.0})
        with run.checkpoint(2):
            pass
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder)], check=False, timeout=600)
    assert done.returncode == -signal.SIGKILL
    with RunDir(folder, config_of()) as run:  # the lock died with it
        found = run.latest_checkpoint()
        assert found is not None
        assert found.step == 2
        assert run.metrics() == [{"step": 1, "reward": 1.0}]


def test_wandb_gets_the_numbers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(run={"wandb_project": "games", "name": "a"})
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"rayrl\[wandb\]"):
        RunDir(folder, config)
    calls: list[Any] = []

    class Run:
        def log(self, numbers: dict[str, float], step: int) -> None:
            calls.append((step, numbers))

        def finish(self) -> None:
            calls.append("finished")

    stand_in = SimpleNamespace(init=lambda **given: calls.append(given["project"]) or Run())
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    with RunDir(folder, config) as run:
        run.log(3, {"reward": 0.5, "bad": float("nan")})
    assert calls == ["games", (3, {"reward": 0.5}), "finished"]


# --- the same run or another ---------------------------------------------------------------------


def test_other_settings_are_refused_by_name(folder: Path) -> None:
    with RunDir(folder, config_of()) as run:
        run.log(0, {"reward": 1.0})
    other = config_of(algo={"gamma": 0.5}, learner={"lr": 1.0})
    with pytest.raises(ConfigError, match=r"algo\.gamma: 0\.95 there, 0\.5 now") as caught:
        RunDir(folder, other)
    assert "learner.lr: None there, 1.0 now" in str(caught.value)
    assert "another run.name" in str(caught.value)
    assert read_config(folder) == config_of()


def test_fewer_steps_are_refused(folder: Path) -> None:
    with RunDir(folder, config_of()) as run:
        run.log(0, {"reward": 1.0})
    with pytest.raises(ConfigError, match=r"train\.steps: 4 there, 3 now"):
        RunDir(folder, config_of(train={"steps": 3}))


def test_settings_alone_are_no_run(folder: Path) -> None:
    """A start that failed left them; they must not stand in the way of the next one."""
    RunDir(folder, config_of()).close()
    (folder / "groups").mkdir()
    (folder / "groups" / "turns.log").touch()
    with RunDir(folder, config_of(train={"steps": 3})) as run:
        assert not run.resumed
    assert read_config(folder).train.steps == 3


def test_nothing_is_written_before_the_run_begins(folder: Path) -> None:
    with RunDir(folder, config_of(), begin=False) as run:
        assert (run.resumed, run.finished, run.latest_checkpoint()) == (False, None, None)
        assert not folder.exists()
        run.begin()
        run.begin()
        assert read_config(folder) == config_of()
        with run.checkpoint(2):
            pass
        run.log(2, {"reward": 1.0})
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    more = config_of(train={"steps": 9})
    with RunDir(folder, more, begin=False) as run:
        assert run.resumed
        with pytest.raises(RunFailed, match="is writing to this folder"):
            RunDir(folder, more, begin=False)
    after = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert after == before
    with RunDir(folder, more, begin=False) as run:
        run.begin()
        assert run.metrics() == []
    assert read_config(folder) == more


@pytest.mark.parametrize(
    "section",
    [
        {"train": {"steps": 9}},
        {"run": {"keep_checkpoints": 5, "dir": "elsewhere"}},
        {"cluster": {"address": "auto", "replicas": 2}},
    ],
)
def test_what_may_change(folder: Path, section: dict[str, Any]) -> None:
    RunDir(folder, config_of()).close()
    RunDir(folder, config_of(**section)).close()
    assert read_config(folder) == config_of(**section)


def test_one_process_at_a_time(folder: Path) -> None:
    run = RunDir(folder, config_of())
    with pytest.raises(RunFailed, match=f"process {os.getpid()} is writing to this folder"):
        RunDir(folder, config_of())
    run.close()
    RunDir(folder, config_of()).close()


def test_finished_run_keeps_its_metrics_until_it_gets_more_steps(folder: Path) -> None:
    with RunDir(folder, config_of()) as run:
        with run.checkpoint(4):
            pass
        run.log(4, {"reward": 1.0})
        run.finish({"reward": 1.0})
    with RunDir(folder, config_of()) as run:
        assert run.finished == {"reward": 1.0}
        assert len(run.metrics()) == 1
    with RunDir(folder, config_of(train={"steps": 5})) as run:
        assert run.finished is None
        assert run.metrics() == []


def test_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no run here"):
        read_config(tmp_path)
    (tmp_path / "config.yaml").write_text("train: {step: 3}\n")
    with pytest.raises(DataError, match=r"config\.yaml: train\.step: .*'train\.steps'"):
        read_config(tmp_path)


# --- files ---------------------------------------------------------------------------------------


def test_atomic_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x"
    write_atomic(file, b"old")

    def fail(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_atomic(file, b"new")
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_broken_json_names_file_and_line(folder: Path) -> None:
    with RunDir(folder, config_of()) as run:
        run.write_json("eval.json", {"a": [1]})
        assert run.read_json("eval.json") == {"a": [1]}
        (folder / "eval.json").write_text('{\n"a": ,\n}')
        with pytest.raises(DataError, match=r"eval\.json, line 2"):
            run.read_json("eval.json")


@pytest.fixture
def groups() -> list[Group]:
    episode = Episode("g/0", "game", Task(seed=3), 0, (), {"agent": {"win": 1.0}}, {"agent": 1.0})
    return [Group("g", Task(seed=3), (episode, replace(episode, id="g/1", index=1)))]


def test_episodes_are_lines_people_can_read(folder: Path, groups: list[Group]) -> None:
    with RunDir(folder, config_of()) as run:
        file = run.write_episodes(10, groups)
        run.write_episodes(10, groups)  # again after a resume
    assert file == folder / "episodes" / "step_000010.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["id"] for row in rows] == ["g/0", "g/1"]
