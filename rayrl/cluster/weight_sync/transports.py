"""How weights reach the replicas: one interface, a transport for each topology.

- `ObjectStore`: rank 0 puts one flat buffer into the object store; each replica reads it there,
  through shared memory on the same node. Works everywhere; a replica that starts later finds it.
  With `cluster.sync=adapters` the buffer is the adapters alone.
- `Stream`: rank 0 broadcasts packed buckets (`weights.broadcast`) straight to the engines' workers,
  over NCCL between GPUs or gloo between CPUs, while the ranks gather ZeRO-3 shards a few at a time:
  none gathers more than a bucket. A replica that starts later gets it through the object store.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from rayrl.cluster.gone import ACTOR_DIED
from rayrl.cluster.learner_group import LearnerGroup
from rayrl.cluster.weight_sync.topology import transport_of
from rayrl.cluster.weight_sync.weight_store import Published
from rayrl.config import Config
from rayrl.errors import InfraError, RunFailed
from rayrl.weights.flat import Manifest

__all__ = ["ObjectStore", "Stream", "Transport", "ask_all", "open_transport"]

POLL_S = 1.0  # between looks for a replica that came too late for a stream


class Transport(Protocol):
    """Brings one version to every replica that is there."""

    async def deliver(self, version: int) -> tuple[Published, Sequence[Any]]:
        """Try once; called again for the same version where not everybody has confirmed it.

        Returns:
            What was published, and from each replica its id, version and checksum, or its error.

        Raises:
            InfraError: this attempt failed; another may not.
            RunFailed: nothing can be pushed any more.
        """
        ...

    async def stuck(self) -> str:
        """Where ranks hang that are past the deadline, as text with tracebacks; or nothing."""
        ...

    def forget(self) -> None:
        """Other learner processes will send from now on."""
        ...

    def close(self) -> None:
        """Stop what runs in the background."""
        ...


def open_transport(
    config: Config, learners: LearnerGroup, store: Any, handle: DeploymentHandle
) -> Transport:
    """The transport of a configuration."""
    kind = transport_of(config)
    if kind in ("object_store", "adapters"):
        return ObjectStore(learners.publish, store, handle)
    return Stream(kind, learners, store, handle, config.cluster.push_deadline_s)


async def ask_all(handle: DeploymentHandle, method: str, *args: Any) -> Sequence[Any]:
    """What each replica answers, or raised.

    Raises:
        InfraError: there is none at the moment. A Serve controller that was just restarted knows of
            none for some seconds, although they live.
    """
    try:
        answers: Sequence[Any] = await handle.broadcast(method, *args).results_async(
            return_exceptions=True
        )
    except DeploymentUnavailableError as error:
        raise InfraError("no replica is running") from error
    return answers


async def _tell(store: Any, published: Published) -> None:
    try:
        await store.publish.remote(published)
    except ACTOR_DIED as error:
        raise RunFailed(
            f"the weights store, an actor that knows the newest version, died ({error}). Run "
            "the same command again to go on from the last checkpoint."
        ) from error


class ObjectStore:
    """One buffer for all, in shared memory."""

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
            await _tell(self._store, self._published)
        return self._published, await ask_all(self._handle, "load", self._published)

    async def stuck(self) -> str:
        """See `Transport`."""
        return ""

    def forget(self) -> None:
        """See `Transport`."""
        self._published = None

    def close(self) -> None:
        """See `Transport`."""


class Stream:
    """Packed buckets over a channel that learner rank 0 and every engine worker are members of."""

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
        self._limit_s = deadline_s / 2  # of one attempt, so that there is time for another
        self._members: dict[str, int] = {}  # replica -> workers, of the channel that is open
        self._plan: tuple[Manifest, ...] = ()
        self._version = -1
        self._turn = asyncio.Lock()
        self._late: asyncio.Task[None] | None = None

    async def deliver(self, version: int) -> tuple[Published, Sequence[Any]]:
        """See `Transport`."""
        async with self._turn:
            self._version = -1
            there = dict(await self._ask("workers"))
            if not there:
                raise InfraError("no replica is running")
            if there != self._members:
                await self._meet(there)
            try:
                checksum, received = await asyncio.gather(
                    self._learners.stream(version, self._limit_s, self._store),
                    ask_all(self._handle, "receive", version, self._plan),
                )
            except BaseException:  # who is left in it waits for the others; a new one is needed
                self._members = {}
                raise
            if any(isinstance(one, BaseException) for one in received):
                self._members = {}
            published = Published(version, (), Manifest((), 0), checksum)
            await _tell(self._store, published)
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

    async def _meet(self, there: dict[str, int]) -> None:
        """Open a channel with these replicas; ranks go by the replicas' names."""
        first: dict[str, int] = {}
        world = 1
        for replica in sorted(there):
            first[replica] = world
            world += there[replica]
        self._members = {}
        meeting, self._plan = await self._learners.host(self._backend, world, self._limit_s)
        await asyncio.gather(self._learners.connect(meeting), self._ask("join", meeting, first))
        self._members = there

    async def _serve_late(self) -> None:
        """Give the newest version to replicas that came after it was streamed."""
        while True:
            await asyncio.sleep(POLL_S)
            with suppress(InfraError, *ACTOR_DIED):  # the next push says what is wrong
                if not await self._store.is_missed.remote():
                    continue
                async with self._turn:
                    published = await self._learners.republish(self._version)
                    if published is not None:
                        await _tell(self._store, published)

    async def stuck(self) -> str:
        """See `Transport`."""
        self._members = {}
        with suppress(*ACTOR_DIED, TimeoutError):
            async with asyncio.timeout(5):
                return str(await self._store.stacks.remote())
        return ""

    def forget(self) -> None:
        """See `Transport`."""
        self._members = {}

    def close(self) -> None:
        """See `Transport`."""
        if self._late is not None:
            self._late.cancel()
