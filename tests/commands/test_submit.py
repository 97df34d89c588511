"""What `jobs/submit` asks Ray for, what it refuses, and how a job begins on the cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rayrl.cluster.code_bundle import forwarded_variables, write_bundle
from rayrl.commands import submit
from rayrl.config import Config
from rayrl.errors import ConfigError
from rayrl.run.folder import RunDir

TRAIN = ("train", "env=copyword", "run.dir=/data/run")


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*os.environ]:
        if name.startswith("RAYRL_") or name == "RAY_ADDRESS":
            monkeypatch.delenv(name)


def line(tmp_path: Path, *words: str) -> list[str]:
    folder = tmp_path / "code"
    folder.mkdir(exist_ok=True)
    return submit.command(submit.options().parse_args(words), folder)


def test_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in forwarded_variables(os.environ):  # of an engine that was opened here before
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    monkeypatch.setenv("RAYRL_DEBUG", "1")
    monkeypatch.setenv("KEY", "secret")
    options = ("--pip", "rank-bm25==0.2.2", "--env", "KEY", "--env", "A=b=c")
    found = line(tmp_path, *options, *TRAIN)
    at = found.index("--")
    assert found[at + 1 :] == ["python", "start.py", *TRAIN]
    before = dict(zip(found[5:at:2], found[6:at:2], strict=True))
    assert before.pop("--address") == "http://head:8265"
    assert (Path(before.pop("--working-dir")) / "start.py").is_file()
    assert json.loads(before.pop("--runtime-env-json")) == {
        "env_vars": {"RAYRL_DEBUG": "1", "KEY": "secret", "A": "b=c"},
        "pip": ["rank-bm25==0.2.2"],
    }
    assert not before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "which verb"),
        (("train", "env=copyword", "train.stepz=3"), r"train\.steps"),
        (
            ("train", "env=copyword"),
            r"run\.dir=runs/copyword-train: relative to what.*RAYRL_WORKDIR",
        ),
        (("play", "env=copyword"), "no terminal"),
        (("--env", "NOBODY_SET_THIS", *TRAIN), "NOBODY_SET_THIS.*not set"),
        (("train", "env.name=nim.py", "run.dir=/data/run"), r"no file .*nim\.py"),
    ],
)
def test_refused_before_it_is_sent(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        line(tmp_path, *words)


def test_relative_paths_are_meant_from_a_folder_on_the_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYRL_WORKDIR", "/shared/work")
    found = line(tmp_path, "train", "env=copyword")
    given = json.loads(found[found.index("--runtime-env-json") + 1])
    assert given["env_vars"]["RAYRL_WORKDIR"] == "/shared/work"
    monkeypatch.setenv("RAYRL_WORKDIR", "work")
    with pytest.raises(ConfigError, match="absolute"):
        line(tmp_path, "train", "env=copyword")


def test_a_folder_of_settings_travels(tmp_path: Path) -> None:
    mine = tmp_path / "mine" / "env"
    mine.mkdir(parents=True)
    (mine / "words.yaml").write_text("name: copyword\n")
    words = ("train", "--config-dir", str(mine.parent), "env=words", "run.dir=/data/run")
    found = line(tmp_path, *words)
    assert found[-4:] == ["start.py", "train", "env=words", "run.dir=/data/run"]
    done = started(tmp_path / "code", "plan", "env=words", f"run.dir={tmp_path}/run")
    assert done.returncode == 0, done.stderr
    assert 'name: "copyword"' in done.stdout


def started(
    code: Path, *words: str, python: tuple[str, ...] = (), **env: str
) -> subprocess.CompletedProcess[str]:
    """The job's program, as Ray runs it."""
    return subprocess.run(
        [sys.executable, *python, "start.py", *words],
        cwd=code,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("code")
    write_bundle(folder)
    return folder


def test_it_starts_in_the_folder(code: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("nonsense")
    words = ("plan", "env=copyword", "model.path=model")
    done = started(code, *words, RAYRL_WORKDIR=str(tmp_path))
    assert str(tmp_path / "model") in done.stdout
    done = started(code, *words, RAYRL_WORKDIR=str(tmp_path / "typo"))
    assert done.returncode == 2
    assert f"RAYRL_WORKDIR={tmp_path}/typo: the cluster's head has no such folder" in done.stderr


def test_another_python_or_ray_is_said_before_anything_starts(code: Path, tmp_path: Path) -> None:
    file = code / "rayrl-code.json"
    was = file.read_text()
    try:
        file.write_text(json.dumps({**json.loads(was), "python": "3.99", "ray": "2.0.0"}))
        done = started(code, "plan", "env=copyword")
    finally:
        file.write_text(was)
    assert done.returncode == 2
    assert "submitted with 3.99" in done.stderr
    assert "submitted with ray 2.0.0" in done.stderr
    assert "Traceback" not in done.stderr


def test_libraries_that_the_cluster_lacks_are_listed(code: Path) -> None:
    (metadata,) = code.glob("rayrl-*.dist-info/METADATA")
    was = metadata.read_text()
    try:
        metadata.write_text(
            f"{was}Requires-Dist: zz-nobody>=1\nRequires-Dist: rich>=999\n"
            "Requires-Dist: zz-other; extra == 'more'\n"
        )
        done = started(code, "plan", "env=copyword")
    finally:
        metadata.write_text(was)
    assert done.returncode == 2
    assert "the cluster has no zz-nobody, and rayrl needs zz-nobody>=1" in done.stderr
    assert "the cluster has rich 1" in done.stderr
    assert "zz-other" not in done.stderr
    bare = started(code, "plan", python=("-S", "-P"), PYTHONPATH="")  # without what is installed
    assert bare.returncode == 2
    assert "has no ray" in bare.stderr


def test_a_run_folder_that_ray_would_delete_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with `ray job submit --working-dir .` and a relative `run.dir`."""
    copy = tmp_path / "session_1" / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    with pytest.raises(ConfigError, match=r"run\.dir=runs/x: .*Ray deletes"):
        RunDir("runs/x", Config())
    assert not (copy / "runs").exists()
