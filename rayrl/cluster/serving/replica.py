"""A replica: an engine behind Ray Serve that takes traffic only with the newest weights."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Protocol

import ray
from ray import serve
from ray.exceptions import ObjectLostError
from ray.serve import Application
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from rayrl.cluster.actors import ACTOR_DIED, prepare_process
from rayrl.cluster.serving.inference_client import DEPLOYMENT
from rayrl.cluster.serving.router import IndexRouter
from rayrl.cluster.serving.streams import NoStream, Outcome, Result, ResultStream
from rayrl.cluster.session import SERVE_LOGGING, Session, listen_on_loopback
from rayrl.cluster.weight_sync.weight_store import NAMESPACE, Published, store_name
from rayrl.config import ClusterConfig, Config, EngineConfig
from rayrl.engine.protocol import BroadcastEngine, Engine, Part
from rayrl.errors import ConfigError, InfraError, RayrlError, StaleWeights
from rayrl.types import Completion, Request
from rayrl.weights.broadcast import Plan, Rendezvous

__all__ = ["Replica", "deploy", "deployment_settings", "run_app", "undeploy"]

MAX_ONGOING = 100_000  # calls per replica: the engine queues requests, not Serve
HEALTH_PERIOD_S = 2.0
POLL_S = 0.2
OPEN_WITHIN_S = 60.0  # after its first batch, for a client to open the stream of results
REACH_S = 10.0  # for the weights version of a request to arrive here
START_DEADLINE_S = 300.0  # for all replicas of an app, loading the model included
START_ATTEMPTS = 3


class EngineFactory(Protocol):
    """Makes the engine in the replica's process."""

    def __call__(self) -> Engine: ...


class Replica:
    """The deployment's class. Methods are thin: the engine does the work.

    Serve calls `check_health` before a replica takes traffic, and that loads the newest weights: so
    a restarted replica never answers with the weights that its constructor read from disk.

    Args:
        factory: makes the engine.
        store: name of the weights store's actor, or "" for weights that never change.
        threads: of the engine.
    """

    def __init__(self, factory: EngineFactory, store: str, threads: int) -> None:
        prepare_process(threads)
        listen_on_loopback()
        self._engine = factory()
        self._store = ray.get_actor(store, namespace=NAMESPACE) if store else None
        self._id: str = serve.get_replica_context().replica_id.unique_id
        self._loading = asyncio.Lock()
        self._loaded = (self._engine.version, "")
        self._streams: dict[str, ResultStream] = {}  # by client

    async def submit(
        self,
        client: str,
        requests: Sequence[tuple[int, Request]],
        released: Sequence[str],
    ) -> str:
        """Start generating for a batch; the results are read from `results`.

        Args:
            client: whose requests these are.
            requests: with the client's numbers of them.
            released: conversations that are over, whose KV cache can go.

        Returns:
            The id of this replica, by which `results` and `cancel` are addressed.
        """
        self._engine.release(released)
        stream = self._streams.get(client)
        if stream is None:
            stream = self._streams[client] = ResultStream(self._generate)
            asyncio.get_running_loop().call_later(OPEN_WITHIN_S, self._drop_unread, client, stream)
        for number, request in requests:
            stream.start(number, request)
        return self._id

    async def results(self, client: str, replica: str) -> AsyncIterator[list[Result]]:
        """Stream the results of a client's requests as they finish (`ResultStream.read`).

        If the client goes away, generation for it stops.

        Args:
            replica: id of the replica that the client means.

        Raises:
            NoStream: there are no requests of this client here, or their results are being read,
                as over a connection whose loss has not been noticed.
        """
        stream = self._streams.get(client)
        if replica != self._id or stream is None or stream.opened:
            raise NoStream(f"replica {self._id} has no results of replica {replica} to stream")
        stream.opened = True
        try:
            async for results in stream.read():
                yield results
        finally:
            del self._streams[client]
            stream.close()

    def _drop_unread(self, client: str, stream: ResultStream) -> None:
        if not stream.opened:  # the client died after it had submitted
            del self._streams[client]
            stream.close()

    async def cancel(self, client: str, numbers: Sequence[int]) -> None:
        """Stop generating for requests that nobody waits for any more."""
        if (stream := self._streams.get(client)) is not None:
            stream.cancel(numbers)

    async def _generate(self, request: Request) -> Outcome:
        try:
            if self._engine.version < request.min_version:
                await self._reach_version(request.min_version)
            return await self._engine.generate(request)
        except RayrlError as error:
            return error
        except Exception as error:
            return InfraError(f"the engine failed: {type(error).__name__}: {error}")

    async def _reach_version(self, version: int) -> None:
        end = time.monotonic() + REACH_S
        await self.catch_up()
        while self._engine.version < version and time.monotonic() < end:
            await asyncio.sleep(POLL_S)  # the store itself may just have restarted
            await self.catch_up()
        if self._engine.version < version:
            raise StaleWeights(
                f"replica {self._id} holds weights version {self._engine.version}, the newest "
                f"there is; the request needs version {version}"
            )

    async def catch_up(self, *, wait: bool = False) -> None:
        """Load the newest weights, if they are newer.

        Args:
            wait: for weights that were broadcast before this replica joined, until the driver has
                put them into the object store.
        """
        if not self._store:
            return
        with suppress(*ACTOR_DIED):  # without a store nothing newer comes; the push reports it
            newest: Published | None = await self._store.newest.remote()
            while newest is not None and newest.version > self._engine.version:
                if newest.buffer:
                    with suppress(ObjectLostError):  # its learner died; the next will push again
                        await self.load(newest)
                        return
                else:  # each time, because publishing a version clears it
                    await self._store.miss.remote()
                if not wait:
                    return
                await asyncio.sleep(POLL_S)
                newest = await self._store.newest.remote()

    async def load(self, published: Published) -> tuple[str, int, str]:
        """Load weights; returns the replica's id, and the version and checksum it now holds."""
        async with self._loading:
            if self._loaded != (published.version, published.checksum):
                flat = await published.buffer[0]
                checksum = await self._engine.load_weights(
                    published.version, flat, published.manifest
                )
                self._loaded = (self._engine.version, checksum)
        return self._id, *self._loaded

    async def workers(self) -> tuple[str, int]:
        """Return the replica's id, and how many members of a broadcast group its engine is.

        Raises:
            ConfigError: the engine takes weights from the object store only.
        """
        if not isinstance(self._engine, BroadcastEngine):
            raise ConfigError(
                f"cluster.sync: {type(self._engine).__name__} takes no stream; choose engine=vllm, "
                "or cluster.sync=object_store."
            )
        return self._id, self._engine.workers

    async def join(self, meeting: Rendezvous, first: Mapping[str, int]) -> None:
        """Join a broadcast group, unless this replica started while the group was formed.

        Args:
            first: by replica, the rank of its first worker.
        """
        if self._id in first:
            await self._engine.join(meeting, first[self._id])  # type: ignore[attr-defined]

    async def receive(
        self, version: int, plan: Plan, members: Container[str]
    ) -> tuple[str, int, str]:
        """Load weights if this replica is a member of the broadcast group; returns as `load`.

        Serve also calls replicas that started after the group was formed: what such a one answers
        confirms nothing, and the push is repeated with a new group.
        """
        if self._id in members:
            async with self._loading:
                checksum = await self._engine.receive(version, plan)  # type: ignore[attr-defined]
                self._loaded = (self._engine.version, checksum)
        return self._id, *self._loaded

    async def probe(self, requests: Sequence[Request]) -> tuple[str, list[Completion]]:
        """Return the replica's id, and completions of requests that belong to no episode."""
        try:
            return self._id, await asyncio.gather(*map(self._engine.generate, requests))
        finally:
            self._engine.release([request.session for request in requests])

    async def sleep(self) -> None:
        """Free the GPU for the learner."""
        await self._engine.sleep()

    async def wake(self, part: Part) -> None:
        """Take a part of the GPU memory again."""
        await self._engine.wake(part)

    async def check_health(self) -> None:
        """Raise unless the engine works; load the newest weights."""
        await self._engine.check()
        await self.catch_up(wait=True)


def replica_engine(config: Config) -> EngineConfig:
    """The engine's settings for replicas: without a GPU reserved for them, they use the CPU."""
    if config.engine.device == "auto" and not config.cluster.replica_gpus:
        return replace(config.engine, device="cpu")
    return config.engine


def deployment_settings(cluster: ClusterConfig) -> dict[str, Any]:
    """Settings that the deployments for rollouts and for HTTP have in common."""
    return {
        "name": DEPLOYMENT,
        "num_replicas": cluster.replicas,
        "max_ongoing_requests": MAX_ONGOING,
        "max_constructor_retry_count": START_ATTEMPTS,
        "health_check_period_s": HEALTH_PERIOD_S,
        "graceful_shutdown_wait_loop_s": 0.1,
        "logging_config": SERVE_LOGGING,
        "ray_actor_options": {
            "num_cpus": cluster.replica_cpus,
            "num_gpus": cluster.replica_gpus,
            "resources": dict(cluster.replica_resources),
        },
    }


async def deploy(
    session: Session,
    config: Config,
    factory: EngineFactory,
    *,
    app: str,
    store: bool,
) -> DeploymentHandle:
    """Start replicas as a Serve app of their own; returns the handle when all of them serve.

    Args:
        session: the Ray session to start them in.
        config: number of replicas and their resources (`cluster`), threads (`engine`).
        factory: makes the engine in the replica's process.
        app: the app's name; an app that is left of this name is replaced.
        store: whether weights are pushed to the replicas.

    Raises:
        InfraError: a replica fails to start (the message ends with its traceback), or the cluster
            lacks the resources that it reserves.
    """
    cluster = config.cluster
    deployment = serve.deployment(
        **deployment_settings(cluster),
        health_check_timeout_s=max(60.0, cluster.push_deadline_s),
        graceful_shutdown_timeout_s=0.0,  # who waits for an answer asks another, or has gone
        request_router_config=RequestRouterConfig(request_router_class=IndexRouter),
    )(Replica)
    target = deployment.bind(
        factory, store_name(session.name) if store else "", config.engine.threads
    )
    return await run_app(session, cluster, target, app=app)


async def run_app(
    session: Session,
    cluster: ClusterConfig,
    target: Application,
    *,
    app: str,
    route_prefix: str | None = None,
) -> DeploymentHandle:
    """Start an app of one deployment, replacing one of this name; returns when it serves.

    Args:
        cluster: what the replicas reserve, for the error message.
        route_prefix: of HTTP; None: the app has no HTTP.

    Raises:
        InfraError: a replica fails to start (the message ends with its traceback), or the cluster
            lacks the resources that it reserves.
    """
    if not session.local:
        undeploy(app)
    # not serve.run, which blocks: an interrupted program must be able to leave
    (handle,) = serve.run_many(
        [serve.RunTarget(target, name=app, route_prefix=route_prefix)],
        wait_for_ingress_deployment_creation=False,
        wait_for_applications_running=False,
    )
    end = time.monotonic() + START_DEADLINE_S
    while (status := serve.status().applications[app]).status != "RUNNING":
        if status.status == "DEPLOY_FAILED":
            reasons = [d.message for d in status.deployments.values()]
            raise InfraError("\n".join([f"the replicas of {app} failed to start:", *reasons]))
        if time.monotonic() > end:
            raise InfraError(_lacking_resources(cluster))
        await asyncio.sleep(POLL_S)
    return handle


def _lacking_resources(cluster: ClusterConfig) -> str:
    total, free = ray.cluster_resources(), ray.available_resources()
    has = " and ".join(
        f"{total.get(kind, 0):g} {kind}s ({free.get(kind, 0):g} free)" for kind in ("CPU", "GPU")
    )
    own = f" and {dict(cluster.replica_resources)}" if cluster.replica_resources else ""
    return (
        f"cluster.replicas={cluster.replicas}: not all of them started within "
        f"{START_DEADLINE_S:g} s. Each reserves cluster.replica_cpus={cluster.replica_cpus:g} and "
        f"cluster.replica_gpus={cluster.replica_gpus:g}{own}; the cluster has {has}. Lower one of "
        "these keys, or give the cluster more nodes."
    )


def undeploy(app: str) -> None:
    """Delete an app if it exists; other apps of the cluster stay."""
    with suppress(Exception):  # at the end of a session the cluster may be gone already
        if ray.is_initialized() and app in serve.status().applications:
            serve.delete(app, _blocking=False)  # which would look once a second whether it is gone
            end = time.monotonic() + START_DEADLINE_S
            while app in serve.status().applications and time.monotonic() < end:
                time.sleep(POLL_S)
