"""Transports of weights to the replicas: one interface, one transport per topology.

- `ObjectStore`: rank 0 puts one flat buffer into the object store and each replica reads it, on the
  same node through shared memory. It works everywhere, also for replicas that start later. With
  `cluster.sync=adapters` the buffer holds only the adapters.
- `Broadcast`: rank 0 broadcasts packed buckets (`weights.broadcast`) to the engines' workers, over
  NCCL between GPUs or gloo between CPUs, while the ranks gather ZeRO-3 shards, never more than one
  bucket at a time. Replicas that start later get the weights through the object store.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from rayrl.cluster.actors import ACTOR_DIED
from rayrl.cluster.learner_group import LearnerGroup
from rayrl.cluster.weight_sync.weight_store import Published
from rayrl.config import Config
from rayrl.config.sync import transport_of
from rayrl.errors import InfraError, RunFailed
from rayrl.weights.flat import Manifest

__all__ = ["Broadcast", "ObjectStore", "Transport", "ask_all", "open_transport"]

POLL_S = 1.0  # between checks for replicas that missed a broadcast


class Transport(Protocol):
    """Deliver one version to every running replica."""

    async def deliver(self, version: int) -> tuple[Published, Sequence[Any]]:
        """Make one attempt; called again for the same version until every replica confirms it.

        Returns:
            The published version, and per replica its id, version and checksum, or its error.

        Raises:
            InfraError: this attempt failed; another may succeed.
            RunFailed: no further push can succeed.
        """
        ...

    async def hanging_ranks(self) -> str:
        """Return the stacks of ranks past their deadline; empty if there are none."""
        ...

    def reset(self) -> None:
        """Drop the state of the learner's processes, which were restarted."""
        ...

    def close(self) -> None:
        """Stop the background tasks."""
        ...


def open_transport(
    config: Config, learners: LearnerGroup, store: Any, handle: DeploymentHandle
) -> Transport:
    """Open the transport that `config` selects."""
    kind = transport_of(config)
    if kind in ("object_store", "adapters"):
        return ObjectStore(learners.publish, store, handle)
    return Broadcast(kind, learners, store, handle, config.cluster.push_deadline_s)


async def ask_all(handle: DeploymentHandle, method: str, *args: Any) -> Sequence[Any]:
    """Call `method` on every replica and return their answers, or the errors they raised.

    Raises:
        InfraError: no replica is known at the moment. A Serve controller that was just restarted
            knows of none for some seconds, although they are alive.
    """
    try:
        answers: Sequence[Any] = await handle.broadcast(method, *args).results_async(
            return_exceptions=True
        )
    except DeploymentUnavailableError as error:
        raise InfraError("no replica is running") from error
    return answers


async def _publish_to(store: Any, published: Published) -> None:
    try:
        await store.publish.remote(published)
    except ACTOR_DIED as error:
        raise RunFailed(
            f"the weights store, an actor that holds the newest version, died ({error}). Run "
            "the same command again to resume from the last checkpoint."
        ) from error


class ObjectStore:
    """One buffer in the object store for all replicas."""

    def __init__(
        self,
        publish: Callable[[int], Awaitable[Published]],
        store: Any,
        handle: DeploymentHandle,
    ) -> None:
        self._publish = publish
        self._store = store
        self._handle = handle
        self._published: Published | None = None

    async def deliver(self, version: int) -> tuple[Published, Sequence[Any]]:
        """See `Transport`."""
        if self._published is None or self._published.version != version:
            self._published = await self._publish(version)
            await _publish_to(self._store, self._published)
        return self._published, await ask_all(self._handle, "load", self._published)

    async def hanging_ranks(self) -> str:
        """See `Transport`."""
        return ""

    def reset(self) -> None:
        """See `Transport`."""
        self._published = None

    def close(self) -> None:
        """See `Transport`."""


class Broadcast:
    """Packed buckets to the members of a broadcast group: learner rank 0 and all engine workers."""

    def __init__(
        self,
        backend: str,
        learners: LearnerGroup,
        store: Any,
        handle: DeploymentHandle,
        deadline_s: float,
    ) -> None:
        self._backend = backend
        self._learners = learners
        self._store = store
        self._handle = handle
        self._attempt_s = deadline_s / 2  # so that there is time for a second attempt
        self._members: dict[str, int] = {}  # replica -> workers in the current broadcast group
        self._plan: tuple[Manifest, ...] = ()
        self._version = -1
        self._lock = asyncio.Lock()
        self._late: asyncio.Task[None] | None = None

    async def deliver(self, version: int) -> tuple[Published, Sequence[Any]]:
        """See `Transport`."""
        async with self._lock:
            self._version = -1
            running = dict(await self._ask("workers"))
            if not running:
                raise InfraError("no replica is running")
            if running != self._members:
                await self._open_group(running)
            try:
                checksum, received = await asyncio.gather(
                    self._learners.broadcast(version, self._attempt_s, self._store),
                    ask_all(self._handle, "receive", version, self._plan, set(running)),
                )
            except BaseException:  # its members wait for each other; a new group is needed
                self._members = {}
                raise
            if any(isinstance(answer, BaseException) for answer in received):
                self._members = {}
            published = Published(version, (), Manifest((), 0), checksum)
            await _publish_to(self._store, published)
            self._version = version
        if self._late is None or self._late.done():
            self._late = asyncio.create_task(self._serve_late())
        return published, received

    async def _ask(self, method: str, *args: Any) -> list[Any]:
        results = await ask_all(self._handle, method, *args)
        for result in results:
            if isinstance(result, BaseException):
                raise InfraError(f"a replica's {method}: {result}") from result
        return list(results)

    async def _open_group(self, workers: dict[str, int]) -> None:
        """Open a broadcast group with these replicas; ranks are in the order of their names."""
        first_rank: dict[str, int] = {}
        world = 1
        for replica in sorted(workers):
            first_rank[replica] = world
            world += workers[replica]
        self._members = {}
        rendezvous, self._plan = await self._learners.open_rendezvous(
            self._backend, world, self._attempt_s
        )
        await asyncio.gather(
            self._learners.connect(rendezvous), self._ask("join", rendezvous, first_rank)
        )
        self._members = workers

    async def _serve_late(self) -> None:
        """Publish the newest version for replicas that started after its broadcast."""
        while True:
            await asyncio.sleep(POLL_S)
            with suppress(InfraError, *ACTOR_DIED):  # the next push reports it
                if not await self._store.is_missed.remote():
                    continue
                async with self._lock:
                    published = await self._learners.republish(self._version)
                    if published is not None:
                        await _publish_to(self._store, published)

    async def hanging_ranks(self) -> str:
        """See `Transport`."""
        self._members = {}
        with suppress(*ACTOR_DIED, TimeoutError):
            async with asyncio.timeout(5):
                return str(await self._store.stacks.remote())
        return ""

    def reset(self) -> None:
        """See `Transport`."""
        self._members = {}

    def close(self) -> None:
        """See `Transport`."""
        if self._late is not None:
            self._late.cancel()
