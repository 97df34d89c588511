"""Learner ranks, one Ray actor each, and the group through which the driver calls them."""

from __future__ import annotations

import asyncio
import gc
import socket
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rayrl.cluster import by_value
from rayrl.cluster.actors import ACTOR_DIED, prepare_process
from rayrl.cluster.weight_sync.weight_store import Published
from rayrl.config import Config
from rayrl.config.sync import transport_of
from rayrl.errors import InfraError, LearnerLost, RayrlError, RunFailed
from rayrl.learner.batch import Batch, Trajectory, shard
from rayrl.weights.broadcast import BroadcastGroup, Plan, Rendezvous, open_rendezvous, send
from rayrl.weights.flat import buckets
from rayrl.weights.model_dir import model_dir

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from rayrl.learner.base import Learner
    from rayrl.learner.loss import Loss

__all__ = ["LearnerGroup", "LearnerRank"]

PLACEMENT_DEADLINE_S = 120.0
START_ATTEMPTS = 3
GRACE_S = 2.0  # for other ranks to report their errors


class LearnerRank:
    """Actor of one rank; `rayrl.learner` does the work."""

    def __init__(self, rank: int, threads: int) -> None:
        prepare_process(threads)
        self._rank = rank
        self._learner: Learner
        self._adapters = False  # publish only the adapters
        self._flat: NDArray[np.uint8] | None = None
        self._plan: Plan = ()
        self._listener: Any = None  # of the rendezvous
        self._group: BroadcastGroup | None = None
        self._broadcast = (-1, -1)  # version, learner's step

    def address(self) -> tuple[str, int]:
        """Address at which other ranks reach rank 0: its node and a free port."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return str(ray.util.get_node_ip_address()), int(probe.getsockname()[1])

    def start(
        self,
        config: Config,
        model: str,
        total_steps: int,
        world: int,
        master: tuple[str, int],
        loss: str | bytes,
    ) -> None:
        """Load the model; with DeepSpeed, also connect to the other ranks.

        Args:
            loss: `algo.loss`, from `by_value.dumps`: this node may not have its file.
        """
        function = None if isinstance(loss, str) else by_value.loads(loss)
        self._adapters = transport_of(config) == "adapters"
        model = str(model_dir(model))
        device = "cuda" if config.cluster.learner_gpus else "cpu"
        if config.learner.kind == "reference":
            from rayrl.learner.reference import ReferenceLearner

            self._learner = ReferenceLearner(
                config, model, total_steps=total_steps, device=device, loss=function
            )
        else:
            from rayrl.learner.base import RankInfo
            from rayrl.learner.deepspeed import DeepSpeedLearner

            self._learner = DeepSpeedLearner(
                config,
                model,
                info=RankInfo(self._rank, world, *master),
                total_steps=total_steps,
                device=device,
                loss=function,
            )
        gc.freeze()  # what exists now stays; later garbage, which may hold tensors,
        gc.set_threshold(700, 10, 10)  # is collected at Python's default rate

    def step(self, batch: Batch, loss: str | bytes | None = None) -> dict[str, float]:
        """Train one step on this rank's shard of a batch.

        Args:
            loss: for this step only, from `by_value.dumps`.
        """
        function = None if loss is None else by_value.loads(loss)
        return self._learner.step(batch.rows, batch.totals, function)

    def sft_step(self, batch: Batch) -> dict[str, float]:
        """Make one supervised update on this rank's shard of a batch."""
        return self._learner.sft_step(batch.rows, batch.totals)

    def describe(self) -> tuple[str, int]:
        """See `probe.Scorer`."""
        return self._learner.describe()

    def logprobs(self, rows: Sequence[Trajectory]) -> Sequence[NDArray[np.float32]]:
        """See `probe.Scorer`; a collective call of all ranks."""
        return self._learner.logprobs(rows, temperature=1.0)

    def publish(self, version: int) -> Published | None:
        """Put the weights as `version` into the object store; rank 0 returns them, others None."""
        from rayrl.weights.flat import checksum

        flat, manifest = self._learner.flat_weights(self._flat, adapters=self._adapters)
        if self._learner.device != "cpu":  # on a CPU the next step needs the memory
            self._flat = flat
        if self._rank:
            return None
        with ThreadPoolExecutor(1) as pool:
            digest = pool.submit(checksum, flat)
            return Published(version, (ray.put(flat),), manifest, digest.result())

    def open_rendezvous(
        self, backend: str, world: int, timeout_s: float, bucket_bytes: int
    ) -> tuple[Rendezvous, Plan]:
        """Open a rendezvous for a broadcast group of `world` members, and plan its buckets."""
        import torch

        entries = self._learner.manifest().entries
        plan = buckets(((e.name, getattr(torch, e.dtype), e.shape) for e in entries), bucket_bytes)
        self._plan = plan
        if self._rank:
            return Rendezvous("", "", 0, 0, 0), plan
        rendezvous, self._listener = open_rendezvous(backend, self.address()[0], world, timeout_s)
        return rendezvous, plan

    def connect(self, rendezvous: Rendezvous) -> None:
        """Join the broadcast group as its rank 0."""
        self._group = BroadcastGroup(rendezvous, 0, self._listener)

    def broadcast(self, version: int, deadline_s: float, store: Any) -> str:
        """Broadcast the weights, a collective call of all ranks; rank 0 returns their checksum."""
        self._broadcast = (version, self._learner.steps)
        with _report_hang(f"learner rank {self._rank}", deadline_s, store):
            weights = self._learner.named_weights()
            if self._group is not None:
                return send(weights, self._plan, self._group)
            for _ in weights:  # gathering is collective
                pass
        return ""

    def republish(self, version: int) -> Published | None:
        """Publish the weights that were broadcast as `version`; None after a further step."""
        if self._broadcast != (version, self._learner.steps):
            return None
        return self.publish(version)

    def save(self, folder: str) -> None:
        """Write a checkpoint."""
        self._learner.save(folder)

    def load(self, folder: str) -> None:
        """Load a checkpoint."""
        self._learner.load(folder)

    def export(self, folder: str) -> None:
        """Write a Hugging Face directory."""
        self._learner.export(folder)


class LearnerGroup:
    """All ranks as one learner; metrics and files are those of rank 0."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._group: Any = None
        self._ranks: list[Any] = []
        self._started = ("", 0)
        self._ready = False

    async def start(self, model: str, total_steps: int) -> None:
        """Place the ranks and load the model in directory `model`.

        Raises:
            ConfigError: `algo.loss` names no function.
            InfraError: the cluster lacks the resources.
        """
        self._started = (model, total_steps)
        for attempt in range(START_ATTEMPTS):
            try:
                await self._start(model, total_steps)
            except LearnerLost:
                if attempt + 1 == START_ATTEMPTS:
                    raise
                self.close()
            else:
                return

    async def _start(self, model: str, total_steps: int) -> None:
        learner, cluster = self._config.learner, self._config.cluster
        loss = by_value.dumps("algo.loss", self._config.algo.loss)
        await self._place(learner.world_size)
        strategy = self._group and PlacementGroupSchedulingStrategy(self._group)
        actor = ray.remote(
            num_cpus=cluster.learner_cpus,
            num_gpus=cluster.learner_gpus,
            resources=dict(cluster.learner_resources),
        )(LearnerRank)
        self._ranks = [
            actor.options(scheduling_strategy=strategy or "DEFAULT").remote(rank, learner.threads)
            for rank in range(learner.world_size)
        ]
        (master,) = await _gather([self._ranks[0].address.remote()])
        await self._all("start", self._config, model, total_steps, learner.world_size, master, loss)
        self._ready = True

    async def restart(self) -> None:
        """Restart every rank on the model given to `start`; the caller then loads a checkpoint."""
        self.close()
        await self.start(*self._started)

    async def _place(self, world: int) -> None:
        cluster = self._config.cluster
        needs = {"CPU": cluster.learner_cpus, "GPU": cluster.learner_gpus}
        needs |= cluster.learner_resources
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
                "learner.world_size, cluster.learner_cpus, cluster.learner_gpus or "
                "cluster.learner_resources"
            ) from None

    async def step(self, batch: Batch, loss: str | Loss | None = None) -> Mapping[str, float]:
        """Train one step on a batch, sharded over the ranks; return metrics, see `Learner.step`.

        Args:
            loss: for this step only, instead of `algo.loss` and its arguments: a name of the
                package, `module:function`, `path/to/file.py:function`, or a function
                `(LossInputs) -> LossOutputs`, which is sent to the ranks by value.

        Raises:
            ConfigError: there is no such loss, or it returned something else than `LossOutputs`.
        """
        return await self._sharded("step", batch, loss and by_value.dumps("algo.loss", loss))

    async def sft_step(self, batch: Batch) -> Mapping[str, float]:
        """Make one supervised update on a batch, sharded over the ranks."""
        return await self._sharded("sft_step", batch)

    async def describe(self) -> tuple[str, int]:
        """See `probe.Scorer`."""
        description: tuple[str, int] = (await _gather([self._ranks[0].describe.remote()]))[0]
        return description

    async def logprobs(self, rows: Sequence[Trajectory]) -> Sequence[NDArray[np.float32]]:
        """See `probe.Scorer`; every rank computes all rows."""
        logprobs: Sequence[NDArray[np.float32]] = (await self._all("logprobs", rows))[0]
        return logprobs

    async def publish(self, version: int) -> Published:
        """Put the current weights into the object store as `version`."""
        published: Published = (await self._all("publish", version))[0]
        return published

    async def open_rendezvous(
        self, backend: str, world: int, timeout_s: float
    ) -> tuple[Rendezvous, Plan]:
        """Open a rendezvous at rank 0 for a broadcast group of `world` members.

        Returns:
            The rendezvous, and the buckets of `cluster.bucket_mb` that will be broadcast.
        """
        bucket_bytes = self._config.cluster.bucket_mb << 20
        answers = await self._all("open_rendezvous", backend, world, timeout_s, bucket_bytes)
        opened: tuple[Rendezvous, Plan] = answers[0]
        return opened

    async def connect(self, rendezvous: Rendezvous) -> None:
        """Join the broadcast group as its rank 0; return when all members have joined."""
        await _gather([self._ranks[0].connect.remote(rendezvous)])

    async def broadcast(self, version: int, deadline_s: float, store: Any) -> str:
        """Broadcast the current weights as `version` and return their checksum.

        A rank that has not finished near `deadline_s` reports its stack to `store`.
        """
        checksum: str = (await self._all("broadcast", version, 0.9 * deadline_s, store))[0]
        return checksum

    async def republish(self, version: int) -> Published | None:
        """`publish` the weights that were broadcast as `version`.

        Returns:
            None if they have changed, or while the ranks are restarted.
        """
        if not self._ready:
            return None
        published: Published | None = (await self._all("republish", version))[0]
        return published

    async def save(self, folder: str | Path) -> None:
        """Write a checkpoint to resume from."""
        await self._write("save", folder, "learner.json")

    async def load(self, folder: str | Path) -> None:
        """Load a checkpoint."""
        await self._all("load", str(_absolute(folder)))

    async def export(self, folder: str | Path) -> None:
        """Write a Hugging Face directory."""
        await self._write("export", folder, "config.json")

    async def _write(self, method: str, folder: str | Path, proof: str) -> None:
        """Let the ranks write into `folder`, which must then hold the file `proof`.

        Raises:
            RunFailed: the driver does not see the file: `folder` is not on shared storage.
        """
        here = _absolute(folder)
        await self._all(method, str(here))
        if not (here / proof).is_file():
            raise RunFailed(
                f"run.dir: the learner wrote {proof} into {here}, but the driver does not find it. "
                "Choose a run.dir on storage that all nodes share."
            )

    async def _sharded(self, method: str, batch: Batch, *args: object) -> Mapping[str, float]:
        world, seed = len(self._ranks), self._config.run.seed
        parts = self._config.algo.minibatches if method == "step" else 1
        calls = [
            getattr(rank, method).remote(shard(batch, index, world, parts, seed), *args)
            for index, rank in enumerate(self._ranks)
        ]
        metrics: Mapping[str, float] = (await _gather(calls))[0]
        return metrics

    async def _all(self, method: str, *args: object) -> Sequence[Any]:
        return await _gather([getattr(rank, method).remote(*args) for rank in self._ranks])

    def close(self) -> None:
        """End the ranks and release their resources."""
        for rank in self._ranks:
            ray.kill(rank)
        if self._group is not None:
            remove_placement_group(self._group)
        self._ranks, self._group, self._ready = [], None, False


def _absolute(folder: str | Path) -> Path:
    """Resolve a path for ranks, whose working directories differ from the driver's."""
    return Path(folder).resolve()


async def _gather(calls: Sequence[Any]) -> Sequence[Any]:
    """Wait for the results of all ranks.

    The first error ends the wait, because the other ranks may never answer. They still get
    `GRACE_S`: ranks that lose their connection to the failed one often report earlier than it does.
    """
    futures = [asyncio.ensure_future(call) for call in calls]
    try:
        _, pending = await asyncio.wait(futures, return_when=asyncio.FIRST_EXCEPTION)
        if pending:
            await asyncio.wait(pending, timeout=GRACE_S)
        errors = {
            rank: error
            for rank, future in enumerate(futures)
            if future.done() and (error := future.exception()) is not None
        }
        if errors:
            raise _primary_error(errors) from None
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()


def _primary_error(errors: Mapping[int, BaseException]) -> BaseException:
    """Choose the error to raise from those of the ranks."""
    causes = {rank: getattr(error, "cause", None) for rank, error in errors.items()}
    for cause in causes.values():  # the error that tells users what to do
        if isinstance(cause, RayrlError) and not isinstance(cause, InfraError):
            return cause
    for rank, error in errors.items():
        if isinstance(error, ACTOR_DIED):
            return LearnerLost(
                f"a learner process died (rank {rank}: {error}). Run the same command again to "
                "resume from the last checkpoint."
            )
    text = "\n".join(f"learner rank {rank}: {error}" for rank, error in errors.items())
    if any(isinstance(cause, InfraError) for cause in causes.values()):
        return InfraError(text)
    return RunFailed(text) if len(errors) > 1 else next(iter(errors.values()))


@contextmanager
def _report_hang(name: str, deadline_s: float, store: Any) -> Iterator[None]:
    """Report this thread's stack to the store if the block takes longer than `deadline_s`."""
    thread = threading.get_ident()

    def report() -> None:
        frame = sys._current_frames().get(thread)
        store.report_hang.remote(name, "".join(traceback.format_stack(frame)))

    timer = threading.Timer(deadline_s, report)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
