"""A working copy submitted to three nodes that have its libraries and not its code; one is lost.

One machine plays the nodes, each a raylet with its own object store.
"""

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

import psutil
import pytest

from tests.nodes import NODES, PLACES, PLAYERS, kill_node, start_node, titles
from tests.runs import ENVS, RANKS, ROOT, STEPS, Going, command, episodes, rows, scraps, weights

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
    actors = folder / "rayrl" / "cluster" / "actors.py"
    text = actors.read_text().replace("import gc\n", "import gc\nimport json\nimport sys\n")
    actors.write_text(
        text.replace("    os.environ.update(", "    _tell()\n    os.environ.update(") + SEEN
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


class Cluster:
    """What `jobs/local_cluster` has started in `folder`.

    Attributes:
        env: variables that lead to it.
        nodes: the `ray start` of each node, the head first.
    """

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        self.env = env
        self.nodes = [int(pid) for pid in json.loads((folder / "nodes.json").read_text())]
        self._log = folder / "added.log"
        self._added: list[subprocess.Popen[bytes]] = []

    def replace(self, number: int) -> None:
        """Kill a node and all that runs on it; another with the same resources comes."""
        lost = psutil.Process(self.nodes[number])
        line, env = lost.cmdline(), lost.environ()
        kill_node(lost.pid)
        lost.wait(600)
        if sys.platform == "linux":  # 127.0.0.0/8 is this machine; the last of two values counts
            line += [f"--node-ip-address=127.0.0.{len(self.nodes) + 1}"]
        self._added.append(start_node(line, env, self._log))
        self.nodes.append(self._added[-1].pid)

    def close(self) -> None:
        """End the nodes that were added."""
        for node in self._added:
            kill_node(node.pid)
            node.wait(600)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Three nodes on which what is installed cannot be imported."""
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
        variables = env | dict(shlex.split(line)[0].split("=", 1) for line in exports)
        some = Cluster(folder, variables)
        yield some
        some.close()
    finally:
        assert subprocess.run([*script, "stop"], check=False).returncode == 0
        shutil.rmtree(folder, ignore_errors=True)


def test_three_nodes_run_what_is_submitted_and_one_is_lost_and_another_comes(
    copy: Path, cluster: Cluster, tiny: Path, calm_ranks: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny, tmp_path / "model")
    seen, folder = tmp_path / "seen", tmp_path / "run"
    env = {**cluster.env, "RAYRL_SEEN": str(seen), "PYTHONPATH": str(tmp_path / "none")}
    words = command(Path("model"), Path("run"), "env.name=talk", *RANKS, *PLACES)[3:]
    line = [str(copy / "jobs" / "submit"), *words]

    with Going(line, env) as run:
        run.until(lambda: rows(folder) >= 3)  # the run is where RAYRL_WORKDIR says
        found = [titles(node) & PLAYERS for node in cluster.nodes]
        cluster.replace(2)
        assert run.wait() == 0, run.said
    assert not any(titles(cluster.nodes[number]) for number in (0, 1, 3)), "an actor is left"
    assert found == [
        {"ServeReplica", "LearnerRank"},
        {"EnvWorker", "ServeReplica"},
        {"EnvWorker", "LearnerRank"},
    ]
    assert f"run {STEPS}/{STEPS}" in run.said, "the log streams"
    assert rows(folder) == STEPS
    assert "a learner process died; restarting it from step" in run.said
    assert scraps(folder) == []
    with Going([*line, "train.group_size=2"], env) as other:
        assert other.wait() == 1, other.said
    assert "train.group_size" in other.said

    told = [json.loads(line) for line in seen.read_text().splitlines()]
    assert all("/working_dir_files/" in file for _, _, file in told), told
    at: dict[str, set[int]] = {}
    nodes = {where: int(where.split(".")[-1]) for _, where, _ in told}
    for who, where, _ in told:
        at.setdefault(who, set()).add(nodes[where] if where.startswith("127.0.0.") else 1)
    if sys.platform == "linux":
        players = at.pop("EnvWorker")  # the last one may start when all has been played
        assert {2, 3} <= players <= {2, 3, 4}
        assert at == {"Replica": {1, 2}, "LearnerRank": {1, 3, 4}}

    assert weights(folder) == weights(calm_ranks), "as on one node, with none lost"
    assert turns(folder) == turns(calm_ranks)


def turns(folder: Path) -> list[Any]:
    """What was said; the tasks' module has another name here."""
    steps = episodes(folder).values()
    return [(episode["id"], episode["turns"]) for step in steps for episode in step]
