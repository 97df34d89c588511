"""Pushes of weight versions: retries, deadlines and confirmation, common to all transports.

`transports.py` moves the bytes. A new replica loads the store's newest version in its first health
check, before Serve routes requests to it; a replica older than a request's `min_version` fetches
the newest version first. A push is confirmed by the checksum of what arrived and, when a comparison
is due, by what replicas compute from it (`probe.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.serve.handle import DeploymentHandle

from rayrl.cluster.actors import ACTOR_DIED, beside_driver
from rayrl.cluster.session import Session
from rayrl.cluster.weight_sync.probe import Probe
from rayrl.cluster.weight_sync.transports import Transport, ask_all
from rayrl.cluster.weight_sync.weight_store import NAMESPACE, Published, WeightStore, store_name
from rayrl.errors import ConfigError, DataError, InfraError

__all__ = ["WeightSync", "confirmations", "open_store"]

RETRY_S = 0.25  # between broadcasts while a replica has not confirmed
RESTORE_S = 2.0  # between checks that the store still holds the newest version


def open_store(session: Session) -> Any:
    """Start the store's actor on the driver's node; it ends with this program."""
    name = store_name(session.name)
    with suppress(ValueError):  # left by a run in this folder that was killed a moment ago
        ray.kill(ray.get_actor(name, namespace=NAMESPACE))
    # Ray restarts it empty if it dies; `WeightSync` restores its contents
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(WeightStore)
    return actor.options(
        name=name, namespace=NAMESPACE, scheduling_strategy=beside_driver()
    ).remote()


def confirmations(results: Sequence[Any], published: Published) -> tuple[dict[str, str], list[str]]:
    """Split the replicas' answers into confirmations and problems.

    Returns:
        Checksum by replica for those that hold exactly this version, and a text per other replica.
    """
    confirmed: dict[str, str] = {}
    wrong: list[str] = []
    for result in results:
        if isinstance(result, BaseException):
            wrong.append(f"{type(result).__name__}: {result}")
            continue
        replica, version, checksum = result
        if version == published.version and checksum == published.checksum:
            confirmed[replica] = checksum
        else:
            wrong.append(
                f"replica {replica} holds version {version} ({checksum}), not {published.version} "
                f"({published.checksum})"
            )
    return confirmed, wrong


def raise_permanent_errors(results: Sequence[Any]) -> None:
    """Raise permanent errors among the answers: weights that do not fit the replica's model."""
    for result in results:
        cause = getattr(result, "cause", result)
        if isinstance(cause, (ConfigError, DataError)):
            raise cause


class WeightSync:
    """Push weights from the driver, and alternate replicas and learners on shared GPUs.

    Args:
        transport: moves the weights.
        store: actor of the weights store.
        handle: handle of the replicas' deployment.
        deadline_s: deadline of a push.
        colocate: replicas and learners take turns on their GPUs (`cluster.colocate`).
        probe: compares what replicas and the learner compute; None: only checksums are compared.
    """

    def __init__(
        self,
        transport: Transport,
        store: Any,
        handle: DeploymentHandle,
        deadline_s: float,
        *,
        colocate: bool = False,
        probe: Probe | None = None,
    ) -> None:
        self._transport = transport
        self._store = store
        self._newest: Published | None = None
        self._restoring: asyncio.Task[None] | None = None
        self._handle = handle
        self._deadline_s = deadline_s
        self._colocate = colocate
        self._probe = probe

    async def sleep_replicas(self) -> None:
        """Free the GPUs for the learner until the next push, if the two share them."""
        if self._colocate:
            await self._each("sleep")

    async def push(self, version: int) -> Mapping[str, str]:
        """Push the learner's weights to every live replica as `version`.

        A replica that dies meanwhile is replaced by one that starts with this version. The push is
        retried until the deadline while a replica answers wrongly or not at all.

        Returns:
            Checksum by replica; at least one.

        Raises:
            InfraError: some replica did not confirm version and checksum within the deadline. If a
                rank or replica failed or hung, the message ends with its traceback.
            RunFailed: a learner or the store died, or a replica computes another model than the
                learner.
            ConfigError: all replicas do so at the first push, or the weights do not fit their
                model: the engine does not support this architecture.
            DataError: the weights do not fit the embedded engine's model.
        """
        if self._colocate:
            await self._each("wake", "weights")
        confirmed = await self._confirmed(version)
        if self._colocate:
            await self._each("wake", "kv")
        if self._probe is not None:
            await self._probe.check(version, confirmed)
        return confirmed

    async def _confirmed(self, version: int) -> Mapping[str, str]:
        loop = asyncio.get_running_loop()
        end = loop.time() + self._deadline_s
        wrong = ["no replica is running"]
        while (left := end - loop.time()) > 0:
            try:
                async with asyncio.timeout(left):
                    published, results = await self._transport.deliver(version)
            except TimeoutError:
                stacks = await self._transport.hanging_ranks()
                wrong = [f"a replica or a rank did not answer {stacks}"]
                break
            except InfraError as error:
                wrong = [str(error)]
                await asyncio.sleep(RETRY_S)
                continue
            self._newest = published
            if self._restoring is None:
                self._restoring = asyncio.create_task(self._restore_store())
            raise_permanent_errors(results)
            confirmed, wrong = confirmations(results, published)
            if confirmed and not wrong:
                return confirmed
            wrong = wrong or ["no replica is running"]
            await asyncio.sleep(RETRY_S)
        raise InfraError(
            f"weights version {version} was not confirmed by every replica within "
            f"{self._deadline_s:g} s (cluster.push_deadline_s): {'; '.join(wrong)}"
        )

    async def _restore_store(self) -> None:
        """Publish the newest version again whenever the store was restarted."""
        while True:
            await asyncio.sleep(RESTORE_S)
            with suppress(*ACTOR_DIED):
                if await self._store.newest.remote() is None:
                    await self._store.publish.remote(self._newest)

    async def _each(self, method: str, *args: str) -> None:
        """Call `method` on every replica; Serve replaces dead ones, and a push waits for that.

        Raises:
            InfraError: a live replica failed.
        """
        try:
            async with asyncio.timeout(self._deadline_s):
                answers = await ask_all(self._handle, method, *args)
        except TimeoutError:
            raise InfraError(
                f"a replica did not {method} within {self._deadline_s:g} s "
                "(cluster.push_deadline_s)"
            ) from None
        for error in answers:
            if isinstance(error, BaseException) and not isinstance(error, ACTOR_DIED):
                raise InfraError(f"a replica did not {method}: {error}") from error

    def reset(self) -> None:
        """Drop the state of the learner's processes, which were restarted."""
        self._transport.reset()

    def close(self) -> None:
        """Stop the background tasks."""
        if self._restoring is not None:
            self._restoring.cancel()
        self._transport.close()
