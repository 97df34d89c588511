"""Programs that are forked from a process which has imported their libraries, and their starts."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from asyncio.base_subprocess import BaseSubprocessTransport
from collections.abc import Sequence
from pathlib import Path

import pytest

import rayrl
from rayrl import Agent, Endpoint, EnvError, ScriptedPlayer, Task
from rayrl.rollout.programs import preload
from rayrl.rollout.programs import program as module
from rayrl.rollout.programs.process import Process
from tests.rollout.programs.test_program import assert_gone

AT = Endpoint("http://127.0.0.1:9/v1", "sk-x")
SCRIPT = """
import dataclasses, json, multiprocessing, os, pickle, sys
import beside
@dataclasses.dataclass
class Point:
    x: int = 1
print(json.dumps([__name__, sys.argv, sys.path[0], os.getcwd(), sys.stdin.read(),
    os.environ["OPENAI_API_KEY"], os.environ.get("MORE"), beside.VALUE, Point().x,
    __name__ in sys.modules, os.getpgrp() == os.getpid(), len(os.listdir("/proc/self/fd"))]))
print("to stderr", file=sys.stderr)
"""
ENDS = {
    "exit": "raise SystemExit(3)",
    "reason": "raise SystemExit('the reason')",
    "error": "print(sys.stdin.read()); raise ValueError('wrong')",
    "abort": "os.abort()",
    "killed": "os.kill(os.getpid(), 9)",
    "terminated": "os.kill(os.getpid(), 15)",
    "thread": "threading.Timer(0.1, print, 'a').start()",
    "at exit": "atexit.register(print, 'b')",
    "at once": "os._exit(4)",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "agent.py").write_text(SCRIPT)
    (tmp_path / "beside.py").write_text("VALUE = 5\n")
    return tmp_path


@pytest.mark.parametrize("kind", ["script", "module", "code"])
async def test_it_sees_what_it_would_see_without(kind: str, folder: Path) -> None:
    words = {
        "script": [str(folder / "agent.py")],
        "module": ["-m", "agent"],
        "code": ["-c", SCRIPT],
    }
    seen = [
        await rayrl.program(
            [sys.executable, *words[kind], "--a", "é"],
            AT,
            stdin="said " * 50_000,
            env={"MORE": "é"},
            cwd=folder,
            preload=modules,
        )
        for modules in ((), ("decimal",))
    ]
    assert seen[0] == seen[1]
    assert seen[0].stdout.startswith('["__main__", ')


@pytest.mark.parametrize("end", ENDS)
async def test_it_ends_as_it_would_without(end: str) -> None:
    code = f"import atexit, os, sys, threading; sys.stdin.read(); {ENDS[end]}"
    found = []
    for modules in ((), ("decimal",)):
        done = await rayrl.program(
            [sys.executable, "-c", code], AT, check=False, stdin="x", preload=modules
        )
        found.append((done.code, done.stdout, done.stderr.splitlines()[-1:]))
    assert found[0] == found[1]


async def test_modules_are_imported_once(folder: Path) -> None:
    (folder / "beside.py").write_text(f"open({str(folder / 'log')!r}, 'a').write('x')\nVALUE = 5\n")
    command = [sys.executable, "agent.py"]
    runs = [rayrl.program(command, AT, cwd=folder, preload=["beside"]) for _ in range(20)]
    assert len({done.stdout for done in await asyncio.gather(*runs)}) == 1
    assert (folder / "log").read_text() == "x"


async def test_one_that_cannot_be_imported_is_the_programs_error(
    capfd: pytest.CaptureFixture[str],
) -> None:
    command = [sys.executable, "-c", "import no_such"]
    done = await rayrl.program(command, AT, check=False, preload=["no_such", "decimal"])
    assert done.code == 1
    assert "No module named 'no_such'" in done.stderr
    assert "preload: no_such: ModuleNotFoundError" in capfd.readouterr().err


@pytest.mark.parametrize(
    "command", [["sh", "-c", "true"], [sys.executable, "-u", "a.py"], [sys.executable]]
)
async def test_only_python_programs(command: Sequence[str]) -> None:
    with pytest.raises(EnvError, match="only Python programs can be preloaded"):
        await rayrl.program(command, AT, preload=["json"])


async def test_a_server_that_is_killed_takes_its_programs_and_is_replaced(tmp_path: Path) -> None:
    up = tmp_path / "up"
    code = f"import time; print(open({str(up)!r}, 'w').close(), flush=True); time.sleep(600)"
    command = [sys.executable, "-c", code]
    modules = ["decimal", "fractions"]  # nobody else's
    running = asyncio.create_task(rayrl.program(command, AT, check=False, preload=modules))
    while not up.exists():  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    (server,) = (one for key, one in preload._servers.items() if [*key[2:]] == modules)
    server._process.kill()
    assert (await running).code == -signal.SIGKILL
    server._process.wait()
    done = await rayrl.program([sys.executable, "-c", "print('x')"], AT, preload=modules)
    assert done.stdout == "x\n"


@pytest.mark.parametrize("preloads", [[], ["decimal"]])
def test_it_ends_with_the_process_that_runs_it(preloads: list[str], tmp_path: Path) -> None:
    program = f"""
        import os, subprocess, sys, time
        words = ["sleep", "600"]
        child = subprocess.Popen(words, start_new_session=True)
        print(os.getpid(), os.getppid(), file=open({str(tmp_path / "pids")!r}, "w"), flush=True)
        time.sleep(600)
    """
    code = f"""
        import asyncio, sys, rayrl
        command = [sys.executable, "-c", {textwrap.dedent(program)!r}]
        at = rayrl.Endpoint("http://127.0.0.1:9/v1", "sk-y")
        asyncio.run(rayrl.program(command, at, preload={preloads}))
    """
    runs = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
    pids = tmp_path / "pids"
    while not pids.exists() or not pids.read_text():
        time.sleep(0.01)
    runs.kill()
    runs.wait()
    assert_gone(pids)


@pytest.mark.parametrize("when", ["it runs", "it starts"])
@pytest.mark.parametrize("preloads", [(), ("decimal",)])
async def test_everything_it_started_is_killed_with_it(
    preloads: Sequence[str], when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids = tmp_path / "pids"
    code = f"""
import os, subprocess, time
children = [subprocess.Popen(["sleep", "600"], start_new_session=own).pid for own in (False, True)]
if not (forked := os.fork()):
    os.setsid()
    time.sleep(600)
print(os.getpid(), *children, forked, file=open({str(pids)!r}, "w"), flush=True)
time.sleep(600)
"""

    async def cancel() -> None:
        while not pids.exists() or not pids.read_text().endswith("\n"):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        running.cancel()

    connect = BaseSubprocessTransport._connect_pipes  # type: ignore[attr-defined]

    async def connect_late(transport: object, waiter: object) -> None:
        """An event loop that does something else meanwhile, as one with much work does."""
        await cancel()
        await connect(transport, waiter)

    if when == "it starts":
        monkeypatch.setattr(BaseSubprocessTransport, "_connect_pipes", connect_late)
    running = asyncio.create_task(rayrl.program([sys.executable, "-c", code], AT, preload=preloads))
    if when == "it runs":
        await cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert_gone(pids)


ASKS = """
import json, os, sys, time, urllib.request
def ask():
    body = {"model": "policy", "messages": [{"role": "user", "content": "a"}]}
    request = urllib.request.Request(os.environ["OPENAI_BASE_URL"] + "/chat/completions",
        json.dumps(body).encode(), {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"]})
    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request).read()
open(sys.argv[1], "w").close()
while not os.path.exists(sys.argv[2]):
    time.sleep(0.01)
if sys.argv[3] == "asks":
    ask()
    while not os.path.exists(sys.argv[4]):
        time.sleep(0.01)
"""


@pytest.mark.parametrize("then", ["asks", "ends", "takes long"])
async def test_a_program_starts_when_the_one_before_has_asked_ended_or_takes_long(
    then: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(module, "START_S", 0.2 if then == "takes long" else 1000.0)
    started: list[Process] = []
    start = module.start_process

    async def counted(*given: object, **more: object) -> Process:
        started.append(await start(*given, **more))  # type: ignore[arg-type]
        return started[-1]

    monkeypatch.setattr(module, "start_process", counted)
    up, go, end = (tmp_path / name for name in ("up", "go", "end"))

    @rayrl.env(tasks=[Task()], rewards={"n": 1.0})
    async def runs(task: Task, agent: Agent) -> rayrl.Scores:
        words = [sys.executable, "-c", ASKS, str(up), str(go), then, str(end)]
        async with agent.endpoint() as at:
            first = asyncio.create_task(rayrl.program(words, at))
            while not up.exists():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            second = asyncio.create_task(rayrl.program([sys.executable, "-c", "print('x')"], at))
            if then != "takes long":
                await asyncio.sleep(0.1)
                assert len(started) == 1
                go.touch()
            assert (await second).stdout == "x\n"
            assert first.done() == (then == "ends")
            go.touch()
            end.touch()
            await first
        return {"n": 1.0}

    player = ScriptedPlayer(lambda messages, rng: "ok")
    episode = await rayrl.play_episode(runs, Task(), {"agent": player}, id="e")
    assert episode.failure is None, episode.failure
