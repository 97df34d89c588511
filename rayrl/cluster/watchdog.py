"""Check that a cluster answers, and end a driver, with a message, once its cluster is lost.

Ray itself waits a minute for a head that does not answer, and then ends the process with a message
that does not say how to resume the run. A head that stores its state on disk (`RAY_gcs_storage`)
may come back within that minute: the run continues meanwhile, and afterwards.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray
from ray._private import services
from ray._private.gcs_utils import create_gcs_channel
from ray.core.generated.gcs_service_pb2 import CheckAliveRequest
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

__all__ = ["check_head", "watch_cluster"]

REACH_S = 15.0  # for the head of a cluster to answer, even one that is just starting
RECONNECT_TIMEOUT = "RAY_gcs_rpc_server_reconnect_timeout_s"
CHECK_EVERY_S = 1.0
MAX_REFUSALS = 3  # in a row, after which the raylet counts as dead
MARGIN_S = 10.0  # before Ray ends the process, so that the message is rayrl's
MIN_PATIENCE_S = 5.0


def check_head(address: str) -> None:
    """Check that the head of a Ray cluster answers; Ray itself would wait much longer.

    Args:
        address: as `cluster.address`; `ray://…` is left to Ray's client.

    Raises:
        ConnectionError: nothing answers, or something that is not Ray.
    """
    if "://" in address:
        return
    head = services.canonicalize_bootstrap_address(address)
    if head is None:  # "auto" where no cluster was started: Ray says so at once
        return
    channel = create_gcs_channel(head)
    try:
        call = NodeInfoGcsServiceStub(channel).CheckAlive.future(
            CheckAliveRequest(), timeout=REACH_S, wait_for_ready=True
        )
        code = call.code().name  # blocks until the call has ended
    finally:
        channel.close()
    if code in ("DEADLINE_EXCEEDED", "UNAVAILABLE"):
        raise ConnectionError(f"no Ray head answered within {REACH_S:g} s")
    if code == "UNIMPLEMENTED":
        raise ConnectionError("what answers there is not Ray")


@contextmanager
def watch_cluster(directory: str | None) -> Iterator[None]:
    """End this process (exit status 1) if its cluster is lost while the context is open.

    Args:
        directory: the run's folder, for the message.
    """
    stopped = threading.Event()
    node = ray.get_runtime_context().get_node_id()
    raylet = next(info["RayletSocketName"] for info in ray.nodes() if info["NodeID"] == node)
    address = ray.get_runtime_context().gcs_address
    thread = threading.Thread(
        target=_watch, args=(address, raylet, directory, stopped), name="watchdog", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def patience_s() -> float:
    """Seconds that a head may be silent."""
    timeout_s = float(os.environ.get(RECONNECT_TIMEOUT, "60"))
    return max(timeout_s - MARGIN_S, MIN_PATIENCE_S)


def _watch(address: str, raylet: str, directory: str | None, stopped: threading.Event) -> None:
    host, _, port = address.rpartition(":")
    silent_since: float | None = None  # of the head
    refusals = 0
    while not stopped.wait(CHECK_EVERY_S):
        refusals = 0 if _answers(lambda: _connect_unix(raylet)) else refusals + 1
        if refusals == MAX_REFUSALS:
            _exit("the Ray node that this program ran on has died", directory)
        if _answers(lambda: socket.create_connection((host.strip("[]"), int(port)), 5)):
            if silent_since is not None:
                print(f"The Ray head at {address} answers again.", file=sys.stderr, flush=True)
            silent_since = None
        elif silent_since is None:
            silent_since = time.monotonic()
            print(
                f"The Ray head at {address} does not answer; waiting {patience_s():g} s for it.",
                file=sys.stderr,
                flush=True,
            )
        elif time.monotonic() - silent_since > patience_s():
            _exit(f"the Ray head at {address} did not answer for {patience_s():g} s", directory)


def _connect_unix(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(5)
    try:
        connection.connect(path)
    except OSError:
        connection.close()
        raise
    return connection


def _answers(connect: Callable[[], socket.socket]) -> bool:
    try:
        connect().close()
    except OSError:  # refused, or no route to its host
        return False
    return True


def _exit(reason: str, directory: str | None) -> None:
    """Exit without closing anything: each call to the cluster would wait for it.

    Files on disk are consistent at any moment, as after `kill -9`.
    """
    then = f", and run the same command again: it resumes from {directory}" if directory else ""
    print(f"\nrayrl: {reason}. Start the cluster again{then}.", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)
