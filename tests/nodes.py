"""Several nodes of Ray on this machine: raylets with an object store and an address each."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

from tests.apart import free_port

__all__ = ["NODES", "PLACES", "PLAYERS", "Nodes", "kill_node", "start_node", "titles"]

STARTS = 6  # on a busy machine `ray start` may miss a deadline that Ray has fixed
KINDS = ("EnvWorker", "ServeReplica", "LearnerRank", "Recorder", "WeightStore", "ServeController")
PLAYERS = {"EnvWorker", "ServeReplica", "LearnerRank"}
PLACES = [
    "cluster.env_workers=2",
    "cluster.replicas=2",
    "cluster.env_worker_resources={play: 1}",
    "cluster.replica_resources={serve: 1}",
    "cluster.learner_resources={learn: 1}",
    "cluster.placement=STRICT_SPREAD",
]
# env workers on the second and third, replicas on the first and second, ranks on the first and
# third
NODES = [{"serve": 1, "learn": 1}, {"play": 1, "serve": 1}, {"play": 1, "learn": 1}]


class Nodes:
    """Raylets on this machine, started by `ray start`; the first is the head.

    Args:
        folder: for what they say.
        store: where the head keeps what it knows, so that it can be killed and started again while
            the others wait for it (RocksDB, built into Ray).
    """

    def __init__(self, folder: Path, store: Path) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self.env = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 32}
        self.env["RAY_worker_niceness"] = "0"
        self.env |= {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(store)}
        self.started: list[subprocess.Popen[bytes]] = []
        self._log = folder / "nodes.log"

    def add(self, resources: dict[str, int]) -> int:
        """Another node; returns its number."""
        self.started.append(self._start(resources, head=not self.started))
        return len(self.started) - 1

    def restart_head(self, resources: dict[str, int]) -> None:
        """The first node again, where it was, after it was killed."""
        # it would take the other raylets of this machine for a head that still runs
        (self.temp(0) / "ray_current_cluster").unlink(missing_ok=True)
        self.started[0] = self._start(resources, head=True)

    def _start(self, resources: dict[str, int], *, head: bool) -> subprocess.Popen[bytes]:
        line = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=2"]
        line += [f"--resources={json.dumps(resources)}", "--object-store-memory=200000000"]
        line += ["--dashboard-agent-listen-port=0", "--disable-usage-stats"]
        if head:
            line += ["--head", f"--port={self.address.split(':')[1]}", f"--temp-dir={self.temp(0)}"]
            line += ["--include-dashboard=false"]
        else:
            line += [f"--address={self.address}", f"--temp-dir={self.temp(len(self.started))}"]
            if sys.platform == "linux":  # 127.0.0.0/8 is this machine
                line += [f"--node-ip-address=127.0.0.{len(self.started) + 1}"]
        return start_node(line, self.env, self._log)

    def temp(self, number: int) -> Path:
        """The node's own folder; a driver that names it is on that node."""
        return Path(os.environ["TMPDIR"]) / f"ray-{number}"

    def find(self, number: int, title: str) -> list[psutil.Process]:
        """The processes of a node that Ray calls so."""
        return _children(self.started[number].pid, f"ray::{title}")

    def titles(self, number: int) -> set[str]:
        """What Ray calls our processes on a node."""
        return titles(self.started[number].pid)

    def kill(self, number: int) -> None:
        """A node and all that runs on it, at once."""
        kill_node(self.started[number].pid)
        self.started[number].wait(600)

    def close(self) -> None:
        for number in reversed(range(len(self.started))):
            self.kill(number)
            shutil.rmtree(self.temp(number), ignore_errors=True)


def start_node(line: list[str], env: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Start a node by `ray start --block`; returns when it has a raylet that stays."""
    with log.open("ab") as out:
        for _ in range(STARTS):
            node = subprocess.Popen(line, env=env, stdout=out, stderr=out)
            while node.poll() is None:
                if _children(node.pid, "raylet"):
                    time.sleep(2)
                    if node.poll() is None:
                        return node
                time.sleep(0.1)
    raise AssertionError(log.read_text())


def titles(node: int) -> set[str]:
    """What Ray calls our processes on a node, whose `ray start` has the pid `node`."""
    return {kind for kind in KINDS if _children(node, f"ray::{kind}")}


def kill_node(node: int) -> None:
    """Kill a node and all that runs on it, at once."""
    with suppress(psutil.NoSuchProcess):
        for process in [psutil.Process(node), *_children(node)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def _children(node: int, title: str = "") -> list[psutil.Process]:
    found = []
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(node).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                line = process.cmdline() or [""]
                if " ".join(line).startswith(title) or Path(line[0]).name == title:
                    found.append(process)
    return found
