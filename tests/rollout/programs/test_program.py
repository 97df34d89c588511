"""Running programs: their output, their failures, and that nothing of them is left."""

from __future__ import annotations

import asyncio
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

import rayrl
from rayrl import Agent, Endpoint, EnvError, ScriptedPlayer, Task
from rayrl.rollout.programs import program as module

AT = Endpoint("http://127.0.0.1:9/v1", "sk-x")


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


async def test_it_has_the_endpoint_and_its_input() -> None:
    code = "import os, sys; print(os.environ['OPENAI_API_KEY'], os.environ['A'], sys.stdin.read())"
    done = await rayrl.program(python(code), AT, stdin="é" * 100_000, env={"A": "b"})
    assert done.stdout == f"sk-x b {'é' * 100_000}\n"
    assert (done.stderr, done.code) == ("", 0)
    assert AT.variables["ANTHROPIC_BASE_URL"] == "http://127.0.0.1:9"


async def test_it_need_not_read() -> None:
    done = await rayrl.program(python("print('x')"), AT, stdin="y" * 10_000_000)
    assert done.stdout == "x\n"


@pytest.mark.parametrize(
    ("code", "what"),
    [
        ("raise SystemExit('the reason')", "ended with status 1: the reason"),
        ("import os; os.abort()", "ended with status -6"),
        ("import time; time.sleep(600)", "did not end within 1 s"),
    ],
)
async def test_failures(code: str, what: str) -> None:
    with pytest.raises(EnvError, match=what):
        await rayrl.program(python(code), AT, timeout_s=1 if "sleep" in code else None)
    if "sleep" not in code:
        assert (await rayrl.program(python(code), AT, check=False)).code in (1, -6)


async def test_the_end_of_one_leaves_others_of_the_episode_alone(tmp_path: Path) -> None:
    up, go = tmp_path / "up", tmp_path / "go"
    waits = f"touch {up}; until [ -e {go} ]; do sleep 0.05; done; echo x"
    other = asyncio.create_task(rayrl.program(["sh", "-c", waits], AT))
    while not up.exists():  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    await rayrl.program(python("pass"), AT)
    go.touch()
    assert (await other).stdout == "x\n"


@pytest.mark.parametrize("command", ["python agent.py", []])
async def test_a_command_is_a_list(command: Any) -> None:
    with pytest.raises(EnvError, match="pass a list"):
        await rayrl.program(command, AT)


async def test_it_runs_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "here").write_text("#!/bin/sh\npwd\n")
    (tmp_path / "here").chmod(0o755)
    done = await rayrl.program(["./here"], AT, cwd=tmp_path)
    assert done.stdout == f"{tmp_path}\n"


async def test_one_that_does_not_exist() -> None:
    with pytest.raises(EnvError, match="'no-such' cannot be started"):
        await rayrl.program(["no-such"], AT)


async def test_output_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_OUTPUT", 1000)
    done = await rayrl.program(python("print('x' * 5_000_000)"), AT)
    assert done.stdout == "x" * 1000


def assert_gone(pids: Path) -> None:
    """Nothing is left of these, but perhaps zombies that somebody else has to reap."""
    for pid in map(int, pids.read_text().split()):
        with suppress(psutil.NoSuchProcess):
            while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.01)


FAMILY = """
import os, subprocess, sys, time
for own in (False, True):
    words = [sys.executable, "-c", "import time; time.sleep(600)"]
    child = subprocess.Popen(words, start_new_session=own)
    print(child.pid, file=open(sys.argv[1], "a"), flush=True)
{then}
"""


@pytest.mark.parametrize("end", ["deadline", "cancelled", "timeout"])
async def test_everything_it_started_is_killed_with_it(end: str, tmp_path: Path) -> None:
    pids = tmp_path / "pids"

    @rayrl.env(tasks=[Task()], rewards={"n": 1.0})
    async def starts(task: Task, agent: Agent) -> rayrl.Scores:
        async with agent.endpoint() as at:
            words = [*python(FAMILY.format(then="time.sleep(600)")), str(pids)]
            await rayrl.program(words, at, timeout_s=3 if end == "timeout" else None)
        return {"n": 1.0}

    player = ScriptedPlayer(lambda messages, rng: "ok")
    playing = asyncio.create_task(
        rayrl.play_episode(
            starts, Task(), {"agent": player}, id="e", deadline_s=3 if end == "deadline" else None
        )
    )
    while not pids.exists() or pids.read_text().count("\n") < 2:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    if end == "cancelled":
        playing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await playing
    else:
        failure = (await playing).failure
        assert failure is not None
        assert failure.kind == "env"
        assert "did not end within 3 s" in failure.message
    assert_gone(pids)


async def test_one_that_leaves_a_child_with_its_output_ends(tmp_path: Path) -> None:
    words = [*python(FAMILY.format(then="print('done')")), str(tmp_path / "pids")]
    done = await rayrl.program(words, AT)
    assert done.stdout == "done\n"
    assert_gone(tmp_path / "pids")
