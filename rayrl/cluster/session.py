"""Ray for as long as a program needs it: the cluster we are in, or a small local one."""

from __future__ import annotations

import gc
import hashlib
import logging
import os
import secrets
import signal
import stat
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
from ray._private import ray_constants, services
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray._private.utils import detect_fate_sharing_support
from ray.exceptions import AuthenticationError
from ray.serve.context import _get_global_client
from ray.serve.schema import LoggingConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayrl.cluster import cluster_address
from rayrl.cluster.code_bundle import stage, variables
from rayrl.cluster.watchdog import check_head, watch_cluster
from rayrl.cluster.weight_sync.weight_store import NAMESPACE
from rayrl.config import ClusterConfig
from rayrl.errors import ConfigError, InfraError

__all__ = [
    "SERVE_LOGGING",
    "HttpAt",
    "Session",
    "beside_driver",
    "listen_on_loopback",
    "open_session",
    "prepare_process",
    "run_name",
]

START_ATTEMPTS = 2
GC_EVERY = 50_000  # objects more than before
SERVE_LOGGING = LoggingConfig(log_level="WARNING", enable_access_log=False)


@dataclass(frozen=True, slots=True)
class HttpAt:
    """Where Serve listens."""

    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Session:
    """A connection to Ray.

    Attributes:
        name: prefix of everything this program creates; two runs on one cluster have two names.
        local: whether the cluster is ours and ends with us.
    """

    name: str
    local: bool


def run_name(directory: str | None = None) -> str:
    """A name for a program's actors and Serve app.

    A run folder always gets the same one, so that a resumed run replaces what a killed one left on
    a long-lived cluster. Without a folder it is a new one each time.
    """
    key = str(Path(directory).resolve()) if directory else uuid.uuid4().hex
    return f"rayrl-{hashlib.blake2b(key.encode(), digest_size=5).hexdigest()}"


def beside_driver() -> NodeAffinitySchedulingStrategy:
    """Where the driver's own small actors belong: the loss of another node must not be theirs."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)


def prepare_process(threads: int) -> None:
    """Prepare an actor's process for that many compute threads, before it imports torch.

    Idle OpenMP threads sleep instead of spinning: on a small machine the processes take turns. Set
    here and not in a `runtime_env`, for which Ray would start every process anew.

    Python looks for garbage less often: a quarter of the time that torch and transformers take to
    import, and with thousands of live episodes a tenth of the turns (benchmarks/many_live.py).
    """
    gc.set_threshold(GC_EVERY, 10, 10)
    os.environ.update(
        OMP_NUM_THREADS=str(threads),
        MKL_NUM_THREADS=str(threads),
        OMP_WAIT_POLICY="PASSIVE",
        TOKENIZERS_PARALLELISM="false",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
        TRANSFORMERS_VERBOSITY="error",
    )


def listen_on_loopback() -> None:
    """On a Ray of this machine's only, have the Serve replica of this process listen there only.

    To be called while it is initialized. Serve has it take pickled calls from every interface and
    from anybody, and no setting for that.
    """
    if is_localhost(ray.util.get_node_ip_address()):
        from ray.serve._private import replica as serving

        serving.add_port_to_grpc_server = lambda server, address: add_port_to_grpc_server(
            server, build_address(get_localhost_ip(), 0)
        )


@contextmanager
def open_session(
    cluster: ClusterConfig,
    directory: str | None = None,
    http: HttpAt | None = None,
    envs: Sequence[str] = (),
) -> Iterator[Session]:
    """Join or start Ray and Serve; on leaving, undo what was started and nothing else.

    Args:
        cluster: `address` names a cluster to join. Empty: the cluster this process runs in
            (RAY_ADDRESS, as `ray job submit` sets it), else a local one that ends with us.
        directory: the run's folder, if the program has one.
        http: where Serve is to listen; None: nowhere, if we are who starts it.
        envs: environments (as `env.name`) that will be played. If we join a cluster as no job of
            it, the code of rayrl and of these is sent to its nodes.

    Raises:
        InfraError: the cluster cannot be reached.
        ConfigError: Serve cannot listen there, or the code is too much to be sent.
    """
    if ray.is_initialized():
        local = joined = False
    else:
        local = _connect(cluster, envs)
        joined = not local
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    with ExitStack() as stack:
        if local or joined:
            stack.callback(_leave)
            stack.enter_context(watch_cluster(directory))
        if _start_serve(http) and not local:
            stack.callback(_stop_serve_if_unused)
        yield Session(run_name(directory), local)


def _leave() -> None:
    """Leave Ray, and end it if it is ours; answers on their way log that it is gone, as it is."""
    log = logging.getLogger("ray")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        ray.shutdown()
    finally:
        log.setLevel(level)


def _connect(cluster: ClusterConfig, envs: Sequence[str]) -> bool:
    """Connect; returns whether the cluster is ours."""
    address = cluster_address(cluster.address)
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "namespace": NAMESPACE}
    if address:
        try:
            check_head(address)
            with _code(envs) as code, _same_sigterm():
                ray.init(address=address, runtime_env=code, **quiet)
        except (AuthenticationError, ConnectionError, RuntimeError, ValueError) as error:
            raise InfraError(_refused(address, error)) from error
        return False
    # Ray gives its workers niceness 15: beside anything else that computes they would starve.
    os.environ.setdefault("RAY_worker_niceness", "0")
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # on by default: good
    _bring_token()
    settings = {
        "address": "local",
        "num_cpus": os.cpu_count(),
        "include_dashboard": False,
        "object_store_memory": int(cluster.object_store_gb * 2**30),
        "_temp_dir": os.environ.get("RAY_TMPDIR") or private_folder(),
        **quiet,
    }
    for attempt in range(START_ATTEMPTS):
        try:
            with _for_us_alone(), _same_sigterm():
                ray.init(**settings)
        except Exception as error:  # on a busy machine its raylet may miss a deadline Ray has fixed
            ray.shutdown()
            if attempt + 1 == START_ATTEMPTS:
                raise InfraError(f"a local Ray could not be started: {error}") from error
        else:
            break
    return True


@contextmanager
def _for_us_alone() -> Iterator[None]:
    """Start Ray for this machine and this program only.

    Its processes listen on loopback: by default they do so on all interfaces, those that serve
    metrics to anybody. They are in a process group each, so that a signal to ours (`timeout`, a
    supervisor) reaches the driver alone, which ends them in order; where Ray needs the group to end
    them with us, they stay in it.
    """
    grouped = partial(services.ConsolePopen, process_group=0)
    with ExitStack() as stack:
        stack.enter_context(patch.object(ray_constants, "ENABLE_RAY_CLUSTER", False))
        if detect_fate_sharing_support():
            stack.enter_context(patch.object(services, "ConsolePopen", grouped))
        yield


@contextmanager
def _same_sigterm() -> Iterator[None]:
    """Keep the program's own handler of SIGTERM, if it has one.

    `ray.init` replaces it by its own, and by a native one that prints a stack trace and aborts.
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
    """Where a local Ray keeps its sockets and logs: in a folder that nobody else may enter.

    Ray makes its own folder writable for everybody. The path is short: a socket's may have 107
    bytes, of which Ray needs 70.

    Raises:
        InfraError: the folder belongs to somebody else.
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
def _code(envs: Sequence[str]) -> Iterator[dict[str, Any] | None]:
    """The `runtime_env` of a driver that joins a cluster; None for a job, which has one."""
    if RAY_JOB_CONFIG_JSON_ENV_VAR in os.environ:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="rayrl-code-") as folder:
        stage(Path(folder), envs)
        yield {"working_dir": folder, "env_vars": variables(os.environ)}


def _refused(address: str, error: Exception) -> str:
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


def _bring_token() -> None:
    """Give a local Ray a token for its lifetime.

    It would write one to ~/.ray/auth_token, where every later `ray start` finds it and asks for it.
    """
    if not any(os.environ.get(f"RAY_AUTH_{name}") for name in ("MODE", "TOKEN", "TOKEN_PATH")):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _start_serve(http: HttpAt | None) -> bool:
    """Start Serve, unless it runs already; returns whether we did."""
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


def _check_listens(http: HttpAt) -> None:
    """Serve's address is the whole cluster's and cannot be changed while it runs."""
    there = _get_global_client().http_config
    if there.location in (None, "Disabled") or (there.host, there.port) != (http.host, http.port):
        raise ConfigError(
            f"serve.host={http.host} serve.port={http.port}: Serve runs on this cluster already, "
            f"at {there.host}:{there.port} ({there.location}). Use that address, or stop it with "
            "`serve shutdown`."
        )


def _stop_serve_if_unused() -> None:
    with suppress(Exception):  # leaving: the cluster may be gone already
        if not serve.status().applications:
            serve.shutdown()
