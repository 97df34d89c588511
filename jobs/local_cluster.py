"""What `jobs/local_cluster` runs: raylets on this machine, started, awaited and stopped."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

PROGRAM = "jobs/local_cluster"
START_S = 300.0
ATTEMPTS = 6
STOP_S = 30.0
LINGER_S = 3.0  # what a node started may outlive it; Ray's agents would call a head that is gone
PIDS = "nodes.json"  # of `ray start`, with when each began
RAY = [sys.executable, "-m", "ray.scripts.scripts"]  # this Python's, whatever PATH finds first


def main() -> int:
    """Start or stop; the exit status."""
    arguments = parsed()
    folder = arguments.folder.resolve()
    if arguments.command == "stop":
        return stop(folder)
    if nodes_of(folder):
        print(f"{PROGRAM}: there is one in {folder}; `{PROGRAM} stop` ends it", file=sys.stderr)
        return 1
    try:
        exports = start(folder, arguments)
    except BaseException as error:
        stop(folder)
        if not isinstance(error, RuntimeError):
            raise
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 1
    for name, value in exports.items():
        print(f"export {name}={shlex.quote(value)}")
    return 0


def parsed() -> argparse.Namespace:
    """The command line."""
    default = Path(tempfile.gettempdir()) / f"rayrl-cluster-{os.getuid()}"
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__)
    parser.add_argument(
        "--folder", type=Path, default=default, help="of what the cluster keeps (%(default)s)"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    begin = commands.add_parser(
        "start", help="start the nodes, wait for them, print what to export: eval it"
    )
    begin.add_argument(
        "nodes",
        nargs="*",
        default=[{}],
        type=resources,
        metavar="NAME=AMOUNT[,...]",
        help="custom resources of each node, the head first; '-' is a node without any",
    )
    begin.add_argument("--cpus", type=int, default=2, help="that each node says it has")
    begin.add_argument("--store-mb", type=int, default=500, help="object store of each node")
    commands.add_parser("stop", help="end the nodes and all that runs on them")
    return parser.parse_args()


def resources(text: str) -> dict[str, float]:
    """`play=1,serve=2` as a dictionary."""
    if text == "-":
        return {}
    pairs = [pair.partition("=")[::2] for pair in text.split(",")]
    try:
        return {name: float(amount) for name, amount in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: write NAME=AMOUNT, as play=1,serve=1") from None


def start(folder: Path, arguments: argparse.Namespace) -> dict[str, str]:
    """Start every node and wait until the cluster has them; variables that lead to it."""
    folder.mkdir(parents=True, exist_ok=True)
    token = os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32)
    sign = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    gcs, dashboard = free_port(), free_port()
    started: list[subprocess.Popen[Any]] = []
    for number, has in enumerate(arguments.nodes):
        line = [*RAY, "start", "--block", f"--num-cpus={arguments.cpus}"]
        line += [f"--object-store-memory={arguments.store_mb << 20}"]
        line += [f"--resources={json.dumps(has)}", "--disable-usage-stats"]
        line += ["--dashboard-agent-listen-port=0"]  # one that is free when the agent binds it
        if number:
            line += [f"--address=127.0.0.1:{gcs}", f"--node-ip-address={address_of(number)}"]
        else:
            line += ["--head", f"--port={gcs}", f"--temp-dir={folder}"]
            line += ["--include-dashboard=true", "--dashboard-host=127.0.0.1"]
            line += [f"--dashboard-port={dashboard}"]
        start_node(line, number, sign, started, folder)
    url = f"http://127.0.0.1:{dashboard}"
    wait(lambda: count(url, token) == len(started), started, folder)
    return {"RAY_ADDRESS": url, **sign, "RAYRL_WORKDIR": str(Path.cwd())}


def start_node(
    line: list[str],
    number: int,
    sign: dict[str, str],
    started: list[subprocess.Popen[Any]],
    folder: Path,
) -> None:
    """Start one and add it; again if it ends, because Ray gives a raylet 30 s to be there."""
    for attempt in range(ATTEMPTS):
        with log_of(folder, number).open("wb") as log:
            node = subprocess.Popen(
                line,
                env=environment(sign),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        alive = {one.pid: psutil.Process(one.pid).create_time() for one in [*started, node]}
        (folder / PIDS).write_text(json.dumps(alive))
        try:
            wait(lambda: "Ray runtime started" in said(folder, number), [*started, node], folder)
        except RuntimeError:
            if attempt + 1 == ATTEMPTS or node.poll() is None:
                raise
        else:
            started.append(node)
            return


def stop(folder: Path) -> int:
    """End the nodes of a cluster and all that runs on them; the exit status."""
    nodes = nodes_of(folder)
    family = [one for node in nodes for one in [*node.children(recursive=True), node]]
    for process in nodes:
        process.terminate()
    psutil.wait_procs(nodes, STOP_S)
    _, left = psutil.wait_procs(family, LINGER_S)
    for process in left:
        process.kill()
    (folder / PIDS).unlink(missing_ok=True)
    print(f"{len(nodes)} nodes ended", file=sys.stderr)
    return 0


def nodes_of(folder: Path) -> list[psutil.Process]:
    """The `ray start` of each node that lives, the head last: the others need it to leave."""
    file = folder / PIDS
    found = []
    for pid, began in (json.loads(file.read_text()) if file.is_file() else {}).items():
        try:
            node = psutil.Process(int(pid))
        except psutil.NoSuchProcess:
            continue
        if abs(node.create_time() - began) < 1:  # else its number is another process's by now
            found.append(node)
    return found[::-1]


def environment(sign: dict[str, str]) -> dict[str, str]:
    """Of the nodes: `python` in a job is this Python, which need not be on the PATH here."""
    here = Path(sys.executable).parent
    mine = {
        **os.environ,
        **sign,
        "PATH": f"{here}{os.pathsep}{os.environ.get('PATH', '')}",
        "RAY_worker_niceness": "0",
    }
    mine.pop("RAY_ADDRESS", None)
    return mine


def address_of(number: int) -> str:
    """Of a node but the head, which has the machine's own.

    On Linux all of 127.0.0.0/8 leads to this machine, elsewhere only 127.0.0.1.
    """
    return f"127.0.0.{number + 1 if sys.platform == 'linux' else 1}"


def wait(there: Callable[[], bool], nodes: list[subprocess.Popen[Any]], folder: Path) -> None:
    """Until something is there; an error with the end of a node's log if one ends before."""
    end = time.monotonic() + START_S
    while not there():
        for number, node in enumerate(nodes):
            if node.poll() is not None:
                raise RuntimeError(f"node {number + 1} ended:\n{said(folder, number)[-2000:]}")
        if time.monotonic() > end:
            raise RuntimeError(f"not there within {START_S:.0f} s; see {folder}/node*.log")
        time.sleep(0.5)


def count(url: str, token: str) -> int:
    """Nodes that are ready: alive, and their agent answers, which submits jobs.

    0 while the head's dashboard does not answer.
    """

    def ask(path: str) -> Any:
        headers = {"Authorization": f"Bearer {token}"}
        request = urllib.request.Request(f"{url}/{path}", headers=headers)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    try:
        raylets = [row.get("raylet", {}) for row in ask("nodes?view=summary")["data"]["summary"]]
        alive = [one["nodeId"] for one in raylets if one.get("state") == "ALIVE"]
        return sum(ask(f"api/v0/logs?node_id={node}")["result"] for node in alive)
    except (OSError, KeyError, ValueError):
        return 0


def log_of(folder: Path, number: int) -> Path:
    """The file that a node's `ray start` writes to."""
    return folder / f"node{number + 1}.log"


def said(folder: Path, number: int) -> str:
    """What it has written."""
    return log_of(folder, number).read_text(errors="replace")


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
