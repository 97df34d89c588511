"""Programs in a sandbox: results, files, many at once, cancellation, what the machine lacks."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

import rayrl
from rayrl import EnvError, Protection, Sandbox
from rayrl.rollout.sandbox import box as box_module
from rayrl.rollout.sandbox import protection
from rayrl.rollout.sandbox.inside.seccomp import filter_for
from rayrl.rollout.sandbox.protection import Isolation
from tests.rollout.sandbox.conftest import Kind

KINDS = ("namespaces", "bubblewrap", "limits")
Choose = Callable[[Kind], Isolation]


@pytest.fixture(params=KINDS)
def isolation(request: pytest.FixtureRequest, hold_with: Choose) -> Isolation:
    return hold_with(request.param)


@pytest.fixture
def full(hold_with: Choose) -> None:
    hold_with("namespaces")


def python(code: str, *arguments: str) -> list[str]:
    return ["python3", "-c", code, *arguments]


async def test_it_has_its_files_its_input_and_its_folder(isolation: Isolation) -> None:
    code = "import os, sys, tempfile\nprint(sys.stdin.read(), os.environ['A'], os.listdir('deep'))"
    code += "\nopen(os.path.expanduser('~/made'), 'w').write(open('deep/er/é').read())"
    code += "\nprint('later', file=sys.stderr); tempfile.TemporaryFile().write(b'x'); sys.exit(3)"
    files = {"main.py": code, "deep/er/é": "ü", "data": b"\0\xff"}
    async with Sandbox(files=files, isolation=isolation) as box:
        done = await box.run(["python3", "main.py"], stdin="é" * 100_000, env={"A": "b"})
        assert (done.ended, done.code, done.ok) == ("exit", 3, False)
        assert done.stdout == "é" * 100_000 + " b ['er']\n"
        assert done.stderr == "later\n"
        assert await box.read("made") == "ü".encode()
        assert await box.read("data") == b"\0\xff"
        await box.write({"data": "new", "deep/er/é": "", "deep/other": "x"})
        listing = await box.run(["find", ".", "-type", "f"], cwd="deep")
        assert sorted(listing.stdout.split()) == ["./er/é", "./other"]
        assert (await box.run(["cat", "data"])).stdout == "new"


async def test_variables_are_few_and_the_same_everywhere(
    isolation: Isolation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LD_PRELOAD_X", "1")
    got = [await rayrl.sandbox(["env"], isolation=isolation) for _ in range(2)]
    names = {line.partition("=")[0] for line in got[0].stdout.split()}
    assert names - {"TMPDIR", "RAYRL_PROGRAM"} == {*box_module._VARIABLES, "PATH", "HOME"}
    order = [
        (await rayrl.sandbox(python("print(set('abcdefgh'))"), isolation=isolation)).stdout
        for _ in range(2)
    ]
    assert order[0] == order[1]


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        (["no-such-program"], 127, "no-such-program: No such file or directory"),
        (["./main"], 126, "./main: Permission denied"),
        (["/"], 126, "/: Permission denied"),
        (["false"], 1, ""),
        (["sh", "-c", "kill -SEGV $$"], -11, ""),
        (["sh", "-c", "exit 255"], 255, ""),
    ],
)
async def test_how_a_program_ends(
    command: list[str], code: int, said: str, isolation: Isolation
) -> None:
    done = await rayrl.sandbox(command, files={"main": "x"}, isolation=isolation)
    assert (done.ended, done.code) == ("exit", code)
    assert said in done.stderr


async def test_64_at_once_and_their_bad_siblings_harm_none(full: None) -> None:
    bad = [
        rayrl.sandbox(python(code), timeout_s=1, memory_mb=64, processes=8)
        for code in (
            "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass",
            "while True: print('x' * 9999)",
            "import os\nos.fork()\nx = [b'x' * 2**20 for _ in range(50)]\nwhile True: pass",
            "import os\nwhile True: os.kill(-1, 9)",
        )
    ]
    good = [
        rayrl.sandbox(python("print(6 * int(input()))"), stdin=str(k), timeout_s=300)
        for k in range(60)
    ]
    done = await asyncio.gather(*bad, *good)
    assert all(not one.ok for one in done[:4])
    assert [one.stdout for one in done[4:]] == [f"{6 * k}\n" for k in range(60)]


def left_over(mark: str) -> list[int]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if mark in (process.info["cmdline"] or ()):
            found.append(process.pid)
    return found


async def test_cancelling_kills_all_of_it(isolation: Isolation, tmp_path: Path) -> None:
    mark = f"{60_000 + os.getpid()}.{KINDS.index('limits')}"
    code = f"setsid sleep {mark} & (env -i setsid sleep {mark} &) ; sleep {mark}"
    running = asyncio.create_task(
        rayrl.sandbox(["bash", "-c", code], isolation=isolation, timeout_s=600)
    )
    while len(left_over(mark)) < 3:  # noqa: ASYNC110 - they are other processes
        await asyncio.sleep(0.01)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert left_over(mark) == []


DIES = """
import asyncio, os, signal, sys, rayrl
async def main():
    async with rayrl.Sandbox() as box:
        code = f"sleep {sys.argv[1]} & setsid sleep {sys.argv[1]} & echo > started; wait"
        run = asyncio.create_task(box.run(["sh", "-c", code], timeout_s=600))
        await asyncio.sleep(0)
        print("ready", flush=True)
        await run
asyncio.run(main())
"""


async def test_nothing_outlives_a_worker_that_is_killed(full: None) -> None:
    mark = f"{61_000 + os.getpid()}.0"
    worker = await asyncio.create_subprocess_exec(
        sys.executable, "-c", DIES, mark, stdout=asyncio.subprocess.PIPE
    )
    assert worker.stdout is not None
    assert await worker.stdout.readline() == b"ready\n"
    while len(left_over(mark)) < 2:  # noqa: ASYNC110 - they are other processes
        await asyncio.sleep(0.01)
    worker.kill()
    await worker.wait()
    while left_over(mark):  # noqa: ASYNC110 - the kernel ends them soon
        await asyncio.sleep(0.01)


async def test_what_cannot_be_entered_is_removed(hold_with: Choose) -> None:
    isolation = hold_with("limits")
    async with Sandbox(isolation=isolation) as box:
        made = await box.run(["sh", "-c", "mkdir -p a/b; touch a/b/c; ln -s / out; chmod 0 a/b a"])
        assert made.ok
        work = box._work
    assert work is not None
    assert not os.access(work, os.F_OK)


async def test_cancelled_while_it_starts(full: None) -> None:
    def running() -> dict[int, list[str]]:
        found = {}
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if child.status() != psutil.STATUS_ZOMBIE:  # one that is to be waited for
                    found[child.pid] = child.cmdline()
        return found

    before = running()
    for steps in range(0, 40, 4):
        starting = asyncio.create_task(rayrl.sandbox(["sleep", "600"], timeout_s=600))
        for _ in range(steps):
            await asyncio.sleep(0)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
    for _ in range(400):
        left = {pid: command for pid, command in running().items() if pid not in before}
        if not left:
            break
        await asyncio.sleep(0.05)
    assert not left


async def test_a_killed_sandbox_says_so(isolation: Isolation) -> None:
    """As when the kernel kills it for memory."""
    async with Sandbox(isolation=isolation) as box:
        running = asyncio.create_task(box.run(["sleep", "600"], timeout_s=600))
        await asyncio.sleep(0)
        assert box._supervisor is not None
        box._supervisor.transport.kill()
        done = await running
        assert (done.ended, done.code, done.ok) == ("killed", None, False)
        assert (await box.run(["true"])).ended == "killed"
        with pytest.raises(EnvError, match="cannot write a: it was killed"):
            await box.write({"a": ""})
        with pytest.raises(EnvError, match="cannot read a: it was killed"):
            await box.read("a")


async def test_one_after_the_other(full: None) -> None:
    async with Sandbox() as box:
        runs = [box.run(["sh", "-c", f"echo {k} >> order; cat order"]) for k in range(4)]
        last = (await asyncio.gather(*runs))[-1]
        assert last.stdout.split() == list("0123")
    with pytest.raises(EnvError, match="not open: use it inside `async with`"):
        await box.run(["true"])


async def test_further_folders_are_read_only(full: None, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("here")
    os.chmod(tmp_path, 0o755)
    program = ["sh", "-c", f"cat {tmp_path}/data; echo x > {tmp_path}/data; ls {tmp_path.parent}"]
    done = await rayrl.sandbox(program, readable=[tmp_path])
    assert done.stdout == f"here{tmp_path.name}\n"
    assert "Read-only file system" in done.stderr


async def test_a_network_of_its_own(full: None) -> None:
    """Where two of its programs may talk, of whom another sandbox sees nothing."""
    code = """
import socket, threading
server = socket.create_server(('127.0.0.1', 47_111))
threading.Thread(target=lambda: server.accept()[0].sendall(b'hello'), daemon=True).start()
with socket.create_connection(('127.0.0.1', 47_111)) as one:
    print(one.recv(9))"""
    done = await asyncio.gather(*[rayrl.sandbox(python(code)) for _ in range(2)])
    assert [one.stdout for one in done] == ["b'hello'\n"] * 2


async def test_the_network_if_it_is_wanted(full: None) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello")
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        code = (
            "import socket, sys\nprint(socket.create_connection(('127.0.0.1', int(sys.argv[1]))))"
        )
        assert (await rayrl.sandbox(python(code, str(port)), network=True)).ok


async def test_threads_subprocesses_and_pools_work(full: None) -> None:
    code = """
import concurrent.futures as c, multiprocessing, os, subprocess, threading
if __name__ == '__main__':
    with c.ThreadPoolExecutor(4) as pool: print(sum(pool.map(len, ['a', 'bc'])))
    with multiprocessing.Pool(2) as pool: print(pool.map(len, ['a', 'bc']))
    print(subprocess.run(['echo', 'x'], capture_output=True).stdout, os.cpu_count() > 0)"""
    done = await rayrl.sandbox(["python", "main.py"], files={"main.py": code})
    assert done.stdout == "3\n[1, 2]\nb'x\\n' True\n", done


async def test_packages_of_this_python_are_there(full: None) -> None:
    done = await rayrl.sandbox(python("import numpy, sys; print(numpy.ones(3).sum())"))
    assert done.stdout == "3.0\n", done
    assert (await rayrl.sandbox([sys.executable, "-c", "print(1)"])).stdout == "1\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"command": "ls -la"}, "pass a list"),
        ({"command": []}, "pass a list"),
        ({"command": ["a\0b"]}, "null character"),
        ({"command": ["\ud800"]}, "lone surrogate"),
        ({"timeout_s": 0}, "timeout_s=0: more than 0"),
        ({"timeout_s": float("nan")}, "timeout_s=nan"),
        ({"output_kb": 0}, "output_kb=0: at least 1"),
        ({"memory_mb": 1}, "memory_mb=1: at least 16"),
        ({"processes": 0}, "processes=0: at least 1"),
        ({"disk_mb": 0}, "disk_mb=0: at least 1"),
        ({"readable": ["/no/such"]}, "readable='/no/such': an absolute path that exists"),
        ({"readable": ["."]}, "readable='.': an absolute path"),
        ({"readable": ["/"]}, "not /"),
        ({"files": {"a": "x" * (2 << 20)}, "disk_mb": 1}, "more than disk_mb=1"),
        ({"isolation": "ful"}, "isolation='ful': one of full, best, limits. Did you mean 'full'"),
        ({"isolation": "docker"}, "one of full, best, limits"),
    ],
    ids=str,
)
async def test_wrong_arguments_are_named(options: dict[str, Any], message: str, full: None) -> None:
    with pytest.raises(EnvError, match=message.replace(".", r"\.")):
        await rayrl.sandbox(**{"command": ["true"], **options})


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        (
            "kernel/apparmor_restrict_unprivileged_userns",
            "1\n",
            "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0",
        ),
        ("kernel/unprivileged_userns_clone", "0\n", "kernel.unprivileged_userns_clone=1"),
        ("user/max_user_namespaces", "0\n", "sysctl -w user.max_user_namespaces=10000"),
        ("user/max_user_namespaces", "99\n", "allow user namespaces (Linux 5.14 or newer)"),
    ],
)
async def test_what_the_machine_lacks_is_said(
    name: str, value: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(kind: Kind) -> Protection:
        if kind == "limits":
            return Protection("limits", ("files",))
        raise EnvError("unshare: Operation not permitted")

    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_text(value)
    monkeypatch.setattr(protection, "_PROC", tmp_path)
    monkeypatch.setattr(protection, "_IN_DOCKER", tmp_path / "none")
    monkeypatch.setattr(protection, "_try", refuse)
    monkeypatch.setattr(protection.shutil, "which", lambda _: None)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr(protection, "_full", protection._full.__wrapped__)
    monkeypatch.setattr(protection, "_limits", protection._limits.__wrapped__)
    with pytest.raises(EnvError) as raised:
        await rayrl.sandbox(["true"])
    assert "namespaces: unshare: Operation not permitted; bubblewrap is not" in str(raised.value)
    assert remedy in str(raised.value)
    assert 'isolation="limits"' in str(raised.value)
    for accepted in ("best", "limits"):
        assert rayrl.sandbox_protection(accepted).kind == "limits"  # type: ignore[arg-type]


def test_what_protects_is_told(hold_with: Choose) -> None:
    hold_with("namespaces")
    assert rayrl.sandbox_protection() == Protection("namespaces", ())
    assert rayrl.sandbox_protection("best") == Protection("namespaces", ())
    hold_with("limits")
    alone = rayrl.sandbox_protection("limits")
    assert alone.kind == "limits"
    assert [line for line in alone.missing if "network" in line]


def test_filters_are_programs_that_end() -> None:
    """Each jump leads forward to an instruction that there is; the last ones return."""
    for machine in ("x86_64", "aarch64"):
        code = filter_for(machine)
        words = [code[at : at + 8] for at in range(0, len(code), 8)]
        for at, word in enumerate(words):
            kind, then, otherwise = int.from_bytes(word[:2], sys.byteorder), word[2], word[3]
            if kind & 7 == 5:
                assert at + 1 + max(then, otherwise) < len(words)
        assert int.from_bytes(words[-1][:2], sys.byteorder) == 6
    assert filter_for("riscv64") == b""
