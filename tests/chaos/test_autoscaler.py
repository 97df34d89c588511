"""Ray's autoscaler adds nodes because workers were asked for, and takes them away again.

Its provider of fake nodes starts another raylet on this machine for each node.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.apart import free_port
from tests.runs import ENVS, ROOT, command, episodes, rows, until

pytestmark = pytest.mark.slow

WORKERS = 2  # nodes there may be besides the head
COMMANDS = [
    "initialization_commands",
    "setup_commands",
]  # that the provider of fakes has no use for
COMMANDS += [f"{kind}_setup_commands" for kind in ("head", "worker")]
COMMANDS += [f"{kind}_start_ray_commands" for kind in ("head", "worker")]


class Cluster:
    """A head with room for one worker, and an autoscaler that may add nodes for one each."""

    def __init__(self, folder: Path) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self.env = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 32}
        self.env |= {"RAY_worker_niceness": "0"}
        room = {"resources": {"CPU": 1, "play": 1}, "node_config": {}}
        settings = {
            "cluster_name": "fake",
            "max_workers": WORKERS,
            "idle_timeout_minutes": 0.05,
            "provider": {
                "type": "fake_multinode",
                "gcs_address": self.address,
                "use_node_id_as_ip": True,  # all of them have one address
                "disable_node_updaters": True,  # they would come by ssh
                "disable_launch_config_check": True,
            },
            "available_node_types": {
                "ray.head.default": {**room, "max_workers": 0},
                "more": {**room, "min_workers": 0, "max_workers": WORKERS},
            },
            "head_node_type": "ray.head.default",
            "upscaling_speed": 1.0,
            **{key: {} for key in ("auth", "docker", "file_mounts")},
            **{key: [] for key in ("cluster_synced_files", *COMMANDS)},
        }
        told = folder / "autoscaler.json"
        told.write_text(json.dumps(settings))
        temp = Path(os.environ["TMPDIR"]) / "ray-head"
        line = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
        line += ["--num-cpus=1"]
        line += [f"--autoscaling-config={told}", f"--port={self.address.split(':')[1]}"]
        line += ['--resources={"play": 1}', "--object-store-memory=200000000"]
        line += ["--include-dashboard=false", "--disable-usage-stats", f"--temp-dir={temp}"]
        fakes = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
        fakes["RAY_OVERRIDE_NODE_ID_FOR_TESTING"] = "f" * 51 + "00000"
        self._log = (folder / "head.log").open("wb")
        self.head = subprocess.Popen(
            line, env={**self.env, **fakes}, stdout=self._log, stderr=self._log
        )
        until(lambda: self.nodes() == 1, self.head)

    def nodes(self) -> int:
        """How many there are."""
        found = 0
        for process in self._processes():
            with suppress(psutil.NoSuchProcess):
                found += Path((process.cmdline() or [""])[0]).name == "raylet"
        return found

    def _processes(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(self.head.pid).children(recursive=True)
        return []

    def close(self) -> None:
        for process in [*self._processes(), psutil.Process(self.head.pid)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.head.wait(600)
        self._log.close()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    some = Cluster(tmp_path)
    yield some
    some.close()


def test_groups_that_wait_bring_nodes(cluster: Cluster, tiny: Path, tmp_path: Path) -> None:
    folder, gate = tmp_path / "run", tmp_path / "open"
    words = [
        f"cluster.address={cluster.address}",
        "cluster.env_worker_resources={play: 1}",
        "cluster.env_workers_max=3",
        "cluster.concurrency=4",  # a group
        "train.steps=1",
        f"env.name={ENVS}:waits",
        f"env.args={{gate: {gate}}}",
    ]
    with subprocess.Popen(
        command(tiny, folder, *words),
        cwd=ROOT,
        env=cluster.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as run:
        until(lambda: len(list(tmp_path.glob("open.*"))) == 3, run)  # workers that play
        assert cluster.nodes() == 3, "each has room for one"
        gate.touch()
        said: list[str] = []
        read = threading.Thread(target=lambda: said.extend(run.communicate()))
        read.start()
        read.join()
    assert run.returncode == 0, said[1]
    assert rows(folder) == 1
    (played,) = episodes(folder).values()
    assert len(played) == 16
    workers = {episode["scores"]["agent"]["process"] for episode in played}
    assert len(workers) == 3
    until(lambda: cluster.nodes() == 1, cluster.head)
