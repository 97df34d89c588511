"""Connection to Ray for the duration of a program: an existing cluster or a small local one."""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import signal
import stat
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import ray
from ray import serve
from ray._common.network_utils import build_address, get_localhost_ip, is_localhost
from ray._common.tls_utils import add_port_to_grpc_server
from ray._private import auto_init_hook, parameter, ray_constants, services
from ray._private.node import Node
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray._private.services import start_ray_process
from ray._private.utils import detect_fate_sharing_support
from ray.exceptions import AuthenticationError
from ray.serve.context import _get_global_client
from ray.serve.schema import LoggingConfig

from rayrl.cluster import cluster_address, fork_worker
from rayrl.cluster.actors import import_variables
from rayrl.cluster.code_bundle import forwarded_variables, write_bundle
from rayrl.cluster.fork_server import VARIABLE, ForkServer
from rayrl.cluster.watchdog import check_head, watch_cluster
from rayrl.cluster.weight_sync.weight_store import NAMESPACE
from rayrl.config import ClusterConfig
from rayrl.errors import ConfigError, InfraError

__all__ = [
    "SERVE_LOGGING",
    "HttpAddress",
    "Session",
    "listen_on_loopback",
    "open_session",
    "run_name",
]

START_ATTEMPTS = 5  # a raylet ends itself if its agents take 15 s to import on a busy machine
QUIET: dict[str, Any] = {"logging_level": logging.ERROR, "namespace": NAMESPACE}
SERVE_LOGGING = LoggingConfig(log_level="WARNING", enable_access_log=False)


@dataclass(frozen=True, slots=True)
class HttpAddress:
    """Address on which Serve listens."""

    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Session:
    """A connection to Ray.

    Attributes:
        name: prefix of everything this program creates; runs on one cluster have different names.
        local: whether the cluster belongs to this program and ends with it.
    """

    name: str
    local: bool


def run_name(directory: str | None = None) -> str:
    """Return the name of a program's actors and Serve app.

    A run folder always gets the same name, so that a resumed run replaces what a killed one left on
    a long-lived cluster. Without a folder every name is new.
    """
    key = str(Path(directory).resolve()) if directory else uuid.uuid4().hex
    return f"rayrl-{hashlib.blake2b(key.encode(), digest_size=5).hexdigest()}"


def listen_on_loopback() -> None:
    """On a single-machine Ray, make the Serve replica of this process listen on loopback only.

    Call it while the replica is initialized. By default Serve accepts pickled calls on every
    interface from anyone, and has no setting for that.
    """
    if is_localhost(ray.util.get_node_ip_address()):
        from ray.serve._private import replica as serving

        serving.add_port_to_grpc_server = lambda server, address: add_port_to_grpc_server(
            server, build_address(get_localhost_ip(), 0)
        )


class _Connection:
    """This process's connection to Ray; the last of the sessions that use it ends it.

    Args:
        opened: what is to end with it.
    """

    def __init__(self, opened: ExitStack) -> None:
        self._opened, self._sessions = opened, 0

    def __enter__(self) -> None:
        self._sessions += 1

    def __exit__(self, *error: object) -> None:
        global _connection
        with _connecting:
            self._sessions -= 1
            if not self._sessions:
                _connection = None if _connection is self else _connection
                self._opened.close()


_connecting = threading.Lock()
_connection: _Connection | None = None  # None: whoever runs this program has connected it


@contextmanager
def open_session(
    cluster: ClusterConfig,
    directory: str | None = None,
    envs: Sequence[str] = (),
    *,
    http: HttpAddress | None = None,
    imports: Sequence[str] = (),
) -> Iterator[Session]:
    """Join or start Ray and Serve; on exit stop only what was started here.

    Args:
        cluster: `address` is the cluster to join. If it is empty, join the cluster that this
            process runs in (RAY_ADDRESS, as `ray job submit` sets it), or start a local one.
        directory: the run's folder, if the program has one.
        envs: environments (as `env.name`), and players from outside them, that are to play. A
            driver that joins a cluster without being one of its jobs sends their code and rayrl's
            to the nodes.
        http: address for Serve; None: a Serve started here does not listen.
        imports: modules that the workers of a local Ray are forked with, see `fork_server.py`.

    Raises:
        InfraError: the cluster cannot be reached.
        ConfigError: Serve cannot listen on `http`, or the code is too large to send.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    global _connection
    with ExitStack() as stack:
        local = False
        with _connecting:
            if not ray.is_initialized():
                with ExitStack() as opened:
                    if address := cluster_address(cluster.address):
                        _join(address, envs)
                    else:
                        opened.enter_context(_start(cluster, imports))
                        local = True
                    opened.callback(_disconnect)
                    opened.enter_context(watch_cluster(directory))
                    _connection = _Connection(opened.pop_all())
            if _connection is not None:
                stack.enter_context(_connection)
        if _start_serve(http) and not local:
            stack.callback(_stop_serve_if_unused)
        yield Session(run_name(directory), local)


def _disconnect() -> None:
    """Disconnect from Ray, without the errors that pending calls would log.

    Whoever calls Ray from now on, as a thread of Serve's may do once more, gets an error: by
    default Ray would start another cluster, whose end ends this process.
    """
    auto_init_hook.enable_auto_connect = False
    log = logging.getLogger("ray")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        ray.shutdown()
    finally:
        log.setLevel(level)


def _join(address: str, envs: Sequence[str]) -> None:
    """Connect to a cluster that is there."""
    try:
        check_head(address)
        with _runtime_env(envs) as runtime_env, _keep_sigterm_handler():
            ray.init(address=address, runtime_env=runtime_env, **QUIET)
    except (AuthenticationError, ConnectionError, RuntimeError, ValueError) as error:
        raise InfraError(_explain_refusal(address, error)) from error


def _start(cluster: ClusterConfig, imports: Sequence[str]) -> ExitStack:
    """Start a local Ray and connect to it; returns what is to end after it."""
    # Ray gives its workers niceness 15: next to other computation they would starve.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # it would warn that authentication is on, as is the default
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    _set_token()
    folder = os.environ.get("RAY_TMPDIR") or private_folder()
    for attempt in range(START_ATTEMPTS):
        with ExitStack() as started:
            server = None
            if imports and sys.platform == "linux":
                server = ForkServer(Path(folder), imports, import_variables(threads=1))
                started.callback(server.stop)
            try:
                with _private_ray(server), _keep_sigterm_handler():
                    ray.init(
                        address="local",
                        num_cpus=os.cpu_count(),
                        include_dashboard=False,
                        object_store_memory=int(cluster.object_store_gb * 2**30),
                        _temp_dir=folder,
                        **QUIET,
                    )
            except Exception as error:
                ray.shutdown()
                if attempt + 1 == START_ATTEMPTS:
                    raise InfraError(f"a local Ray could not be started: {error}") from error
            else:
                return started.pop_all()
    raise AssertionError("unreachable")


@contextmanager
def _private_ray(fork_server: ForkServer | None) -> Iterator[None]:
    """Make a Ray started in the block private to this machine and program, and small.

    Its processes listen on loopback instead of on all interfaces, where some serve metrics to
    anyone. Each is in a process group of its own, so that a signal to the driver's group
    (`timeout`, a supervisor) reaches only the driver, which ends them in order. Where Ray needs the
    shared group to end them with the driver, they stay in it.

    It has no autoscaler, as there are no nodes to add, and no process for a dashboard that nobody
    looks at: `ray.init` would wait a second for the latter, and each imports Ray. Nor does it
    import here what its agents need (ray[default], which rayrl requires) to see if it is there.

    Args:
        fork_server: forks its Python processes; None: each imports Ray by itself.
    """
    grouped = partial(services.ConsolePopen, process_group=0)
    with ExitStack() as stack:
        stack.enter_context(patch.object(ray_constants, "ENABLE_RAY_CLUSTER", False))
        complete = patch.object(ray._private.utils, "get_dashboard_dependency_error", lambda: None)
        stack.enter_context(complete)
        stack.enter_context(patch.object(Node, "start_monitor", lambda node: None))
        stack.enter_context(patch.object(Node, "start_api_server", lambda node, **kwargs: None))
        if detect_fate_sharing_support():
            stack.enter_context(patch.object(services, "ConsolePopen", grouped))
        if fork_server is not None:
            params = partial(parameter.RayParams, setup_worker_path=fork_worker.__file__)
            stack.enter_context(patch.object(parameter, "RayParams", params))
            agent = [
                sys.executable,
                fork_worker.__file__,
                f"{fork_worker.AGENT}{fork_server.agents_path}",
            ]
            command = "_build_python_executable_command_memory_profileable"
            stack.enter_context(patch.object(services, command, lambda *args: agent))
            start = partial(_start_ray_process, agent)
            stack.enter_context(patch.object(services, "start_ray_process", start))
            os.environ[VARIABLE] = str(fork_server.path)
            stack.callback(os.environ.pop, VARIABLE)
        yield


def _start_ray_process(
    agent: Sequence[str], command: Sequence[str], process_type: str, **kwargs: Any
) -> Any:
    """Start a process of Ray's node, the log monitor with `agent` in place of Python."""
    if process_type == ray_constants.PROCESS_TYPE_LOG_MONITOR:
        _python, _unbuffered, *arguments = command
        command = [*agent, *arguments]
    return start_ray_process(command, process_type, **kwargs)


@contextmanager
def _keep_sigterm_handler() -> Iterator[None]:
    """Keep the program's own SIGTERM handler, if it has one.

    `ray.init` replaces it with its own, and with a native one that prints a stack trace and aborts.
    """
    handler = signal.getsignal(signal.SIGTERM)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return
    with patch.object(ray._private.utils, "set_sigterm_handler", lambda handler: None):
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, handler)


def private_folder() -> str:
    """Create the folder of a local Ray's sockets and logs, accessible only to this user.

    Ray's own default is writable by everyone. The path is short: socket paths are limited to 107
    bytes, of which Ray needs 70.

    Raises:
        InfraError: the folder belongs to another user.
    """
    folder = Path(tempfile.gettempdir()) / f"rayrl-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise InfraError(
            f"{folder} is not a folder of this user, so Ray's sockets are not safe there; remove "
            "it, or set RAY_TMPDIR to a folder of your own."
        )
    folder.chmod(0o700)
    return str(folder / "ray")


@contextmanager
def _runtime_env(envs: Sequence[str]) -> Iterator[dict[str, Any] | None]:
    """Yield the `runtime_env` of a driver that joins a cluster; None for a job, which has one."""
    if RAY_JOB_CONFIG_JSON_ENV_VAR in os.environ:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="rayrl-code-") as folder:
        write_bundle(Path(folder), envs)
        yield {"working_dir": folder, "env_vars": forwarded_variables(os.environ)}


def _explain_refusal(address: str, error: Exception) -> str:
    if isinstance(error, AuthenticationError) or "InvalidAuthToken" in str(error.__cause__):
        mode = os.environ.get("RAY_AUTH_MODE", "")
        return (
            f"the Ray cluster at {address!r} asks for a token, and RAY_AUTH_MODE={mode} with the "
            "token here did not satisfy it. Copy ~/.ray/auth_token from the machine where `ray "
            "start --head` ran, or set RAY_AUTH_TOKEN, and export RAY_AUTH_MODE=token."
        )
    if "Version mismatch" in str(error):
        return (
            f"the Ray cluster at {address!r} and this program must have the same Ray and the same "
            f"Python.\n{error}\nUse them here as well; or submit the program as a job, which runs "
            "with what the cluster has (jobs/submit)."
        )
    return (
        f"no Ray cluster answers at {address!r} ({error}). Start one with `ray start --head`, or, "
        "for a local one that ends with this program, `unset RAY_ADDRESS` and leave "
        "cluster.address empty."
    )


def _set_token() -> None:
    """Set a token for the lifetime of a local Ray.

    Ray itself would write one to ~/.ray/auth_token, which every later `ray start` then requires.
    """
    if not any(os.environ.get(f"RAY_AUTH_{name}") for name in ("MODE", "TOKEN", "TOKEN_PATH")):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _start_serve(http: HttpAddress | None) -> bool:
    """Start Serve unless it is running; return whether it was started."""
    with suppress(ValueError):
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
        if http is not None:
            _check_listens(http)
        return False
    if http is None:
        serve.start(proxy_location="Disabled", logging_config=SERVE_LOGGING)
    else:
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": http.host, "port": http.port},
            logging_config=SERVE_LOGGING,
        )
    return True


def _check_listens(http: HttpAddress) -> None:
    """Check that a running Serve listens on `http`: its address cannot change while it runs."""
    running = _get_global_client().http_config
    if running.location in (None, "Disabled") or (running.host, running.port) != (
        http.host,
        http.port,
    ):
        raise ConfigError(
            f"serve.host={http.host} serve.port={http.port}: Serve runs on this cluster already, "
            f"at {running.host}:{running.port} ({running.location}). Use that address, or stop it "
            "with `serve shutdown`."
        )


def _stop_serve_if_unused() -> None:
    with suppress(Exception):  # the cluster may already be gone
        if not serve.status().applications:
            serve.shutdown()
