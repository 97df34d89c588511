"""How Ray says that a process is gone, whatever took it."""

from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, WorkerCrashedError

__all__ = ["ACTOR_DIED"]

ACTOR_DIED = (RayActorError, OutOfMemoryError, NodeDiedError, WorkerCrashedError)
"""Died, or killed by Ray because its node had no memory left (which is an error of its own)."""
