"""Learners: one Ray actor a rank, and the driver's side that speaks to all of them at once."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rayrl.batch import Batch, shard
from rayrl.cluster.session import set_threads
from rayrl.cluster.store import Published
from rayrl.config import Config
from rayrl.errors import InfraError, RayrlError, RunFailed

if TYPE_CHECKING:
    from rayrl.learner.base import Learner

__all__ = ["LearnerRank", "Learners"]

PLACEMENT_DEADLINE_S = 120.0


class LearnerRank:
    """One rank. Methods are thin: `rayrl.learner` does the work."""

    def __init__(self, rank: int, threads: int) -> None:
        set_threads(threads)
        self._rank = rank
        self._learner: Learner

    def address(self) -> tuple[str, int]:
        """Where rank 0 can be reached by the others: its node, and a port that is free now."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return str(ray.util.get_node_ip_address()), int(probe.getsockname()[1])

    def start(
        self, config: Config, model: str, total_steps: int, world: int, master: tuple[str, int]
    ) -> None:
        """Load the model; with DeepSpeed, meet the other ranks."""
        device = "cuda" if config.cluster.learner_gpus else "cpu"
        if config.learner.kind == "reference":
            from rayrl.learner.reference import ReferenceLearner

            self._learner = ReferenceLearner(config, model, total_steps=total_steps, device=device)
            return
        from rayrl.learner.deepspeed import DeepSpeedLearner

        self._learner = DeepSpeedLearner(
            config,
            model,
            rank=self._rank,
            world_size=world,
            master_addr=master[0],
            master_port=master[1],
            total_steps=total_steps,
            device=device,
        )

    def step(self, part: Batch, supervised: bool = False) -> dict[str, float]:
        """One step on this rank's part of a batch."""
        learn = self._learner.sft_step if supervised else self._learner.step
        return learn(part.rows, part.totals)

    def publish(self, version: int) -> Published | None:
        """The weights as `version` in the object store; from rank 0, None from others."""
        from rayrl.weights import checksum

        flat, manifest = self._learner.flat_weights()
        if self._rank:
            return None
        return Published(version, (ray.put(flat),), manifest, checksum(flat))

    def save(self, folder: str) -> None:
        """Write what `load` continues from."""
        self._learner.save(folder)

    def load(self, folder: str) -> None:
        """Continue from a checkpoint."""
        self._learner.load(folder)

    def export(self, folder: str) -> None:
        """Write a Hugging Face directory."""
        self._learner.export(folder)


class Learners:
    """All ranks as one learner. Metrics and files are rank 0's."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._group: Any = None
        self._ranks: list[Any] = []

    async def start(self, model: str, total_steps: int) -> None:
        """Place and start the ranks on the model in directory `model`.

        Raises:
            InfraError: the cluster has no room for them.
        """
        learner, cluster = self._config.learner, self._config.cluster
        await self._place(learner.world_size)
        strategy = self._group and PlacementGroupSchedulingStrategy(self._group)
        actor = ray.remote(
            num_cpus=cluster.learner_cpus,
            num_gpus=cluster.learner_gpus,
        )(LearnerRank)
        self._ranks = [
            actor.options(scheduling_strategy=strategy or "DEFAULT").remote(rank, learner.threads)
            for rank in range(learner.world_size)
        ]
        master = await self._ranks[0].address.remote()
        await self._all("start", self._config, model, total_steps, learner.world_size, master)

    async def _place(self, world: int) -> None:
        cluster = self._config.cluster
        needs = {"CPU": cluster.learner_cpus, "GPU": cluster.learner_gpus}
        bundle = {kind: amount for kind, amount in needs.items() if amount > 0}
        if not bundle:  # nothing is reserved, as on one small machine
            return
        self._group = placement_group([bundle] * world, strategy=cluster.placement)
        try:
            async with asyncio.timeout(PLACEMENT_DEADLINE_S):
                await self._group.ready()
        except TimeoutError:
            raise InfraError(
                f"the cluster has no room for {world} × {bundle} ({cluster.placement}); lower "
                "learner.world_size, cluster.learner_cpus or cluster.learner_gpus"
            ) from None

    async def step(self, batch: Batch) -> Mapping[str, float]:
        """Train on a batch; every rank computes its part."""
        return await self._parts("step", batch)

    async def sft_step(self, batch: Batch) -> Mapping[str, float]:
        """One supervised update on a batch."""
        return await self._parts("step", batch, True)

    async def publish(self, version: int) -> Published:
        """The weights as they are now, in the object store under a version."""
        published: Published = (await self._all("publish", version))[0]
        return published

    async def save(self, folder: str | Path) -> None:
        """Write a checkpoint to resume from."""
        await self._write("save", folder, "learner.json")

    async def load(self, folder: str | Path) -> None:
        """Continue from a checkpoint."""
        await self._all("load", str(_absolute(folder)))

    async def export(self, folder: str | Path) -> None:
        """Write a Hugging Face directory."""
        await self._write("export", folder, "config.json")

    async def _write(self, method: str, folder: str | Path, proof: str) -> None:
        """Let the ranks write into `folder`, which has the file `proof` afterwards.

        Raises:
            RunFailed: the ranks wrote somewhere else: what they call `folder` is not ours.
        """
        here = _absolute(folder)
        await self._all(method, str(here))
        if not (here / proof).is_file():
            raise RunFailed(
                f"run.dir: the learner has written {proof} into {here}, but it is not there for "
                "the driver. Choose a run.dir on storage that all nodes share."
            )

    async def _parts(self, method: str, batch: Batch, *args: object) -> Mapping[str, float]:
        world = len(self._ranks)
        calls = [
            getattr(rank, method).remote(shard(batch, index, world), *args)
            for index, rank in enumerate(self._ranks)
        ]
        metrics: Mapping[str, float] = (await _together(calls))[0]
        return metrics

    async def _all(self, method: str, *args: object) -> Sequence[Any]:
        return await _together([getattr(rank, method).remote(*args) for rank in self._ranks])

    def close(self) -> None:
        """End the ranks and give their place back."""
        for rank in self._ranks:
            ray.kill(rank)
        if self._group is not None:
            remove_placement_group(self._group)
        self._ranks, self._group = [], None


def _absolute(folder: str | Path) -> Path:
    """The same for the driver and for ranks, which have working directories of their own."""
    return Path(folder).resolve()


async def _together(calls: Sequence[Any]) -> Sequence[Any]:
    """Results of all ranks; the first error ends the wait, because the others may never answer."""
    try:
        return await asyncio.gather(*calls)
    except RayTaskError as error:
        if isinstance(error.cause, RayrlError):
            raise error.cause from None
        raise
    except RayActorError as error:
        raise RunFailed(
            f"a learner process died ({error}). Run the same command again to go on from the last "
            "checkpoint."
        ) from error
