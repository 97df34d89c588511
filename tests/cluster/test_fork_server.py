"""A local Ray's workers are forked from one process; what they get is what they would have had."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from rayrl.cluster import fork_worker
from rayrl.cluster.actors import import_variables
from rayrl.cluster.fork_server import AGENT_SERVER, VARIABLE, WARM, ForkServer
from rayrl.cluster.open import worker_imports
from rayrl.config.load import from_dict

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers are not forked")

# stands for Ray's default_worker.py
WORKER = """
import json, os, random, sys
import numpy
found = dict(
    pid=os.getpid(),
    argv=sys.argv[1:],
    name=__name__,
    path=sys.path[:1],
    folder=os.getcwd(),
    variable=os.environ.get("MINE"),
    theirs=os.environ.get("OMP_NUM_THREADS"),
    group=os.getpgrp(),
    threads=len(os.listdir("/proc/self/task")),
    fractions="fractions" in sys.modules,
    random=[random.random(), float(numpy.random.random())],
    parent=os.getppid(),
    raylet=int(os.environ["RAY_RAYLET_PID"]),
    agents="ray.dashboard.modules.reporter.reporter_agent" in sys.modules,
)
print(json.dumps(found), flush=True)
sys.stdin.read()
"""


class Raylet:
    """Starts workers as Ray's does; its own process only has to be there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "default_worker.py").write_text(WORKER)
        (folder / "setup_worker.py").write_text("print('as Ray does', flush=True)")
        self.process = subprocess.Popen(["sleep", "infinity"])
        self.started: list[subprocess.Popen[str]] = []

    def start(self, server: Path, *arguments: str) -> str:
        """Start a worker; returns the first line that it prints."""
        setup = ["--language=PYTHON", "--serialized-runtime-env-context={}"]
        return self._line(server, [str(self.folder / "default_worker.py"), *setup, *arguments])

    def start_agent(self, server: ForkServer) -> dict[str, Any]:
        """Start an agent; returns what it says of itself."""
        (self.folder / "agent.py").write_text(WORKER)
        where = f"{fork_worker.AGENT}{server.agents_path}"
        line = self._line(server.path, [where, str(self.folder / "agent.py"), "--n=1"])
        return json.loads(line)  # type: ignore[no-any-return]

    def _line(self, server: Path, command: list[str]) -> str:
        variables = {VARIABLE: str(server), "RAY_RAYLET_PID": str(self.process.pid), "MINE": "yes"}
        env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
        started = subprocess.Popen(
            [sys.executable, fork_worker.__file__, *command],
            env=env | variables,
            cwd=self.folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            process_group=0,
        )
        self.started.append(started)
        assert started.stdout is not None
        return started.stdout.readline()

    def stop(self) -> None:
        for one in [self.process, *self.started]:
            one.kill()
            one.communicate()


@pytest.fixture
def raylet(tmp_path: Path) -> Iterator[Raylet]:
    made = Raylet(tmp_path)
    yield made
    made.stop()


@pytest.fixture(autouse=True)
def without_a_warm_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the test run."""
    monkeypatch.delenv(WARM, raising=False)


def start(folder: Path, modules: Sequence[str]) -> ForkServer:
    made = ForkServer(folder, modules, import_variables(threads=1))
    while not made.path.exists():
        assert made._process.poll() is None
    if WARM not in os.environ:
        while [child.name() for child in children(made._process.pid)] != [AGENT_SERVER]:
            assert made._process.poll() is None
    return made


def children(server: int) -> list[psutil.Process]:
    return psutil.Process(server).children()


@pytest.fixture(params=["started", "forked"])
def warm(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ForkServer | None]:
    """What the server is forked from, if it has no Python of its own."""
    if request.param == "started":
        yield None
        return
    made = start(tmp_path / "w", ["numpy"])
    monkeypatch.setenv(WARM, str(made.path))
    yield made
    psutil.wait_procs(forked_from(made._process.pid), timeout=600)
    assert not forked_from(made._process.pid)
    made.stop()


@pytest.fixture
def server(tmp_path: Path, warm: ForkServer | None) -> Iterator[ForkServer]:
    made = start(tmp_path / "s", ["numpy", "fractions"])
    if warm is not None:
        assert len(forked_from(warm._process.pid)) == 1
    yield made
    made.stop()
    assert not made.path.exists()
    assert not made.agents_path.exists()


def forked_from(server: int) -> list[psutil.Process]:
    return [child for child in children(server) if child.name() != AGENT_SERVER]


def test_a_forked_worker_has_what_the_raylet_gave_it(raylet: Raylet, server: ForkServer) -> None:
    found = [json.loads(raylet.start(server.path, f"--n={n}")) for n in range(2)]
    for n, (worker, client) in enumerate(zip(found, raylet.started, strict=True)):
        assert worker["argv"] == [f"--n={n}"]
        assert worker["name"] == "__main__"
        assert worker["path"] == [worker["folder"]] == [str(raylet.folder)]
        assert (worker["variable"], worker["theirs"]) == ("yes", None)
        assert worker["group"] == client.pid  # which Ray ends as a whole
        assert worker["pid"] != client.pid
        assert worker["fractions"]
        assert worker["threads"] == 1
    first, second = (worker["random"] for worker in found)
    assert first[0] != second[0]
    assert first[1] != second[1]
    assert os.stat(server.path).st_mode & 0o077 == 0


@pytest.mark.parametrize("who", ["driver", "raylet"])
def test_the_server_ends_with_driver_and_raylet(
    raylet: Raylet, server: ForkServer, who: str
) -> None:
    raylet.start(server.path)
    if who == "raylet":
        raylet.process.send_signal(signal.SIGKILL)
        raylet.process.wait()
    else:
        assert server._process.stdin is not None
        server._process.stdin.close()
    assert server._process.wait(600) == 0
    assert not server.path.exists()


@pytest.mark.parametrize("warm", ["forked"], indirect=True)
def test_workers_end_with_a_server_that_was_forked(
    raylet: Raylet, server: ForkServer, warm: ForkServer
) -> None:
    """Ray in them would wait for the end of the one that has imported it."""
    worker = psutil.Process(json.loads(raylet.start(server.path))["pid"])
    server.stop()
    gone, _ = psutil.wait_procs([worker], timeout=600)
    assert gone == [worker]
    assert warm._process.poll() is None


def test_ray_finds_an_agent_in_its_client(raylet: Raylet, server: ForkServer) -> None:
    """Which ends with it; and an agent is the server's child, as it demands to be the raylet's."""
    found = raylet.start_agent(server)
    (client,) = raylet.started
    assert found["argv"] == ["--n=1"]
    assert (found["variable"], found["group"]) == ("yes", client.pid)
    assert found["agents"]
    assert found["raylet"] == found["parent"] != client.pid
    assert client.poll() is None
    psutil.Process(found["pid"]).kill()
    assert client.wait(600) == 1


def test_agents_end_with_the_server(raylet: Raylet, server: ForkServer) -> None:
    agent = psutil.Process(raylet.start_agent(server)["pid"])
    server.stop()
    gone, _ = psutil.wait_procs([agent], timeout=600)
    assert gone == [agent]
    assert raylet.started[0].wait(600) == 1


def test_agents_do_not_wait_for_what_workers_need(
    raylet: Raylet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray gives up an agent that has not come in 15 s."""
    os.mkfifo(tmp_path / "wanted")
    (tmp_path / "zz_slow.py").write_text(f"open({str(tmp_path / 'wanted')!r}).read()")
    monkeypatch.syspath_prepend(str(tmp_path))
    server = start(tmp_path / "s", ["zz_slow"])
    assert raylet.start_agent(server)["agents"]
    server.stop()


@pytest.mark.parametrize("warm", ["forked"], indirect=True)
@pytest.mark.parametrize("other", ["path", "HF_HOME", "PYTHONPATH", "limit"])
def test_a_warm_server_refuses_what_it_cannot_give(
    warm: ForkServer, other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other code, variables that imports read, or limits: that server imports by itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if other == "path":
        copy = tmp_path / "copy" / "rayrl" / "__init__.py"
        copy.parent.mkdir(parents=True)
        copy.touch()
        monkeypatch.syspath_prepend(str(tmp_path / "copy"))
    elif other != "limit":
        monkeypatch.setenv(other, str(tmp_path))
    else:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft - 1, hard))
    server = start(tmp_path / "s", ["numpy"])
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert forked_from(warm._process.pid) == []
    server.stop()


def test_a_warm_server_that_is_gone_is_not_needed(
    raylet: Raylet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(WARM, str(tmp_path / "gone"))
    server = start(tmp_path / "s", ["numpy", "fractions"])
    assert json.loads(raylet.start(server.path))["fractions"]
    server.stop()


def test_ended_workers_leave_no_zombies(
    raylet: Raylet, server: ForkServer, warm: ForkServer | None
) -> None:
    worker = psutil.Process(json.loads(raylet.start(server.path))["pid"])
    worker.kill()
    psutil.wait_procs([worker], timeout=600)
    pid = server._process.pid if warm is None else forked_from(warm._process.pid)[0].pid
    assert forked_from(pid) == []


@pytest.mark.parametrize(
    ("argument", "forked"),
    [
        ("--x=1", True),
        ('--serialized-runtime-env-context={"env_vars": {}, "command_prefix": []}', True),
        (f'--serialized-runtime-env-context={{"py_executable": "{sys.executable}"}}', True),
        ('--serialized-runtime-env-context={"py_executable": "/other/python"}', False),
        ('--serialized-runtime-env-context={"env_vars": {"LD_PRELOAD": "x.so"}}', False),
        ('--serialized-runtime-env-context={"command_prefix": ["podman", "run"]}', False),
    ],
)
def test_only_a_worker_without_a_runtime_env_is_forked(argument: str, forked: bool) -> None:
    assert fork_worker.is_plain(["default_worker.py", argument]) is forked


def test_without_the_server_ray_starts_its_worker(raylet: Raylet, tmp_path: Path) -> None:
    assert raylet.start(tmp_path / "nobody") == "as Ray does\n"


@pytest.mark.slow  # imports everything
@pytest.mark.parametrize("kind", ["deepspeed", "reference"])
def test_what_is_imported_can_be_forked(kind: str) -> None:
    """Only the thread that forks is in the forked process: a lock of another would stay locked.

    jemalloc's (of pyarrow) is made for that: it is begun anew.
    """
    settings = {"learner": {"kind": kind}, "cluster": {"fork_workers": True}}
    modules = worker_imports(from_dict(settings), engine=True, learner=True)
    code = (
        "import importlib, os, pathlib, sys\n"
        "from rayrl.cluster.fork_server import ids_apart_from_rays\n"
        "ids_apart_from_rays()\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        "import ray, torch\n"
        "names = [one.read_text() for one in pathlib.Path('/proc/self/task').glob('*/comm')]\n"
        "names = [name for name in names if 'jemalloc' not in name]\n"
        "print(len(names), torch.cuda.is_initialized(), flush=True)\n"
        "for _ in range(2):\n"
        "    if os.fork() == 0:\n"
        "        print(ray.ObjectID.from_random().hex(), flush=True)\n"
        "        os._exit(0)\n"
        "    os.wait()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *modules],
        env={**os.environ, **import_variables(threads=1)},
        capture_output=True,
        text=True,
        check=True,
    )
    *_, said, first, second = done.stdout.splitlines()
    assert said == "1 False"
    assert first != second  # or Ray would take two objects for one
