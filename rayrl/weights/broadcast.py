"""Weights as a stream of packed buckets, from one learner rank to every engine worker at once.

The sender iterates over `(name, tensor)` pairs, packs as many as fit into one bucket, and
broadcasts its bytes; each receiver loads a bucket while the next one is packed. So neither side
ever holds more of the model than one bucket (or the largest tensor), and ZeRO 3 parameters are
gathered lazily. Both sides know the buckets' layout beforehand: it is the same for every push.

The broadcast group is a process group of its own, over NCCL between GPUs and gloo between CPUs; the
rest of the code is shared. Every broadcast has the group's timeout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from rayrl.errors import DataError, InfraError
from rayrl.weights.flat import Manifest, checksum, put, views

if TYPE_CHECKING:  # actors import this module before they set torch's number of threads
    from torch import Tensor

__all__ = ["BroadcastGroup", "Plan", "Rendezvous", "open_rendezvous", "receive", "send"]

Plan = tuple[Manifest, ...]
"""The layout of every bucket, in order (`rayrl.weights.flat.buckets`)."""

SENDER = 0  # rank in the broadcast group


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """What a process needs to know to join a broadcast group.

    Attributes:
        backend: "nccl" or "gloo".
        host: the sender's address; its TCP store listens on `port`.
        world: number of members, including the sender.
        timeout_s: limit on joining, and on each broadcast.
    """

    backend: str
    host: str
    port: int
    world: int
    timeout_s: float


def open_rendezvous(
    backend: str, address: str, world: int, timeout_s: float
) -> tuple[Rendezvous, Any]:
    """Open a TCP store at `address` on a free port; returns the rendezvous and the store."""
    import torch.distributed as dist

    store = dist.TCPStore(  # type: ignore[attr-defined]
        address,
        0,
        world,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
    )
    return Rendezvous(backend, address, store.port, world, timeout_s), store


class BroadcastGroup:
    """A process group beside torch's default one; the constructor waits for all members.

    Args:
        rank: 0 is the sender.
        store: the rendezvous' store, in the process that opened it.

    Raises:
        InfraError: not all members joined within `timeout_s`.
    """

    def __init__(self, rendezvous: Rendezvous, rank: int, store: Any = None) -> None:
        import torch.distributed as dist

        backend, host, port, world, timeout_s = astuple(rendezvous)
        self.device = "cpu" if backend == "gloo" else "cuda"
        self._timeout = timeout = timedelta(seconds=timeout_s)
        try:
            self._store = store or dist.TCPStore(  # type: ignore[attr-defined]
                host, port, world, is_master=False, timeout=timeout
            )
            prefixed = dist.PrefixStore("rayrl-weights", self._store)  # type: ignore[attr-defined]
            if backend == "gloo":
                self._group: Any = dist.ProcessGroupGloo(prefixed, rank, world, timeout)
            else:
                options = dist.ProcessGroupNCCL.Options()
                options._timeout = timeout
                self._group = dist.ProcessGroupNCCL(prefixed, rank, world, options)
        except RuntimeError as error:
            raise InfraError(
                f"weight broadcast: rank {rank} of {world} could not join the others at "
                f"{host}:{port} within {timeout_s:g} s: {error}"
            ) from error

    def broadcast(self, bucket: Tensor) -> None:
        """Send (rank 0) or receive (others) one bucket, (nbytes,) uint8 on `device`.

        Raises:
            InfraError: a member died or timed out. The group is unusable from then on.
        """
        import torch

        try:
            work = self._group.broadcast(bucket, SENDER)
            work.wait(self._timeout)  # given a timeout, NCCL's wait also blocks until it is done
            if bucket.is_cuda:
                torch.cuda.current_stream().synchronize()
        except RuntimeError as error:
            raise InfraError(f"weight broadcast failed: {error}") from error

    def close(self) -> None:
        """Leave the group."""
        self._group = self._store = None


def send(pairs: Iterable[tuple[str, Tensor]], plan: Plan, group: BroadcastGroup) -> str:
    """Broadcast every bucket; returns the checksum of what was sent.

    Args:
        pairs: names and tensors in the plan's order. Each is copied before the next is requested.

    Raises:
        DataError: `pairs` do not match the plan. The receivers then wait until the group's timeout.
        InfraError: as `BroadcastGroup.broadcast`.
    """
    import torch

    size = max((manifest.nbytes for manifest in plan), default=0)
    buffer = torch.zeros(size, dtype=torch.uint8, device=group.device)
    remaining = iter(pairs)
    digests = []
    for manifest in plan:
        bucket = buffer[: manifest.nbytes].zero_()  # so that equal weights have equal checksums
        for entry in manifest.entries:
            name, tensor = next(remaining, ("nothing", bucket[:0]))
            dtype = str(tensor.dtype).removeprefix("torch.")
            if (name, dtype, tuple(tensor.shape)) != (entry.name, entry.dtype, entry.shape):
                raise DataError(
                    f"weight broadcast: the plan has {entry.name} {entry.shape} {entry.dtype}, "
                    f"but the learner sent {name} {tuple(tensor.shape)} {dtype}"
                )
            put(bucket, entry, tensor)
        group.broadcast(bucket)
        digests.append(checksum(bucket))
    if (extra := next(remaining, None)) is not None:
        raise DataError(f"weight broadcast: the learner sent {extra[0]}, which the plan lacks")
    return _combine(digests)


def receive(
    plan: Plan, group: BroadcastGroup, load: Callable[[Sequence[tuple[str, Tensor]]], object]
) -> str:
    """Receive every bucket and pass its tensors to `load`; returns the checksum of what arrived.

    The tensors are views of memory that is not reused: `load` may hold on to them (vLLM does, until
    a layer is complete).

    Raises:
        InfraError: as `BroadcastGroup.broadcast`.
    """
    import torch

    digests = []
    for manifest in plan:
        bucket = torch.empty(manifest.nbytes, dtype=torch.uint8, device=group.device)
        group.broadcast(bucket)
        digests.append(checksum(bucket))
        load(views(bucket, manifest))
    return _combine(digests)


def _combine(digests: Sequence[str]) -> str:
    """Checksum of all buckets' checksums, in order."""
    import numpy as np

    return checksum(np.frombuffer(bytes.fromhex("".join(digests)), np.uint8))
