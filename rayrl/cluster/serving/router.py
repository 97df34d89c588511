"""Which replica answers: the one that keeps the conversation's KV."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

__all__ = ["LaneRouter"]


class LaneRouter(RequestRouter):  # type: ignore[misc]
    """Sends lane k (a number in the handle's `session_id`) to replica k modulo the live replicas.

    An env worker puts a conversation into a lane (`replica_selector.py`) and sends all of a lane's
    requests together, so that a batch goes to one replica and a turn finds its KV. Serve's
    ConsistentHashRouter is sticky too, but with as many lanes as replicas its ring leaves some
    replicas with two lanes and some with none. When a replica dies its lanes move to the
    others, which can answer as well: requests carry their whole context.
    """

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Ranks: the lane's replica, then the others in order."""
        if pending_request is None or not candidate_replicas:
            return [candidate_replicas] if candidate_replicas else []
        pending_request.routing_context.should_backoff = True
        ordered = sorted(candidate_replicas, key=lambda replica: replica.replica_id.unique_id)
        lane: Any = pending_request.metadata.session_id
        first = int(lane) % len(ordered) if lane else 0
        return [[replica] for replica in ordered[first:] + ordered[:first]]
