"""Damaged files of a run: it ends as if nothing had happened, or an error names the file.

A run here is the real folder with a learner of one number, so that the whole table takes seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rayrl.config import Config, from_dict
from rayrl.errors import DataError, RayrlError
from rayrl.report.collect import write_report
from rayrl.report.table import Cell, Result
from rayrl.rollout.records import Records
from rayrl.run import folder
from rayrl.run.files import check_weights
from rayrl.run.folder import RunDir, read_config
from rayrl.run.group_log import Batched, GroupLog, Played
from rayrl.types import Episode, Group, Message, Task, Turn

STEPS = 8
DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda data: data[: len(data) // 2],
    "zeroed tail": lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
    "zeros behind": lambda data: data + bytes(4096),
    "flipped": lambda data: (
        data[: len(data) // 2]
        + bytes(one ^ 1 for one in data[len(data) // 2 :][:1])
        + data[len(data) // 2 + 1 :]
    ),
    "empty": lambda data: b"",
    "not UTF-8": lambda data: b"\xff\xfe" * (len(data) // 2 + 1),
    "another type": lambda data: b"3\n",
}


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    """Without what takes most of the time and is not looked at here."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda handle: None)
        patched.setattr(folder, "make_loggers", lambda *given: [])
        yield


def config_of(folder: Path) -> Config:
    return from_dict(
        {
            "env": {"name": "tictactoe"},
            "run": {"dir": str(folder), "name": "r"},
            "train": {"steps": STEPS},
        }
    )


def group(step: int) -> Group:
    task = Task(seed=step)
    turn = Turn("agent", (Message("user", f"question {step}"),), f"answer {step}", "stop")
    episode = Episode(f"{step}-0/0", "e", task, 0, (turn,), {"agent": {"s": 1.0}}, {"agent": 1.0})
    return Group(f"{step}-0", task, (episode,))


def batches(log: GroupLog, step: int) -> dict[int, Group]:
    """What was closed since the checkpoint of that step."""
    played: dict[int, Group] = {}
    closed = {}
    for record in log.read(step):
        if isinstance(record, Batched):
            closed[record.step] = played[record.taken[0]]
        else:
            played[record.index] = record.group
    return closed


def run(folder: Path, stop: int = STEPS) -> None:
    """A training run: what it learns depends on every batch before; checkpoints of steps 2, 4, …"""
    with RunDir(folder, config_of(folder)) as kept, contextlib.ExitStack() as stack:
        if kept.finished is not None:
            return
        found = kept.latest_checkpoint()
        start = found.step if found else 0
        log = stack.enter_context(contextlib.closing(GroupLog(folder / "groups")))
        if kept.went_back:
            log.go_back(start)
        turns = stack.enter_context(contextlib.closing(Records(log.turns)))
        turns.read()
        weight = int((found.path / "weights").read_text()) if found else 1
        assert not found or found.state == {"weight": weight}
        closed = batches(log, start)
        for step in range(start, stop):
            if step not in closed:
                log.add(Played(step, group(step)))
                log.add(Batched(step, (step,)))
            batch = closed.get(step, group(step))
            weight = weight * 31 + int(batch.episodes[0].turns[0].text.split()[1])
            turns.add([[f"{step + 1}-0/0", 0, b"turn"], []])
            kept.log(step, {"reward": 1.0, "weight": weight})
            kept.write_episodes(step, [batch])
            if step % 2 == 1:
                log.begin(step + 1, [])
                with kept.checkpoint(step + 1, {"weight": weight}) as path:
                    (path / "weights").write_text(f"{weight}")
                    (path / "more").mkdir()
                    (path / "more" / "rank1").write_bytes(bytes(300))
                log.delete_others(step + 1)
        if stop == STEPS:
            with kept.whole("model") as path:
                (path / "model.safetensors").write_text(f"{weight}")
            cell = Cell({}, 4, 0, {})
            Result("r", {"tasks": cell}).save(folder / "eval.json")
            kept.finish({"steps": STEPS})


def files(folder: Path) -> dict[str, bytes]:
    """What a run left, but for what holds wall times or is only for going on."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not {"tensorboard", "groups"} & {*path.relative_to(folder).parts}
        and path.name not in (".lock", "config.yaml", "report.html")
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(folder)
    return files(folder)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped") / "run"
    run(folder, 7)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(folder)
    return folder


def damaged(
    original: Path, folder: Path, damage: Callable[[bytes], bytes]
) -> Iterator[tuple[str, Path]]:
    """Copies of a run's folder, each with one file damaged."""
    names = [str(path.relative_to(original)) for path in original.rglob("*") if path.is_file()]
    for number, name in enumerate(sorted(names)):
        if "tensorboard" in name or name in (".lock", "report.html"):
            continue
        copy = folder / str(number) / "run"
        shutil.copytree(original, copy)
        file = copy / name
        before = file.read_bytes()
        file.write_bytes(damage(before))
        if file.read_bytes() != before:
            yield name, copy


def error_of(function: Callable[[Path], object], folder: Path) -> str:
    try:
        function(folder)
    except RayrlError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_resumed_run_ends_the_same_or_names_the_file(
    kind: str, stopped: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    tried = []
    for name, copy in damaged(stopped, tmp_path, DAMAGE[kind]):
        tried.append(name)
        if said := error_of(run, copy):
            assert name.rsplit("/", 1)[-1] in said, (name, said)
            continue
        got = files(copy)
        if name.startswith("episodes/"):  # of before the checkpoint: its lines have checksums
            got.pop(name)
            got.pop("result.json")
        assert got == {k: v for k, v in whole.items() if k in got}, name
        assert {*got} >= {*whole} - {name, "result.json"}, name
    assert {"config.yaml", "metrics.jsonl", "groups/step_000006.log"} <= {*tried}
    assert "checkpoints/step_000006/run.json" in tried


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_report_is_the_same_or_names_the_file(kind: str, finished: Path, tmp_path: Path) -> None:
    page = write_report(finished).read_text()
    for name, copy in damaged(finished, tmp_path, DAMAGE[kind]):
        if said := error_of(write_report, copy):
            assert name.rsplit("/", 1)[-1] in said, (name, said)
            continue
        got = (copy / "report.html").read_text()
        assert got.replace(str(copy), str(finished)) == page, name


def test_it_goes_back_to_the_checkpoint_before(
    stopped: Path, whole: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(stopped, copy)
    (copy / "checkpoints" / "step_000006" / "more" / "rank1").write_bytes(bytes(299) + b"\1")
    with RunDir(copy, config_of(copy)) as kept:
        said = capsys.readouterr().err
        assert "step_000006/more/rank1 holds other bytes than were written" in said
        assert "resumes from that of step 4" in said
        found = kept.latest_checkpoint()
        assert found is not None
        assert found.step == 4
        assert kept.went_back
        assert [row["step"] for row in kept.metrics()] == [0, 1, 2, 3]
    with RunDir(copy, config_of(copy)) as kept:
        assert kept.went_back, "also for the process after this one"
        assert capsys.readouterr().err == ""
    run(copy)
    assert files(copy) == whole
    assert not [*(copy / "checkpoints").glob(".*")]


def test_all_are_damaged(stopped: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(stopped, copy)
    for path in (copy / "checkpoints").glob("step_*"):
        (path / "weights").unlink()
    with pytest.raises(DataError, match=r"step_000006/weights is missing.*restart from step 0"):
        RunDir(copy, config_of(copy))
    shutil.rmtree(copy / "checkpoints")
    run(copy)


def test_a_checkpoint_from_before_there_were_checksums(
    stopped: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(stopped, copy)
    for file in (copy / "checkpoints").glob("step_*/run.json"):
        record = json.loads(file.read_text())
        old = {key: record[key] for key in ("step", "metrics_bytes", "state")}
        file.write_text(json.dumps(old))
    text = (copy / "config.yaml").read_text().splitlines(keepends=True)
    (copy / "config.yaml").write_text("".join(text[:-1]))
    run(copy)
    got = files(copy)
    assert {k: v for k, v in got.items() if "step_000006" not in k} == {
        k: v for k, v in whole.items() if "step_000006" not in k
    }


def test_a_stored_setting_is_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a stranger's run: nothing of this machine gets into it."""
    monkeypatch.setenv("SECRET", "hunter2")
    config = from_dict({"env": {"name": "a\\${oc.env:SECRET}"}})
    assert config.env.name == "a${oc.env:SECRET}"
    RunDir(tmp_path / "a", config).close()
    assert read_config(tmp_path / "a") == config
    file = tmp_path / "b" / "config.yaml"
    file.parent.mkdir()
    file.write_text("env:\n  name: ${oc.env:SECRET}\n")
    with pytest.raises(DataError, match=r"config.yaml: '\$\{oc.env:SECRET\}' is not resolved"):
        read_config(file.parent)
    file.write_text("env:\n  name: !!python/object/apply:os.mkdir [was-run]\n")
    with pytest.raises(DataError, match=r"config.yaml, line 2: not YAML"):
        read_config(file.parent)


def test_exported_weights_are_compared(finished: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(finished / "model", model)
    check_weights(model)
    (model / "README.md").write_text("beside the weights")
    check_weights(model)
    file = model / "model.safetensors"
    file.write_bytes(bytes(one ^ 1 for one in file.read_bytes()))
    with pytest.raises(DataError, match=r"model.safetensors holds other bytes than were written"):
        check_weights(model)
    file.unlink()
    with pytest.raises(DataError, match=r"model.safetensors is missing"):
        check_weights(model)
    (model / "checksums.json").unlink()
    check_weights(model)
