"""Weights as a stream of packed buckets, from one learner rank to every engine worker at once.

The sender walks `(name, tensor)` pairs, copies as many as fit into one bucket, and broadcasts its
bytes; each receiver loads a bucket while the next one is packed. So neither side ever holds more of
the model than a bucket (or its largest tensor), and under ZeRO 3 the parameters are gathered as the
walk comes to them. Both sides know the buckets' layout beforehand: it is the same at every push.

The channel is a process group of its own, over NCCL between GPUs and over gloo between CPUs; all
else is the same code. Every broadcast has the deadline of the channel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from rayrl.errors import DataError, InfraError
from rayrl.weights.flat import Manifest, checksum, put, views

if TYPE_CHECKING:  # an actor imports this before it says how many threads torch may have
    from torch import Tensor

__all__ = ["BroadcastGroup", "Plan", "Rendezvous", "host", "receive", "send"]

Plan = tuple[Manifest, ...]
"""The layout of every bucket, in order (`rayrl.weights.flat.buckets`)."""

SENDER = 0  # rank in the channel


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where the members of a channel meet.

    Attributes:
        backend: "nccl" or "gloo".
        host: of the sender, which serves the store there at `port`.
        world: members, the sender included.
        timeout_s: for meeting, and for each broadcast.
    """

    backend: str
    host: str
    port: int
    world: int
    timeout_s: float


def host(backend: str, address: str, world: int, timeout_s: float) -> tuple[Rendezvous, Any]:
    """Open a meeting here (at `address`, on a free port); returns it with its store."""
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
    """A process group apart from the default one; constructing it waits for all members.

    Args:
        rank: 0 sends.
        store: the meeting's, for who hosts it.

    Raises:
        InfraError: not everybody came in time.
    """

    def __init__(self, meeting: Rendezvous, rank: int, store: Any = None) -> None:
        import torch.distributed as dist

        self.device = "cpu" if meeting.backend == "gloo" else "cuda"
        self._timeout = timeout = timedelta(seconds=meeting.timeout_s)
        try:
            self._store = store or dist.TCPStore(  # type: ignore[attr-defined]
                meeting.host, meeting.port, meeting.world, is_master=False, timeout=timeout
            )
            self._group: Any = _group(meeting.backend, self._store, rank, meeting.world, timeout)
        except RuntimeError as error:
            raise InfraError(
                f"weights channel: member {rank} of {meeting.world} did not meet the others at "
                f"{meeting.host}:{meeting.port} within {meeting.timeout_s:g} s: {error}"
            ) from error

    def broadcast(self, bucket: Tensor) -> None:
        """Send (rank 0) or receive (others) one bucket, (nbytes,) uint8 on `device`.

        Raises:
            InfraError: a member is gone, or did not take part in time. The channel is broken then.
        """
        import torch

        try:
            work = self._group.broadcast(bucket, SENDER)
            work.wait(self._timeout)  # asked with a deadline, NCCL's too blocks until it is done
            if bucket.is_cuda:
                torch.cuda.current_stream().synchronize()
        except RuntimeError as error:
            raise InfraError(f"weights channel: a broadcast failed: {error}") from error

    def close(self) -> None:
        """Leave."""
        self._group = self._store = None


def _group(backend: str, store: Any, rank: int, world: int, timeout: timedelta) -> Any:
    import torch.distributed as dist

    apart = dist.PrefixStore("rayrl-weights", store)  # type: ignore[attr-defined]
    if backend == "gloo":
        return dist.ProcessGroupGloo(apart, rank, world, timeout)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(apart, rank, world, options)


def send(pairs: Iterable[tuple[str, Tensor]], plan: Plan, channel: BroadcastGroup) -> str:
    """Broadcast every bucket; returns the checksum of what was sent.

    Args:
        pairs: names and tensors in the plan's order. A tensor is read before the next is asked for.

    Raises:
        DataError: `pairs` are not what was planned. The receivers are left waiting then, until
            the channel's timeout.
        InfraError: as `BroadcastGroup.broadcast`.
    """
    import torch

    size = max((one.nbytes for one in plan), default=0)
    buffer = torch.zeros(size, dtype=torch.uint8, device=channel.device)
    walk = iter(pairs)
    digests = []
    for manifest in plan:
        bucket = buffer[: manifest.nbytes].zero_()  # so that equal weights have equal checksums
        for entry in manifest.entries:
            name, tensor = next(walk, ("nothing", bucket[:0]))
            dtype = str(tensor.dtype).removeprefix("torch.")
            if (name, dtype, tuple(tensor.shape)) != (entry.name, entry.dtype, entry.shape):
                raise DataError(
                    f"weights to be sent: {name} {tuple(tensor.shape)} {dtype} came where "
                    f"{entry.name} {entry.shape} {entry.dtype} was planned"
                )
            put(bucket, entry, tensor)
        channel.broadcast(bucket)
        digests.append(checksum(bucket))
    if (more := next(walk, None)) is not None:
        raise DataError(f"weights to be sent: {more[0]} came after all that was planned")
    return _together(digests)


def receive(
    plan: Plan, channel: BroadcastGroup, load: Callable[[Sequence[tuple[str, Tensor]]], object]
) -> str:
    """Take every bucket and hand its tensors to `load`; returns the checksum of what came.

    The tensors are views of memory that is not used again: `load` may keep them for as long as it
    needs them (vLLM does, until a layer is complete).

    Raises:
        InfraError: as `BroadcastGroup.broadcast`.
    """
    import torch

    digests = []
    for manifest in plan:
        bucket = torch.empty(manifest.nbytes, dtype=torch.uint8, device=channel.device)
        channel.broadcast(bucket)
        digests.append(checksum(bucket))
        load(views(bucket, manifest))
    return _together(digests)


def _together(digests: Sequence[str]) -> str:
    """One checksum for those of all buckets, in order."""
    import numpy as np

    return checksum(np.frombuffer(bytes.fromhex("".join(digests)), np.uint8))
