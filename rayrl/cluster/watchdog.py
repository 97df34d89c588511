"""Whether a cluster is there; and a driver whose cluster is gone says so and ends.

Ray itself waits a minute for a head that does not answer, and then ends the process with a message
of its own, which does not say that the run can be resumed. A head that keeps what it knows on a
disk (`RAY_gcs_storage`) may come back within that time: the run goes on meanwhile, and after.
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

REACH_S = 15.0  # for the head of a cluster to answer; one that is just starting has as long
RAYS_LIMIT = "RAY_gcs_rpc_server_reconnect_timeout_s"
LOOK_EVERY_S = 1.0
LOOKS = 3  # a raylet is given up when it refused so often
SOONER_S = 10.0  # than Ray, so that it is we who say what happened
LEAST_S = 5.0


def check_head(address: str) -> None:
    """Find out whether a head of Ray answers, for which Ray itself waits much longer.

    Args:
        address: as `cluster.address`; `ray://…` is left to Ray's client.

    Raises:
        ConnectionError: nothing answers, or something that is not Ray.
    """
    if "://" in address:
        return
    found = services.canonicalize_bootstrap_address(address)
    if found is None:  # "auto" where no cluster was started: Ray says so at once
        return
    channel = create_gcs_channel(found)
    try:
        asked = NodeInfoGcsServiceStub(channel).CheckAlive.future(
            CheckAliveRequest(), timeout=REACH_S, wait_for_ready=True
        )
        code = asked.code().name  # waits
    finally:
        channel.close()
    if code in ("DEADLINE_EXCEEDED", "UNAVAILABLE"):
        raise ConnectionError(f"nothing that is Ray answered within {REACH_S:g} s")
    if code == "UNIMPLEMENTED":
        raise ConnectionError("something answers that is not Ray")


@contextmanager
def watch_cluster(directory: str | None) -> Iterator[None]:
    """While within, end this process (exit status 1) if its cluster is gone for good.

    Args:
        directory: the run's folder, for the message.
    """
    over = threading.Event()
    node = ray.get_runtime_context().get_node_id()
    raylet = next(one["RayletSocketName"] for one in ray.nodes() if one["NodeID"] == node)
    address = ray.get_runtime_context().gcs_address
    thread = threading.Thread(
        target=_watch, args=(address, raylet, directory, over), name="head", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def patience_s() -> float:
    """How long a head may be silent."""
    limit = float(os.environ.get(RAYS_LIMIT, "60"))
    return max(limit - SOONER_S, LEAST_S)


def _watch(address: str, raylet: str, directory: str | None, over: threading.Event) -> None:
    host, _, port = address.rpartition(":")
    since: float | None = None  # the head is silent
    refused = 0
    while not over.wait(LOOK_EVERY_S):
        refused = 0 if _answers(lambda: _local(raylet)) else refused + 1
        if refused == LOOKS:
            _end("the node of Ray that this program was on has died", directory)
        if _answers(lambda: socket.create_connection((host.strip("[]"), int(port)), 5)):
            if since is not None:
                print(f"The head of Ray at {address} answers again.", file=sys.stderr, flush=True)
            since = None
        elif since is None:
            since = time.monotonic()
            print(
                f"The head of Ray at {address} does not answer; waiting {patience_s():g} s for it.",
                file=sys.stderr,
                flush=True,
            )
        elif time.monotonic() - since > patience_s():
            _end(f"the head of Ray at {address} did not answer for {patience_s():g} s", directory)


def _local(path: str) -> socket.socket:
    end = socket.socket(socket.AF_UNIX)
    end.settimeout(5)
    try:
        end.connect(path)
    except OSError:
        end.close()
        raise
    return end


def _answers(connect: Callable[[], socket.socket]) -> bool:
    try:
        connect().close()
    except OSError:  # refused, or no route to its host
        return False
    return True


def _end(what: str, directory: str | None) -> None:
    """Nothing can be closed any more: each call to the cluster would wait for it.

    What is on the disk is whole at any moment, as after `kill -9`.
    """
    then = f", and run the same command again: it goes on from {directory}" if directory else ""
    print(f"\nrayrl: {what}. Start the cluster again{then}.", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)
