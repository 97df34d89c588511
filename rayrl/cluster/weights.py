"""Weight versions: who holds the newest, and how it reaches every replica.

A push goes learner → object store → every replica, as one flat buffer: no file, no pickled tensor.
Admission is by version: a replica loads the store's newest in its first health check, before Serve
sends it anything, and one that holds less than a request's `min_version` fetches first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle

from rayrl.cluster.session import Session
from rayrl.cluster.store import NAMESPACE, Published, WeightsStore, store_name
from rayrl.errors import InfraError, RunFailed

__all__ = ["Weights", "confirmations", "open_store"]

RETRY_S = 0.25  # between broadcasts while a replica has not confirmed


def open_store(session: Session) -> Any:
    """Start the store's actor; it lives as long as this program."""
    name = store_name(session.name)
    with suppress(ValueError):  # of a run in this folder that was killed a moment ago
        ray.kill(ray.get_actor(name, namespace=NAMESPACE))
    actor = ray.remote(num_cpus=0)(WeightsStore)
    return actor.options(name=name, namespace=NAMESPACE).remote()


def confirmations(results: list[Any], published: Published) -> tuple[dict[str, str], list[str]]:
    """Sort what a broadcast of `Replica.load` brought back.

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


class Weights:
    """The driver's side of a push."""

    def __init__(
        self,
        publish: Callable[[int], Awaitable[Published]],
        store: Any,
        handle: DeploymentHandle,
        deadline_s: float,
    ) -> None:
        self._publish = publish
        self._store = store
        self._handle = handle
        self._deadline_s = deadline_s

    async def push(self, version: int) -> Mapping[str, str]:
        """Bring the learner's weights to every live replica, as `version`.

        A replica that dies meanwhile is replaced by one that starts with this version. One that
        answers wrongly, or not, is asked again until the deadline.

        Returns:
            Checksum by replica; at least one.

        Raises:
            InfraError: not everybody confirmed version and checksum within the deadline.
            RunFailed: the store died; nothing can be pushed any more.
        """
        published = await self._publish(version)
        try:
            await self._store.publish.remote(published)
        except RayActorError as error:
            raise RunFailed(
                f"the weights store, an actor that knows the newest version, died ({error}). Run "
                "the same command again to go on from the last checkpoint."
            ) from error
        loop = asyncio.get_running_loop()
        end = loop.time() + self._deadline_s
        wrong = ["no replica is running"]
        while (left := end - loop.time()) > 0:
            try:
                async with asyncio.timeout(left):
                    results = await self._handle.broadcast("load", published).results_async(
                        return_exceptions=True
                    )
            except TimeoutError:
                wrong = ["a replica did not answer"]
                break
            confirmed, wrong = confirmations(results, published)
            if confirmed and not wrong:
                return confirmed
            wrong = wrong or ["no replica is running"]
            await asyncio.sleep(RETRY_S)
        raise InfraError(
            f"weights version {published.version} was not confirmed by every replica within "
            f"{self._deadline_s:g} s (cluster.push_deadline_s): {'; '.join(wrong)}"
        )
