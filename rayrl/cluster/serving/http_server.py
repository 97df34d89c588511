"""The HTTP server on Ray Serve: each replica is an engine with the whole HTTP app over it.

Serve's proxy listens, spreads requests over the replicas and tells a replica when a client
disconnects. Requests beyond `serve.max_requests` are refused by the replica and not by Serve's
queue, so that the refusal is an OpenAI error object and `/health` still answers.
"""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass

from fastapi import FastAPI
from prometheus_client.metrics_core import Metric
from ray import serve

from rayrl.chat.renderer import Chat
from rayrl.cluster import cluster_address
from rayrl.cluster.actors import prepare_process
from rayrl.cluster.open import worker_imports
from rayrl.cluster.serving.inference_client import DEPLOYMENT
from rayrl.cluster.serving.replica import (
    deployment_settings,
    replica_engine,
    run_app,
    undeploy,
)
from rayrl.cluster.session import HttpAddress, listen_on_loopback, open_session
from rayrl.config import Config, EngineConfig
from rayrl.engine import open_engine
from rayrl.errors import ConfigError
from rayrl.server.app import Service, key_digest, make_app
from rayrl.server.http import metrics_page
from rayrl.weights.model_dir import model_name

__all__ = ["open_server"]

SHUTDOWN_S = 5.0  # for requests in flight when the server stops


@dataclass(frozen=True)
class Served:
    """What each replica serves.

    Attributes:
        path: of the model.
        name: by which clients know the model.
        digest: of the key that clients must send; "" for none.
        max_requests: in flight per replica; more are refused.
        app: name of the Serve app.
    """

    path: str
    name: str
    digest: str
    max_requests: int
    engine: EngineConfig
    app: str


class HttpReplica:
    """The deployment's class: an ASGI app over an engine."""

    def __init__(self, served: Served) -> None:
        prepare_process(served.engine.threads)
        listen_on_loopback()
        self._app = served.app
        self._id = serve.get_replica_context().replica_id.unique_id
        self._service = Service(
            open_engine(served.path, served.engine, raw_logprobs=True),
            Chat.load(served.path),
            served.name,
            served.digest,
            served.max_requests,
            self._scrape,
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        return make_app(self._service)

    async def metrics(self) -> Sequence[Metric]:
        """This replica's metrics."""
        return self._service.metrics.families(replica=self._id)

    async def _scrape(self) -> bytes:
        """The metrics of all replicas: Serve's proxy passes a scrape to any one of them."""
        handle = serve.get_deployment_handle(DEPLOYMENT, self._app)
        parts = await handle.broadcast("metrics").results_async(return_exceptions=True)
        return metrics_page(part for part in parts if not isinstance(part, BaseException))

    async def check_health(self) -> None:
        """Raise unless the engine works; Serve then replaces the replica."""
        await self._service.engine.check()


@asynccontextmanager
async def open_server(config: Config, name: str) -> AsyncIterator[str]:
    """Serve `config.model` over HTTP from `config.cluster.replicas` replicas; yields the URL.

    Args:
        config: `serve` has the address, the key and the limit.
        name: by which clients know the model.

    Raises:
        ConfigError: the address is taken, or the environment variable of the key is not set.
        InfraError: a replica fails to start.
    """
    wanted, cluster = config.serve, config.cluster
    path = model_name(config.model.path)
    digest = _digest(wanted.api_key_env)
    local = not cluster_address(cluster.address)
    with ExitStack() as stack:
        port = _reserve(wanted.host, wanted.port, stack) if local else wanted.port
        at = HttpAddress(wanted.host, port)
        session = stack.enter_context(
            open_session(cluster, http=at, imports=worker_imports(config, engine=True))
        )
        app = f"{session.name}-http"
        served = Served(path, name, digest, wanted.max_requests, replica_engine(config), app)
        deployment = serve.deployment(
            **deployment_settings(cluster),
            health_check_timeout_s=60.0,
            graceful_shutdown_timeout_s=SHUTDOWN_S,
        )(serve.ingress()(HttpReplica))
        if not session.local:  # the cluster outlives this process
            stack.callback(undeploy, app)
        target = deployment.bind(served)
        await run_app(session, cluster, target, app=app, route_prefix="/")
        yield f"http://{_reachable(at.host)}:{at.port}/v1"


def _digest(variable: str) -> str:
    if not variable:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(
            f"serve.api_key_env={variable}: the environment has no {variable}; export the key that "
            "clients must send."
        )
    return key_digest(key)


def _reserve(host: str, port: int, stack: ExitStack) -> int:
    """Return the port, or a free one if it is 0, which is nobody else's until `stack` closes.

    Raises:
        ConfigError: nothing can listen there.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    holder = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
    # Serve's proxy shares its port, and may listen at one that is held and not listened at.
    shared = socket.SO_REUSEADDR if port else socket.SO_REUSEPORT
    holder.setsockopt(socket.SOL_SOCKET, shared, 1)
    try:
        holder.bind((host, port))
    except OSError as error:
        raise ConfigError(
            f"serve.host={host} serve.port={port}: cannot listen there ({error.strerror}). "
            "Choose another, or serve.port=0 for any free port."
        ) from error
    found = int(holder.getsockname()[1])
    if port:
        holder.close()
    return found


def _reachable(host: str) -> str:
    """The host as clients on this machine write it."""
    named = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{named}]" if ":" in named else named
