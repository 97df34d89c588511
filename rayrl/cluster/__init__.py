"""Everything that runs on Ray; the only package that imports it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

# Ray and Serve read these when they are imported, in every process; what is set already stays.
for _name, _value in {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Its own handlers start its threads anew in every child of fork, as when a program opens Ray a
    # second time. Now and then one crashes before the child has become another program.
    "GRPC_ENABLE_FORK_SUPPORT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray's future default; it warns otherwise
    # A replica is asked how busy it is before it is sent anything. On a machine with more to do
    # than cores it may take longer than Serve's 0.1 to 1 s to say so; it would be left out.
    "RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "5",
    "RAY_SERVE_MAX_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "30",
}.items():
    os.environ.setdefault(_name, _value)

NODES = ("localhost", "0.0.0.0/0", "::/0")  # as gRPC reads it: a name, and all numeric addresses


def direct(environ: Mapping[str, str]) -> str:
    """The value of `no_grpc_proxy` with which gRPC reaches the cluster's nodes without a proxy.

    Serve calls a replica over gRPC at its node's numeric address, and gRPC sends that through
    grpc_proxy, https_proxy or http_proxy unless it is excepted. Servers outside of the cluster have
    names; they are reached through the proxy as before, apart from what `environ` excepts already.
    """
    excepted = environ.get("no_grpc_proxy", environ.get("no_proxy", ""))  # gRPC reads the first
    missing = [one for one in NODES if one not in excepted.split(",")]
    return ",".join([*filter(None, [excepted]), *missing])


os.environ.update(no_grpc_proxy=direct(os.environ))  # read when a channel is opened

# `ray start` lets in only who sends the token, where there is one. Ray's clients send it in this
# mode only (to a cluster without a token as well), and an explicit address does not turn it on.
if (
    os.environ.get("RAY_AUTH_TOKEN")
    or os.environ.get("RAY_AUTH_TOKEN_PATH")
    or (Path.home() / ".ray" / "auth_token").is_file()
):
    os.environ.setdefault("RAY_AUTH_MODE", "token")


def cluster_address(configured: str) -> str:
    """The cluster that `cluster.address` means; empty for a local one that ends with the program.

    Where it says nothing it is the one we run in, which `ray job submit` names in RAY_ADDRESS.
    """
    address = configured or os.environ.get("RAY_ADDRESS", "")
    return "" if address == "local" else address
