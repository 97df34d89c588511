"""Protocols: what rollouts need of a generator, and what a replica needs of its engine."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from rayrl.types import Completion, Delta, Request

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from rayrl.weights.broadcast import Plan, Rendezvous
    from rayrl.weights.flat import Manifest

__all__ = ["BroadcastEngine", "Engine", "Generator", "Part"]

Part = Literal["weights", "kv"]
"""The memory that a sleeping engine reallocates when it wakes."""


@runtime_checkable
class Generator(Protocol):
    """What a `PolicyPlayer` needs: an engine in this process, or a client of a remote one.

    A generator may also have `release(sessions: Sequence[str]) -> None`, which is called once per
    conversation after its end and must not block. It is a hint: losing a call breaks nothing.
    """

    async def generate(self, request: Request) -> Completion:
        """Answer one request; hundreds are in flight at once.

        `request.prompt_ids` is the whole context. If it leaves no room for a new id, the completion
        has no ids and finish "length". The same request on the same weights gives the same ids,
        whatever else is in flight.

        Raises:
            InfraError: the engine is gone or timed out; the request or episode can be retried.
            StaleWeights: the engine's weights are older than `request.min_version`.
        """
        ...


@runtime_checkable
class Engine(Generator, Protocol):
    """What a replica wraps."""

    @property
    def max_len(self) -> int:
        """Maximum ids per conversation, prompt and completion together."""
        ...

    @property
    def version(self) -> int:
        """Version of the weights it generates with."""
        ...

    async def generate(self, request: Request) -> Completion:
        """Answer one request as `Generator.generate`, with continuous batching."""
        ...

    def stream(self, request: Request) -> AsyncGenerator[Delta, None]:
        """Yield the completion of `generate` in one or more deltas; the last has a `finish`.

        Closing the generator, or cancelling the task that awaits it, ends the generation and frees
        its resources; so does cancelling `generate`.
        """
        ...

    async def load_weights(self, version: int, flat: NDArray[np.uint8], manifest: Manifest) -> str:
        """Load new weights (see `weights.flat`), and drop the KV cache of the old ones.

        Returns:
            The checksum of the weights it holds *now*, computed by the engine itself.
        """
        ...

    async def sleep(self) -> None:
        """Free as much accelerator memory as possible, for a learner to use.

        Weights may be dropped. Requests that arrive meanwhile wait.
        """
        ...

    async def wake(self, part: Part) -> None:
        """Reallocate memory for "weights", then, once they are pushed, for "kv", and resume."""
        ...

    async def check(self) -> None:
        """Check that the engine can still answer; Serve replaces the replica if it cannot.

        Raises:
            InfraError: it cannot.
        """
        ...

    def release(self, sessions: Sequence[str]) -> None:
        """Free the cache of sessions that have ended; unknown names are ignored."""
        ...

    async def close(self) -> None:
        """Stop; requests in flight fail with InfraError. Closing twice is allowed."""
        ...


@runtime_checkable
class BroadcastEngine(Engine, Protocol):
    """An engine that can also receive weights by broadcast (`rayrl.weights.broadcast`)."""

    @property
    def workers(self) -> int:
        """Number of its processes that join a broadcast group."""
        ...

    async def join(self, rendezvous: Rendezvous, first_rank: int) -> None:
        """Join a broadcast group as ranks `first_rank` and up, after leaving any earlier group.

        Waits for all members.

        Raises:
            InfraError: not all members joined in time.
        """
        ...

    async def receive(self, version: int, plan: Plan) -> str:
        """Load the weights that the group's sender broadcasts; otherwise as `load_weights`.

        Returns:
            The checksum of all buckets.
        """
        ...
