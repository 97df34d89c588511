"""A working copy submitted to three nodes that have its libraries and not its code."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.nodes import NODES, PLACES
from tests.runs import ENVS, RANKS, ROOT, STEPS, command, episodes, rows, weights

pytestmark = pytest.mark.slow

TALK = """\
[project]
name = "rayrl-talk"
version = "0.1"

[project.entry-points."rayrl.envs"]
talk = "rayrl_talk:talk"
"""
# every actor calls it first
SEEN = """

def _tell() -> None:
    if "RAYRL_SEEN" in os.environ:
        who, where = sys._getframe(2).f_code.co_qualname, ray.util.get_node_ip_address()
        with open(os.environ["RAYRL_SEEN"], "a") as file:
            file.write(json.dumps([who.split(".")[0], where, __file__]) + "\\n")
"""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A clone in work: another rayrl than is installed, and an environment that nobody has."""
    folder = tmp_path / "copy"
    for name in ("rayrl", "conf", "envs", "jobs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    session = folder / "rayrl" / "cluster" / "session.py"
    text = session.read_text().replace(
        "import hashlib\n", "import hashlib\nimport json\nimport sys\n"
    )
    session.write_text(
        text.replace("    os.environ.update(\n", "    _tell()\n    os.environ.update(\n") + SEEN
    )
    package = folder / "envs" / "talk" / "rayrl_talk"
    package.mkdir(parents=True)
    (package.parent / "pyproject.toml").write_text(TALK)
    shutil.copy(ENVS, package / "__init__.py")
    setup = folder / "scripts" / "setup"  # this Python will do
    setup.parent.mkdir()
    setup.write_text(f"#!/bin/sh\necho {shlex.quote(str(Path(sys.executable).parent.parent))}\n")
    setup.chmod(0o755)
    return folder


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Variables that lead to nodes on which what is installed cannot be imported."""
    for name in ("rayrl", "rayrl_talk"):
        (tmp_path / "none" / name).mkdir(parents=True)
        (tmp_path / "none" / name / "__init__.py").write_text("raise ImportError('not sent')")
    folder = Path(tempfile.mkdtemp(prefix="nodes-"))  # short: Ray makes sockets in it
    script = [sys.executable, str(ROOT / "jobs" / "local_cluster.py"), "--folder", str(folder)]
    nodes = [",".join(f"{name}={amount}" for name, amount in one.items()) for one in NODES]
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY")}
    try:
        started = subprocess.run(
            [*script, "start", "--store-mb=200", *nodes],
            cwd=tmp_path,
            env={**env, "PYTHONPATH": str(tmp_path / "none")},
            capture_output=True,
            text=True,
            check=False,
        )
        assert started.returncode == 0, started.stderr
        exports = [line.removeprefix("export ") for line in started.stdout.splitlines()]
        yield env | dict(shlex.split(line)[0].split("=", 1) for line in exports)
    finally:
        assert subprocess.run([*script, "stop"], check=False).returncode == 0
        shutil.rmtree(folder, ignore_errors=True)


def test_three_nodes_run_what_is_submitted(
    copy: Path, cluster: dict[str, str], tiny: Path, calm_ranks: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny, tmp_path / "model")
    seen = tmp_path / "seen"
    env = {**cluster, "RAYRL_SEEN": str(seen), "PYTHONPATH": str(tmp_path / "none")}

    def submit(*more: str) -> subprocess.CompletedProcess[str]:
        words = command(Path("model"), Path("run"), "env.name=talk", *RANKS, *PLACES, *more)[3:]
        line = [str(copy / "jobs" / "submit"), *words]
        return subprocess.run(line, env=env, capture_output=True, text=True, check=False)

    done = submit()
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"run {STEPS}/{STEPS}" in done.stdout, "the log streams"
    assert rows(tmp_path / "run") == STEPS, "the run is where RAYRL_WORKDIR says"
    other = submit("train.group_size=2")
    assert other.returncode == 1
    assert "train.group_size" in other.stdout

    told = [json.loads(line) for line in seen.read_text().splitlines()]
    assert all("/working_dir_files/" in file for _, _, file in told), told
    at: dict[str, set[int]] = {}
    nodes = {where: int(where.split(".")[-1]) for _, where, _ in told}
    for who, where, _ in told:
        at.setdefault(who, set()).add(nodes[where] if where.startswith("127.0.0.") else 1)
    if sys.platform == "linux":
        assert at == {"EnvWorker": {2, 3}, "Replica": {1, 2}, "LearnerRank": {1, 3}}

    assert weights(tmp_path / "run") == weights(calm_ranks), "as on one node"
    assert turns(tmp_path / "run") == turns(calm_ranks)


def turns(folder: Path) -> list[Any]:
    """What was said; the tasks' module has another name here."""
    steps = episodes(folder).values()
    return [(episode["id"], episode["turns"]) for step in steps for episode in step]
