"""Weight versions: who holds the newest, and how a push ends.

How bytes travel is `sync.py`'s; here is what is the same for all transports. Admission is by
version: a replica loads the store's newest in its first health check, before Serve sends it
anything, and one that holds less than a request's `min_version` fetches first. A push is confirmed
by the checksum of what arrived, and where it is due by what replicas compute from it (`probe.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.serve.handle import DeploymentHandle

from rayrl.cluster.gone import ACTOR_DIED
from rayrl.cluster.session import Session, beside_driver
from rayrl.cluster.weight_sync.probe import Probe
from rayrl.cluster.weight_sync.transports import Transport, ask_all
from rayrl.cluster.weight_sync.weight_store import NAMESPACE, Published, WeightStore, store_name
from rayrl.errors import ConfigError, DataError, InfraError

__all__ = ["WeightSync", "confirmations", "open_store"]

RETRY_S = 0.25  # between broadcasts while a replica has not confirmed
REMIND_S = 2.0  # between looks at whether the store still knows the newest version


def open_store(session: Session) -> Any:
    """Start the store's actor, beside the driver; it lives as long as this program."""
    name = store_name(session.name)
    with suppress(ValueError):  # of a run in this folder that was killed a moment ago
        ray.kill(ray.get_actor(name, namespace=NAMESPACE))
    # one that died is started again, empty; `WeightSync` tells it what it knew
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(WeightStore)
    place = beside_driver()
    return actor.options(name=name, namespace=NAMESPACE, scheduling_strategy=place).remote()


def confirmations(results: Sequence[Any], published: Published) -> tuple[dict[str, str], list[str]]:
    """Sort what the replicas answered.

    Returns:
        Checksum by replica that holds exactly this version, and what is wrong with the others.
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


def refuse(results: Sequence[Any]) -> None:
    """Raise what a replica would answer to every attempt: that the weights are not its model's."""
    for result in results:
        cause = getattr(result, "cause", result)
        if isinstance(cause, (ConfigError, DataError)):
            raise cause


class WeightSync:
    """The driver's side: pushes, and turns on a shared accelerator.

    Args:
        transport: how weights travel.
        store: the weights store's actor.
        handle: of the replicas.
        deadline_s: for a push.
        turns: whether replicas and learners take turns on their GPUs (`cluster.colocate`).
        probe: compares what replicas compute with the learner; None: the checksum is enough.
    """

    def __init__(
        self,
        transport: Transport,
        store: Any,
        handle: DeploymentHandle,
        deadline_s: float,
        *,
        turns: bool = False,
        probe: Probe | None = None,
    ) -> None:
        self._transport = transport
        self._store = store
        self._newest: Published | None = None
        self._reminding: asyncio.Task[None] | None = None
        self._handle = handle
        self._deadline_s = deadline_s
        self._turns = turns
        self._probe = probe

    async def sleep_replicas(self) -> None:
        """Let the learner have the GPU until the next push, where the two take turns."""
        if self._turns:
            await self._each("sleep")

    async def push(self, version: int) -> Mapping[str, str]:
        """Bring the learner's weights to every live replica, as `version`.

        A replica that dies meanwhile is replaced by one that starts with this version. One that
        answers wrongly, or not, is asked again until the deadline.

        Returns:
            Checksum by replica; at least one.

        Raises:
            InfraError: not everybody confirmed version and checksum within the deadline. Where a
                rank or replica failed or hung, the message ends with its traceback.
            RunFailed: a learner or the store died, or a replica computes another model than the
                learner.
            ConfigError: they all do from the first push, or the weights are not their model's: the
                engine cannot take this architecture.
            DataError: the weights are not their model's, as the embedded engine says it.
        """
        if self._turns:
            await self._each("wake", "weights")
        confirmed = await self._confirmed(version)
        if self._turns:
            await self._each("wake", "kv")
        if self._probe is not None:
            await self._probe.look(version, confirmed)
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
                wrong = [f"a replica or a rank did not answer {await self._transport.stuck()}"]
                break
            except InfraError as error:
                wrong = [str(error)]
                await asyncio.sleep(RETRY_S)
                continue
            self._newest = published
            if self._reminding is None:
                self._reminding = asyncio.create_task(self._remind())
            refuse(results)
            confirmed, wrong = confirmations(results, published)
            if confirmed and not wrong:
                return confirmed
            wrong = wrong or ["no replica is running"]
            await asyncio.sleep(RETRY_S)
        raise InfraError(
            f"weights version {version} was not confirmed by every replica within "
            f"{self._deadline_s:g} s (cluster.push_deadline_s): {'; '.join(wrong)}"
        )

    async def _remind(self) -> None:
        """Tell the store what is newest, if it died and began anew."""
        while True:
            await asyncio.sleep(REMIND_S)
            with suppress(*ACTOR_DIED):
                if await self._store.newest.remote() is None:
                    await self._store.publish.remote(self._newest)

    async def _each(self, method: str, *args: str) -> None:
        """Call every replica; one that died is replaced by Serve, and a push waits for it.

        Raises:
            InfraError: one lives and could not do it.
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

    def forget(self) -> None:
        """The learner's processes are others now."""
        self._transport.forget()

    def close(self) -> None:
        """Stop what runs in the background."""
        if self._reminding is not None:
            self._reminding.cancel()
        self._transport.close()
