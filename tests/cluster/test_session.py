"""How Ray is reached and started: a stale address, private sockets, loopback, a signal."""

from __future__ import annotations

import contextlib
import http.server
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray._private import auto_init_hook
from ray.exceptions import RaySystemError

from rayrl.cluster import session, watchdog
from rayrl.cluster.fork_server import AGENT_SERVER, WARM
from rayrl.config import ClusterConfig, from_dict
from rayrl.errors import InfraError
from tests.cluster.test_proxies import USUAL, behind
from tests.runs import ENVS, command, rows, until


@contextlib.contextmanager
def closed() -> Iterator[int]:
    """A port where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("", 0))
        yield taken.getsockname()[1]


@contextlib.contextmanager
def silent() -> Iterator[int]:
    """A port that accepts and never says anything."""
    with socket.socket() as listening:
        listening.bind(("", 0))
        listening.listen()
        yield listening.getsockname()[1]


@contextlib.contextmanager
def web() -> Iterator[int]:
    """A port of something that is not Ray."""

    class Quiet(http.server.BaseHTTPRequestHandler):
        def log_message(self, *words: object) -> None:
            """Nothing."""

    with http.server.ThreadingHTTPServer(("", 0), Quiet) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("kind", [closed, silent, web])
@pytest.mark.parametrize("variable", [False, True], ids=["cluster.address", "RAY_ADDRESS"])
def test_an_address_where_no_ray_is_is_refused_in_time(
    kind: object, variable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "REACH_S", 0.5)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def reached(*words: object, **more: object) -> None:
        raise AssertionError("ray.init waits much longer")

    monkeypatch.setattr(session.ray, "init", reached)
    with kind() as port:  # type: ignore[operator]
        address = f"127.0.0.1:{port}"
        if variable:
            monkeypatch.setenv("RAY_ADDRESS", address)
        cluster = from_dict({"cluster": {"address": "" if variable else address}}).cluster
        opening = session.open_session(cluster)
        with pytest.raises(InfraError, match="no Ray cluster answers at") as caught, opening:
            pass
    assert address in str(caught.value)
    assert "ray start --head" in str(caught.value)
    assert "unset RAY_ADDRESS" in str(caught.value)


def test_after_a_session_nothing_starts_another_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def start() -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(auto_init_hook, "enable_auto_connect", True)  # and afterwards as before
    monkeypatch.setattr(session.ray, "init", start)
    assert not session.ray.is_initialized()
    with pytest.raises(AssertionError, match="Ray was started"):
        session.ray.get_actor("anyone")
    session._disconnect()
    with pytest.raises(RaySystemError, match="Ray has not been started yet"):
        session.ray.get_actor("anyone")


def test_no_wait_is_longer_than_half_a_minute() -> None:
    assert watchdog.REACH_S <= 30


def test_a_head_that_comes_back_is_waited_for_and_one_that_does_not_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, seconds in (("CHECK_EVERY_S", 0.01), ("MARGIN_S", 60.0), ("MIN_PATIENCE_S", 0.3)):
        monkeypatch.setattr(watchdog, name, seconds)
    answers = iter([True, False, True, False])  # and so on, after its first silence

    def end(status: int) -> None:
        over.set()
        raise SystemExit(status)

    monkeypatch.setattr(watchdog, "_answers", lambda connect: connect())
    monkeypatch.setattr(watchdog, "_connect_unix", lambda path: True)
    monkeypatch.setattr(watchdog.socket, "create_connection", lambda *_: next(answers, False))
    monkeypatch.setattr(watchdog.os, "_exit", end)
    over = threading.Event()
    with pytest.raises(SystemExit, match="1"):
        watchdog._watch("10.0.0.9:6379", "socket", "runs/a", over)
    said = capsys.readouterr().err
    assert said.count("The Ray head at 10.0.0.9:6379 does not answer; waiting 0.3 s") == 2
    assert said.count("answers again") == 1
    assert "did not answer for 0.3 s. Start the cluster again, and run the same command" in said


def test_a_child_of_fork_is_left_alone_by_grpc() -> None:
    """In a program that has opened Ray before, the next Ray's processes begin as such children."""
    code = """
import os, time, rayrl.cluster, grpc
try:
    grpc.channel_ready_future(grpc.insecure_channel("localhost:1")).result(0.5)
except grpc.FutureTimeoutError:
    pass
child = os.fork()
if not child:
    time.sleep(0.3)
    os._exit(len(os.listdir("/proc/self/task")))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "1\n"


def test_ray_has_a_private_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session.tempfile, "gettempdir", lambda: str(tmp_path))
    old = os.umask(0)
    try:
        folder = Path(session.private_folder())
    finally:
        os.umask(old)
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    folder.parent.chmod(0o755)
    assert session.private_folder() == str(folder)
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    folder.parent.rmdir()
    folder.parent.symlink_to(tmp_path)  # by somebody else, who waits for us to use it
    with pytest.raises(InfraError, match="is not a folder of this user"):
        session.private_folder()


def test_its_path_is_short_enough_for_a_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session.tempfile, "gettempdir", lambda: "/tmp")
    longest = "session_2026-11-26_15-14-13_143116_4194304/sockets/plasma_store"
    assert len(f"{session.private_folder()}/{longest}") < 107


def test_a_cluster_that_wants_a_token_is_not_said_to_be_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        why = "GCS: Unauthenticated: RPC error: InvalidAuthToken: Authentication token is missing"
        raise ConnectionError("Failed to connect to Ray cluster at here") from RuntimeError(why)

    def away(**_: object) -> None:
        raise ConnectionError("Failed to connect to Ray cluster at here")

    def differ(**_: object) -> None:
        raise RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.0.0\n")

    cluster = from_dict({"cluster": {"address": "here:1"}}).cluster
    for init, said in (
        (refuse, "asks for a token.*RAY_AUTH_MODE=token"),
        (away, "no Ray cluster"),
        (differ, r"(?s)must have the same Ray.*Ray: 2\.0\.0.*jobs/submit"),
    ):
        monkeypatch.setattr(session, "check_head", lambda _: None)
        monkeypatch.setattr(session.ray, "init", init)
        with pytest.raises(InfraError, match=said), session.open_session(cluster):
            pass


def test_who_joins_a_cluster_sends_the_code_and_a_job_has_it_already(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[set[str] | None] = []

    def init(runtime_env: dict[str, Any] | None, **_: object) -> None:
        folder = runtime_env and Path(runtime_env["working_dir"])
        sent.append({one.name for one in folder.iterdir()} if folder else None)
        raise ConnectionError("enough")

    monkeypatch.setattr(session, "check_head", lambda _: None)
    monkeypatch.setattr(session.ray, "init", init)
    cluster = from_dict({"cluster": {"address": "here:1"}}).cluster
    for job in (False, True):
        if job:
            monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
        with pytest.raises(InfraError), session.open_session(cluster, envs=[str(ENVS)]):
            pass
    outside, inside = sent
    assert outside is not None
    assert outside >= {"rayrl", "conf", "rayrl_copyword", "env_files"}
    assert inside is None


@pytest.mark.parametrize(("there", "mode"), [(True, "token"), (False, "None")])
def test_a_token_that_is_there_is_sent(tmp_path: Path, there: bool, mode: str) -> None:
    if there:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("0" * 32)
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", "import os, rayrl.cluster; print(os.environ.get('RAY_AUTH_MODE'))"],
        env={**env, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == mode


@pytest.mark.slow  # a whole run with real processes: their sockets, files and end are what counts
def test_a_local_run_behind_a_proxy_is_for_this_machine_only_and_ends_in_order(
    tiny: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    # without a warm server: the run's processes are its children
    env = {k: v for k, v in os.environ.items() if k != WARM and not k.startswith("RAY_")}
    line = command(tiny, folder, "train.steps=1000", "learner.kind=deepspeed")
    said = tmp_path / "said"
    with closed() as proxy, said.open("w") as out:
        env |= behind(f"http://127.0.0.1:{proxy}", USUAL)
        run = subprocess.Popen(line, env=env, stdout=out, stderr=out, start_new_session=True)
        try:
            until(lambda: rows(folder) > 1, run)
            processes = [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]
            wide, folders = set(), set()
            for process in processes:
                with contextlib.suppress(psutil.Error):
                    for one in process.net_connections("inet"):
                        ip = one.laddr.ip.removeprefix("::ffff:")
                        if one.status == psutil.CONN_LISTEN and ip not in ("127.0.0.1", "::1"):
                            wide.add(f"{process.name()} {one.laddr}")
                    for other in process.net_connections("unix"):
                        if "plasma_store" in other.laddr:
                            folders.add(other.laddr.partition("/session_")[0])
            assert not wide
            assert folders == {session.private_folder()}
            parents = {p.name(): p.parent() for p in processes if p.name().endswith("Agent")}
            assert parents.keys() == {"ray::DashboardAgent", "ray::RuntimeEnvAgent"}
            assert {p and p.name() for p in parents.values()} == {AGENT_SERVER}
            lines = [p.cmdline() for p in processes]
            assert [line[:2] for line in lines if "-u" in line] == [], "Ray's own way to start them"
            before = len(said.read_text())
            os.killpg(run.pid, signal.SIGTERM)  # as `timeout` does
            assert run.wait(600) == 143
            text = said.read_text()[before:]
            last = f"rayrl: stopped by SIGTERM; the same command resumes from {folder}"
            assert text.splitlines()[-1] == last
            assert "SIGTERM received" not in text
            assert "Traceback" not in text
            _, alive = psutil.wait_procs(processes, timeout=600)
            assert not alive
        finally:
            run.kill()


def test_the_last_session_of_a_process_ends_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    running = [0]

    @contextmanager
    def start(*args: object) -> Iterator[None]:
        running[0] += 1
        yield
        running[0] -= 1

    monkeypatch.setattr(session, "_start", start)
    monkeypatch.setattr(session, "_disconnect", lambda: None)
    monkeypatch.setattr(session, "_start_serve", lambda http: False)
    monkeypatch.setattr(session, "watch_cluster", lambda directory: nullcontext())
    monkeypatch.setattr(session.ray, "is_initialized", lambda: running[0] > 0)
    first, second = (ExitStack() for _ in range(2))
    for _ in range(2):
        assert first.enter_context(session.open_session(ClusterConfig())).local
        assert not second.enter_context(session.open_session(ClusterConfig())).local
        first.close()
        assert running == [1], "the second still needs it"
        second.close()
        assert running == [0]
