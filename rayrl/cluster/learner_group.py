"""Learner ranks, one Ray actor each, and the driver's side that speaks to all of them at once."""

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
from rayrl.cluster.gone import ACTOR_DIED
from rayrl.cluster.session import prepare_process
from rayrl.cluster.weight_sync.topology import transport_of
from rayrl.cluster.weight_sync.weight_store import Published
from rayrl.config import Config
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
GRACE_S = 2.0  # for other ranks to say why they failed


class LearnerRank:
    """One rank. Methods are thin: `rayrl.learner` does the work."""

    def __init__(self, rank: int, threads: int) -> None:
        prepare_process(threads)
        self._rank = rank
        self._learner: Learner
        self._adapters = False  # whether they are all that is published
        self._flat: NDArray[np.uint8] | None = None
        self._plan: Plan = ()
        self._meeting: Any = None
        self._channel: BroadcastGroup | None = None
        self._streamed = (-1, -1)

    def address(self) -> tuple[str, int]:
        """Where rank 0 can be reached by the others: its node, and a port that is free now."""
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
        """Load the model; with DeepSpeed, meet the other ranks.

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
                loss=function,
            )
        gc.freeze()  # what is there stays, and garbage from now on, which may hold tensors,
        gc.set_threshold(700, 10, 10)  # is found as soon as Python would by itself

    def step(self, part: Batch, loss: str | bytes | None = None) -> dict[str, float]:
        """One step on this rank's part of a batch.

        Args:
            loss: for this step only, from `by_value.dumps`.
        """
        function = None if loss is None else by_value.loads(loss)
        return self._learner.step(part.rows, part.totals, function)

    def sft_step(self, part: Batch) -> dict[str, float]:
        """One supervised update on this rank's part of a batch."""
        return self._learner.sft_step(part.rows, part.totals)

    def describe(self) -> tuple[str, int]:
        """The model's architecture, and the number of its ids."""
        return self._learner.describe()

    def logprobs(self, rows: Sequence[Trajectory]) -> Sequence[NDArray[np.float32]]:
        """Of the rows at temperature 1; on all ranks together."""
        return self._learner.logprobs(rows, temperature=1.0)

    def publish(self, version: int) -> Published | None:
        """The weights as `version` in the object store; from rank 0, None from others."""
        from rayrl.weights.flat import checksum

        flat, manifest = self._learner.flat_weights(self._flat, adapters=self._adapters)
        self._flat = flat
        if self._rank:
            return None
        with ThreadPoolExecutor(1) as beside:
            digest = beside.submit(checksum, flat)
            return Published(version, (ray.put(flat),), manifest, digest.result())

    def host(
        self, backend: str, world: int, timeout_s: float, limit: int
    ) -> tuple[Rendezvous, Plan]:
        """Open a meeting for a channel of `world` members; and what will be sent there."""
        import torch

        entries = self._learner.manifest().entries
        plan = buckets(((e.name, getattr(torch, e.dtype), e.shape) for e in entries), limit)
        self._plan = plan
        if self._rank:
            return Rendezvous("", "", 0, 0, 0), plan
        meeting, self._meeting = open_rendezvous(backend, self.address()[0], world, timeout_s)
        return meeting, plan

    def connect(self, meeting: Rendezvous) -> None:
        """Meet the engines, on rank 0."""
        self._channel = BroadcastGroup(meeting, 0, self._meeting)

    def stream(self, version: int, deadline_s: float, store: Any) -> str:
        """Send the weights over the channel; on all ranks together. Their checksum, from rank 0."""
        self._streamed = (version, self._learner.steps)
        with _watched(f"learner rank {self._rank}", deadline_s, store):
            walk = self._learner.named_weights()
            if self._channel is not None:
                return send(walk, self._plan, self._channel)
            for _ in walk:  # a rank's part in gathering it
                pass
        return ""

    def republish(self, version: int) -> Published | None:
        """What was streamed as `version`, in the object store, unless there was a step since."""
        if self._streamed != (version, self._learner.steps):
            return None
        return self.publish(version)

    def save(self, folder: str) -> None:
        """Write what `load` continues from."""
        self._learner.save(folder)

    def load(self, folder: str) -> None:
        """Continue from a checkpoint."""
        self._learner.load(folder)

    def export(self, folder: str) -> None:
        """Write a Hugging Face directory."""
        self._learner.export(folder)


class LearnerGroup:
    """All ranks as one learner. Metrics and files are rank 0's."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._group: Any = None
        self._ranks: list[Any] = []
        self._started = ("", 0)

    async def start(self, model: str, total_steps: int) -> None:
        """Place and start the ranks on the model in directory `model`.

        Raises:
            ConfigError: `algo.loss` names no function.
            InfraError: the cluster has no room for them.
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
        (master,) = await _together([self._ranks[0].address.remote()])
        await self._all("start", self._config, model, total_steps, learner.world_size, master, loss)

    async def restart(self) -> None:
        """End every rank and start anew on the model of the first start; then load a checkpoint."""
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
        """Train on a batch; every rank computes its part. Its metrics, see `Learner.step`.

        Args:
            loss: for this step only, instead of `algo.loss` and its arguments: a name of the
                package, `module:function`, `path/to/file.py:function`, or a function
                `(LossInputs) -> LossOutputs`, which is sent to the ranks by value.

        Raises:
            ConfigError: there is no such loss, or it returned something else than `LossOutputs`.
        """
        return await self._parts("step", batch, loss and by_value.dumps("algo.loss", loss))

    async def sft_step(self, batch: Batch) -> Mapping[str, float]:
        """One supervised update on a batch."""
        return await self._parts("sft_step", batch)

    async def describe(self) -> tuple[str, int]:
        """See `probe.Scorer`."""
        found: tuple[str, int] = (await _together([self._ranks[0].describe.remote()]))[0]
        return found

    async def logprobs(self, rows: Sequence[Trajectory]) -> Sequence[NDArray[np.float32]]:
        """See `probe.Scorer`; every rank computes all of them."""
        found: Sequence[NDArray[np.float32]] = (await self._all("logprobs", rows))[0]
        return found

    async def publish(self, version: int) -> Published:
        """The weights as they are now, in the object store under a version."""
        published: Published = (await self._all("publish", version))[0]
        return published

    async def host(self, backend: str, world: int, timeout_s: float) -> tuple[Rendezvous, Plan]:
        """Open a meeting at rank 0 for a channel of `world` members; and what will be sent there.

        Buckets are of `cluster.bucket_mb`.
        """
        limit = self._config.cluster.bucket_mb << 20
        found: tuple[Rendezvous, Plan] = (
            await self._all("host", backend, world, timeout_s, limit)
        )[0]
        return found

    async def connect(self, meeting: Rendezvous) -> None:
        """Let rank 0 join the channel; waits for all members."""
        await _together([self._ranks[0].connect.remote(meeting)])

    async def stream(self, version: int, deadline_s: float, store: Any) -> str:
        """Send the weights as they are now over the channel; returns their checksum.

        A rank that is not through after `deadline_s` tells the store where it hangs.
        """
        checksum: str = (await self._all("stream", version, 0.9 * deadline_s, store))[0]
        return checksum

    async def republish(self, version: int) -> Published | None:
        """`publish` what was streamed as `version`; None if they are no longer those weights."""
        published: Published | None = (await self._all("republish", version))[0]
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
    """Results of all ranks.

    The first error ends the wait, because the others may never answer; but they have `GRACE_S`: the
    rank that failed is often not the first to say so, since the others lose their connection to it.
    """
    futures = [asyncio.ensure_future(call) for call in calls]
    try:
        _, open_ = await asyncio.wait(futures, return_when=asyncio.FIRST_EXCEPTION)
        if open_:
            await asyncio.wait(open_, timeout=GRACE_S)
        errors = {
            rank: error
            for rank, future in enumerate(futures)
            if future.done() and (error := future.exception()) is not None
        }
        if errors:
            raise _failure(errors) from None
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()


def _failure(errors: Mapping[int, BaseException]) -> BaseException:
    """The error to end with, of those that ranks have failed with."""
    causes = {rank: getattr(error, "cause", None) for rank, error in errors.items()}
    for cause in causes.values():  # says what to do
        if isinstance(cause, RayrlError) and not isinstance(cause, InfraError):
            return cause
    for rank, error in errors.items():
        if isinstance(error, ACTOR_DIED):
            return LearnerLost(
                f"a learner process died (rank {rank}: {error}). Run the same command again to go "
                "on from the last checkpoint."
            )
    text = "\n".join(f"learner rank {rank}: {error}" for rank, error in errors.items())
    if any(isinstance(cause, InfraError) for cause in causes.values()):
        return InfraError(text)
    return RunFailed(text) if len(errors) > 1 else next(iter(errors.values()))


@contextmanager
def _watched(who: str, deadline_s: float, store: Any) -> Iterator[None]:
    """Tell the store where this thread is, if it is still in the block after `deadline_s`."""
    thread = threading.get_ident()

    def tell() -> None:
        frame = sys._current_frames().get(thread)
        store.hang.remote(who, "".join(traceback.format_stack(frame)))

    timer = threading.Timer(deadline_s, tell)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
