"""Attempts to get out of a sandbox, or to take more than it gives; each is a program.

A program prints "out" if it succeeds, so that one that cannot fail is noticed: those marked so
succeed outside of a sandbox.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import NamedTuple

import pytest

import rayrl
from rayrl import Sandbox, SandboxResult
from rayrl.rollout.sandbox.protection import Isolation
from tests.rollout.sandbox.conftest import Kind

START = """
import ctypes, errno, json, mmap, os, pathlib, resource, signal, socket, sys, threading, time
at = json.loads(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
def reached(attempt, *arguments):
    try:
        return attempt(*arguments) is not False
    except (OSError, ValueError):
        return False
def called(name, *arguments):
    return getattr(libc, name)(*arguments) != -1
def connected(family, address):
    with socket.socket(family) as one:
        one.settimeout(10)
        one.connect(address)
def say(*got):
    print("out" if any(got) else "held")
"""

# name: program; and whether it gets out where there is no sandbox
ATTEMPTS = {
    "secret file": ("say(reached(open, at['secret']), reached(os.listdir, at['home']))", True),
    "environment": ("say('hunter2' in str(os.environ))", True),
    "environment of others": (
        """
texts = []
for pid in filter(str.isdigit, os.listdir('/proc')):
    reached(lambda: texts.append(pathlib.Path(f'/proc/{pid}/environ').read_bytes()))
say(b'hunter2' in b''.join(texts))""",
        True,
    ),
    "other processes": ("say(os.path.exists(f'/proc/{at[\"pid\"]}/stat') and at['pid'] > 9)", True),
    "TCP": ("say(reached(connected, socket.AF_INET, ('127.0.0.1', at['port'])))", True),
    "TCP to all": ("say(reached(connected, socket.AF_INET, ('0.0.0.0', at['port'])))", True),
    "unix socket": ("say(reached(connected, socket.AF_UNIX, at['socket']))", True),
    "abstract socket": ("say(reached(connected, socket.AF_UNIX, chr(0) + at['abstract']))", True),
    "network": (
        """
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
    say(reached(one.connect, ('192.0.2.1', 9)))""",
        False,
    ),
    "virtual machine's host": ("say(reached(socket.socket, 40, socket.SOCK_STREAM))", False),
    "packet socket": ("say(reached(socket.socket, 17, socket.SOCK_RAW))", False),
    "signal to the parent": (
        "say(reached(os.kill, at['pid'], 0) and at['pid'] > 9)",
        True,
    ),
    "trace": (
        "say(called('ptrace', 16, 1, 0, 0), called('ptrace', 16, os.getppid(), 0, 0))",
        False,
    ),
    "memory of the supervisor": (
        "say(*[reached(open, f'/proc/{os.getppid()}/{n}', 'rb') for n in ('mem', 'environ')])",
        True,
    ),
    "files of the supervisor": ("say(reached(os.listdir, f'/proc/{os.getppid()}/fd'))", True),
    "open files": ("say(len(os.listdir('/proc/self/fd')) > 4)", False),
    "writing outside": (
        """
places = ['/', '/usr', '/etc', '/bin', '/dev', '/proc', '/proc/sys', '/root', '/home',
          os.path.dirname(sys.executable), os.path.dirname(os.__file__), at['here']]
say(*[reached(pathlib.Path(one, 'rayrl-was-here').touch) for one in places])""",
        False,
    ),
    "kernel settings": (
        (
            "say(reached(open, '/proc/sys/kernel/core_pattern', 'w'),"
            " reached(open, '/proc/sysrq-trigger', 'w'))"
        ),
        False,
    ),
    "rewriting the interpreter": (
        "say(reached(os.chmod, sys.executable, 0o777), reached(os.remove, os.__file__))",
        False,
    ),
    "becoming root": (
        "say(reached(os.setuid, 0), reached(os.setgid, 0), reached(os.setgroups, [0]))",
        False,
    ),
    "set-user-id": (
        """
import subprocess
done = subprocess.run(['su', '-c', 'id -u'], capture_output=True, text=True, input='')
say(done.stdout.strip() == '0')""",
        False,
    ),
    "namespaces of its own": (
        "say(*[called('unshare', flag) for flag in (0x10000000, 0x20000, 0x40000000)])",
        False,
    ),
    "clone into a namespace": (
        """
pid = libc.syscall(56 if os.uname().machine == 'x86_64' else 220, 0x10000000 | 17, 0, 0, 0, 0)
if pid == 0:
    os._exit(0)
say(pid > 0)""",
        False,
    ),
    "mount": (
        (
            "say(called('mount', b'x', b'/tmp', b'tmpfs', 0, None), called('umount2', b'/proc', 2),"
            " called('chroot', b'/tmp'))"
        ),
        False,
    ),
    "joining namespaces": (
        (
            "say(*[called('setns', os.open(f'/proc/1/ns/{n}', 0), 0) for n in ('net', 'mnt')"
            " if reached(os.open, f'/proc/1/ns/{n}', 0)])"
        ),
        False,
    ),
    "keys, bpf, io_uring": (
        """
numbers = {'x86_64': (250, 321, 425, 323, 298), 'aarch64': (219, 280, 425, 282, 241)}
buffer = ctypes.create_string_buffer(256)
say(*[libc.syscall(n, 0, buffer, 0, 0, 0) != -1 for n in numbers[os.uname().machine]])""",
        False,
    ),
    "memory without a process": (
        (
            "say(reached(os.memfd_create, 'x'), called('shmget', 0, 4096, 0o1600),"
            " called('msgget', 0, 0o1600), called('semget', 0, 1, 0o1600))"
        ),
        False,
    ),
    "higher limits": (
        """
def unlimited(kind):
    most = resource.RLIM_INFINITY
    resource.setrlimit(kind, (most, most))
names = ('RLIMIT_DATA', 'RLIMIT_NPROC', 'RLIMIT_FSIZE', 'RLIMIT_NOFILE', 'RLIMIT_STACK')
say(*[reached(unlimited, getattr(resource, name)) for name in names])""",
        False,
    ),
    "higher priority": ("say(reached(os.nice, -5))", False),
    "terminal": ("say(reached(open, '/dev/tty'))", False),
    "devices": (
        (
            "say(*[reached(open, f'/dev/{n}', 'rb') for n in ('mem', 'kmsg', 'vda', 'sda')],"
            " reached(os.mknod, 'disk', 0o60600, os.makedev(8, 0)))"
        ),
        False,
    ),
    "host's settings": ("say(reached(socket.sethostname, 'x'))", False),
    "a huge name": ("say(reached(open, 'x' * 300, 'w'), reached(open, 'x/' * 5000, 'w'))", False),
}
# these hold with limits alone, too
LIMITED = (
    *("environment", "trace", "open files", "becoming root", "set-user-id", "mount"),
    *("namespaces of its own", "clone into a namespace", "joining namespaces", "higher limits"),
    *("keys, bpf, io_uring", "memory without a process", "virtual machine's host", "a huge name"),
)


class Outside(NamedTuple):
    """What there is to be reached, and how to choose what holds."""

    at: str
    hold_with: Callable[[Kind], Isolation]

    def command(self, program: str) -> list[str]:
        return ["python3", "-c", START + program, self.at]


@pytest.fixture
async def outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hold_with: Callable[[Kind], Isolation]
) -> AsyncIterator[Outside]:
    monkeypatch.setenv("API_KEY", "hunter2")
    secret = tmp_path / "home" / "secret"
    secret.parent.mkdir()
    secret.write_text("hunter2")
    reached = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reached.append(writer)
        writer.close()

    name = f"rayrl-{os.getpid()}"
    path = tempfile.mkdtemp() + "/socket"  # short, as a socket's path must be
    servers = [
        await asyncio.start_server(serve, "127.0.0.1", 0),
        await asyncio.start_unix_server(serve, path),
        await asyncio.start_unix_server(serve, f"\0{name}"),
    ]
    at = {
        "secret": str(secret),
        "home": str(secret.parent),
        "port": servers[0].sockets[0].getsockname()[1],
        "socket": path,
        "abstract": name,
        "pid": os.getpid(),
        "here": str(tmp_path),
    }
    yield Outside(json.dumps(at), hold_with)
    shutil.rmtree(os.path.dirname(path))
    for server in servers:
        server.close()
        await server.wait_closed()


@pytest.mark.parametrize("kind", ["namespaces", "bubblewrap", "limits"])
async def test_it_holds(kind: Kind, outside: Outside) -> None:
    async with Sandbox(isolation=outside.hold_with(kind)) as box:
        results = {
            name: await box.run(outside.command(program))
            for name, (program, _) in ATTEMPTS.items()
            if kind != "limits" or name in LIMITED
        }
    out = {name: got for name, got in results.items() if (got.code, got.stdout) != (0, "held\n")}
    assert out == {}


@pytest.mark.parametrize("name", [name for name, (_, outside) in ATTEMPTS.items() if outside])
async def test_without_a_sandbox_it_gets_out(name: str, outside: Outside) -> None:
    """So these attempts try what they say."""
    command = [sys.executable, *outside.command(ATTEMPTS[name][0])[1:]]
    said = await asyncio.to_thread(
        subprocess.run, command, stdout=subprocess.PIPE, text=True, timeout=60
    )
    assert said.stdout == "out\n"


def ends(*ways: str) -> Callable[[SandboxResult], bool]:
    return lambda result: result.ended in ways


# name: program, what must be true of its result, limits other than usual
EXCESSES: dict[str, tuple[str, Callable[[SandboxResult], bool], dict[str, float]]] = {
    "fork bomb": (
        "while True: reached(os.fork)",
        ends("timeout", "processes"),
        {"timeout_s": 0.5},
    ),
    "thread bomb": (
        """
while True:
    try: threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    except RuntimeError: os._exit(7)""",
        lambda result: result.code == 7 or result.ended == "processes",
        {},
    ),
    "memory bomb": (
        "kept = [bytearray(1 << 20) for _ in range(1000)]",
        # refused, or killed first: what it has and its interpreter count together
        lambda result: ends("memory")(result) or "MemoryError" in result.stderr,
        {},
    ),
    "memory of several": (
        """
os.fork(), os.fork()
kept = [b'x' * (1 << 20) for _ in range(60)]
time.sleep(60)""",
        ends("memory"),
        {},
    ),
    "shared memory": (
        """
kept = mmap.mmap(-1, 1 << 30)
for _ in range(1000): kept.write(b'x' * (1 << 20))""",
        ends("memory"),
        {},
    ),
    "sleeping": ("time.sleep(60)", ends("timeout"), {"timeout_s": 0.2}),
    "spinning": ("while True: pass", ends("timeout"), {"timeout_s": 0.2}),
    "deaf": (
        """
for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
    reached(signal.signal, number, signal.SIG_IGN)
time.sleep(60)""",
        ends("timeout"),
        {"timeout_s": 0.3},
    ),
    "stopped": ("os.kill(os.getpid(), signal.SIGSTOP)", ends("timeout"), {"timeout_s": 0.3}),
    "silent": ("os.close(1); os.close(2); time.sleep(60)", ends("timeout"), {"timeout_s": 0.3}),
    "closed streams": (
        "os.close(0); os.close(1); os.close(2); os._exit(3)",
        lambda result: result.code == 3,
        {},
    ),
    "endless output": (
        "while True: os.write(1, b'y' * 65536)",
        lambda result: result.ended == "output" and len(result.stdout) == 1024 << 10,
        {},
    ),
    "endless errors": (
        "while True: os.write(2, b'y' * 65536)",
        lambda result: result.ended == "output" and len(result.stderr) == 4 << 10,
        {"output_kb": 4},
    ),
    "last words": (
        "os.write(1, b'y' * 5000)",
        lambda result: result.ended == "output" and len(result.stdout) == 4 << 10,
        {"output_kb": 4},
    ),
    "binary output": (
        "os.write(1, bytes(range(256)))",
        lambda result: result.stdout.startswith("\0\1") and result.stdout.endswith("\ufffd"),
        {},
    ),
    "deep recursion": (
        "sys.setrecursionlimit(10 ** 9)\nf = lambda _: sorted([1], key=f)\nf(1)",
        lambda result: result.code not in (0, None) or result.ended == "memory",
        {},
    ),
    "one large file": (
        "say(reached(lambda: open('x', 'wb', 0).write(bytes(9 << 20)) == 9 << 20))",
        lambda result: result.stdout == "held\n",
        {},
    ),
    "a background process": (
        "os.fork() or time.sleep(60); print('done')",
        lambda result: result.code == 0 and result.stdout == "done\n" and result.seconds < 50,
        {"timeout_s": 60},
    ),
    "a daemon": (
        """
for _ in range(2):
    if os.fork(): os._exit(0)
    os.setsid()
os.execve('/bin/sleep', ['sleep', '60'], {})""",
        lambda result: result.code == 0 and result.seconds < 50,
        {"timeout_s": 60},
    ),
}


# whether there is no other process of this user, but perhaps the supervisor
ALONE = """
found = []
for pid in filter(str.isdigit, os.listdir('/proc')):
    reached(lambda: os.stat(f'/proc/{pid}').st_uid == os.getuid() and found.append(int(pid)))
print(sorted({os.getpid(), *found} - {os.getppid()}) == [os.getpid()])"""


@pytest.mark.parametrize("name", EXCESSES)
@pytest.mark.parametrize("kind", ["namespaces", "bubblewrap", "limits"])
async def test_it_is_limited_and_leaves_nothing(kind: Kind, name: str, outside: Outside) -> None:
    isolation = outside.hold_with(kind)
    program, expected, limits = EXCESSES[name]
    options = {"timeout_s": 60, "output_kb": 1024, **limits}
    async with Sandbox(memory_mb=128, disk_mb=8, processes=16, isolation=isolation) as box:
        result = await box.run(outside.command(program), **options)  # type: ignore[arg-type]
        assert expected(result), result
        alone = await box.run(outside.command(ALONE))
        assert alone.stdout == "True\n", alone


@pytest.mark.parametrize("kind", ["namespaces", "bubblewrap"])
@pytest.mark.parametrize("place", [".", "/tmp", "/dev/shm"])
async def test_the_disk_is_limited(kind: Kind, place: str, outside: Outside) -> None:
    """In many files, and in many empty ones; in memory, all of it."""
    outside.hold_with(kind)
    fill = f"""
os.chdir({place!r})
written = 0
try:
    for k in range(100):
        with open(f'large{{k}}', 'wb', 0) as file:
            while written < 99 << 20:
                written += file.write(bytes(1 << 18))
except OSError as error:
    print(error.errno == errno.ENOSPC or error.errno == errno.EFBIG, written <= 4 << 20)
"""
    empty = f"""
os.chdir({place!r})
try:
    for k in range(100_000): open(str(k), 'w').close()
except OSError as error:
    print(error.errno == errno.ENOSPC, k < 50_000)
"""
    async with Sandbox(disk_mb=4) as box:
        assert (await box.run(outside.command(fill))).stdout == "True True\n"
        if kind == "namespaces":
            assert (await box.run(outside.command(empty))).stdout == "True True\n"
        with (
            pytest.raises(rayrl.EnvError, match="cannot write b: No space left")
            if (place == "." or kind == "namespaces")
            else contextlib_null()
        ):
            await box.write({"b": bytes(4 << 20)})


def contextlib_null() -> object:
    import contextlib

    return contextlib.nullcontext()


KILL = """
child = os.fork() or time.sleep(60)
for pid, number in ((1, 9), (1, 19), (os.getppid(), 9), (-1, 9)):
    os.kill(pid, number)
if os.waitpid(child, 0)[1] == 9:
    print("the child is gone")"""


@pytest.mark.parametrize("kind", ["namespaces", "bubblewrap"])
async def test_who_kills_all_kills_its_own_only(kind: Kind, outside: Outside) -> None:
    outside.hold_with(kind)
    async with Sandbox() as box:
        assert (await box.run(outside.command(KILL))).stdout == "the child is gone\n"
        assert (await box.run(["echo", "here"])).stdout == "here\n"


async def test_with_limits_alone_the_supervisor_may_be_killed(
    outside: Outside,
) -> None:
    """It can where it is of the same user; then nothing is left of either."""
    isolation = outside.hold_with("limits")
    if os.geteuid() == 0:
        pytest.skip("root runs the tests, whose processes the code cannot kill")
    async with Sandbox(isolation=isolation) as box:
        kill = "os.kill(os.getppid(), 9); time.sleep(60)"
        result = await box.run(outside.command(kill))
        assert (result.ended, result.code) == ("killed", None)
        assert (await box.run(["true"])).ended == "killed"


LINKS = """
os.symlink(at['secret'], 'file')
os.symlink(at['home'], 'folder')
os.symlink('/etc/passwd', 'passwd')
os.mkfifo('pipe')
os.mkdir('directory')
open('large', 'w').truncate(1 << 21)
"""


@pytest.mark.parametrize("kind", ["namespaces", "bubblewrap", "limits"])
async def test_links_that_code_left_are_not_followed(
    kind: Kind, outside: Outside, tmp_path: Path
) -> None:
    isolation = outside.hold_with(kind)
    secret = tmp_path / "home" / "secret"
    secret.chmod(0o666)
    secret.parent.chmod(0o777)
    async with Sandbox(isolation=isolation) as box:
        assert (await box.run(outside.command(LINKS))).ok
        for name in ("file", "folder/secret", "passwd", "pipe", "directory", "large", "nothing"):
            with pytest.raises(rayrl.EnvError, match=f"cannot read {name}: "):
                await box.read(name)
        with pytest.raises(rayrl.EnvError, match="cannot write folder/new: "):
            await box.write({"folder/new": "x"})
        with pytest.raises(rayrl.EnvError, match="cannot write directory: "):
            await box.write({"directory": "x"})
        await box.write({"file": "mine", "pipe": "mine"})
        assert await box.read("file") == await box.read("pipe") == b"mine"
    assert secret.read_text() == "hunter2"
    assert [path.name for path in secret.parent.iterdir()] == ["secret"]


@pytest.mark.parametrize(
    "name",
    ["", "/etc/x", "..", "../x", "a/../../x", "a//b", "./a", "a/", "a\0b", "\ud800", "x" * 256],
    ids=lambda name: ascii(name[:20]),
)
async def test_names_that_lead_elsewhere_are_refused(name: str) -> None:
    with pytest.raises(rayrl.EnvError):
        await rayrl.sandbox(["true"], files={name: ""})


def test_sockets_families_are_numbers_of_linux() -> None:
    assert (socket.AF_VSOCK, socket.AF_PACKET) == (40, 17)
