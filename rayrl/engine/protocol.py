"""What the act half asks of whoever generates, and what a replica asks of its engine."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from rayrl.types import Completion, Delta, Request

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from rayrl.weights.broadcast import Plan, Rendezvous
    from rayrl.weights.flat import Manifest

__all__ = ["Engine", "Generator", "Part", "Streamed"]

Part = Literal["weights", "kv"]
"""What an engine that slept takes memory for again."""


@runtime_checkable
class Generator(Protocol):
    """What a `PolicyPlayer` needs: an engine in this process, or a client of a remote one.

    A generator may also have `release(sessions: Sequence[str]) -> None`. It is called once for a
    conversation that is over and must return at once. It is a hint: nothing breaks if it is lost.
    """

    async def generate(self, request: Request) -> Completion:
        """Answer one request; hundreds are in flight at once.

        `request.prompt_ids` is the whole context. If it leaves no room for a single new id the
        answer has no ids and finish "length". The same request on the same weights gives the same
        ids, whatever else is in flight.

        Raises:
            InfraError: the engine is gone or did not answer in time; the episode is played again.
            StaleWeights: it holds weights older than `request.min_version`.
        """
        ...


@runtime_checkable
class Engine(Generator, Protocol):
    """What a replica wraps.

    Attributes:
        version: weights version it generates with.
        max_len: ids that one conversation can have, prompt and completion together.
    """

    version: int
    max_len: int

    async def generate(self, request: Request) -> Completion:
        """As `Generator.generate`, batched continuously with everything else in flight."""
        ...

    def stream(self, request: Request) -> AsyncGenerator[Delta, None]:
        """The same answer as it is made, in at least one part; the last has a `finish`.

        Closing the generator, or cancelling who awaits it, ends the generation and frees its place;
        so does cancelling `generate`.
        """
        ...

    async def load_weights(self, version: int, flat: NDArray[np.uint8], manifest: Manifest) -> str:
        """Take over new weights (see `weights.flat`), and forget any KV made with the old ones.

        Returns:
            The checksum of what it holds *now*, computed from its own parameters.
        """
        ...

    async def sleep(self) -> None:
        """Let a learner have the accelerator: give back what memory there is to give back.

        Weights may be dropped. What comes meanwhile waits.
        """
        ...

    async def wake(self, part: Part) -> None:
        """Take memory for "weights", then (after they were pushed) for "kv", and answer again."""
        ...

    async def check(self) -> None:
        """Return if it can still answer; a replica whose engine cannot is replaced.

        Raises:
            InfraError: it cannot.
        """
        ...

    def release(self, sessions: Sequence[str]) -> None:
        """Free what is kept for conversations that are over; unknown names are fine."""
        ...

    async def close(self) -> None:
        """Stop, failing what is in flight with InfraError. Closing twice is fine."""
        ...


@runtime_checkable
class Streamed(Engine, Protocol):
    """An engine that can also take weights from a channel (`rayrl.weights.broadcast`).

    Attributes:
        workers: members of a channel it comes with.
    """

    workers: int

    async def join(self, meeting: Rendezvous, first: int) -> None:
        """Join a channel as ranks `first` and up, leaving any other; waits for all members.

        Raises:
            InfraError: they did not meet in time.
        """
        ...

    async def receive(self, version: int, plan: Plan) -> str:
        """Take over what the channel's sender broadcasts; otherwise as `load_weights`.

        Returns:
            The checksum of all buckets.
        """
        ...
