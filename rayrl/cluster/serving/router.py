"""How Serve routes the calls of `inference_client.ServeReplicas`."""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

__all__ = ["IndexRouter"]


class IndexRouter(RequestRouter):  # type: ignore[misc]
    """Routes by the handle's `session_id`: the id of a replica, or an index.

    Index k is replica k, modulo the number of live replicas. A client selects an index per
    conversation (`replica_selector.py`), so that a turn finds its KV cache and a batch goes to one
    replica. Serve's ConsistentHashRouter is sticky too, but with as many indexes as replicas its
    ring leaves some replicas with two of them and some with none. When a replica dies its indexes
    move to the others, which can answer as well: requests carry their whole context.

    A call for the id of a replica that has left goes to another one, which refuses it
    (`streams.NoStream`): waiting for the replica would be in vain.
    """

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Ranks: the replica that is meant, then the others in order of their ids."""
        if pending_request is None or not candidate_replicas:
            return [candidate_replicas] if candidate_replicas else []
        pending_request.routing_context.should_backoff = True
        ordered = sorted(candidate_replicas, key=lambda replica: replica.replica_id.unique_id)
        meant = pending_request.metadata.session_id
        ids = [replica.replica_id.unique_id for replica in ordered]
        if meant in ids:
            first = ids.index(meant)
        else:
            first = int(meant) % len(ordered) if meant.isdecimal() else 0
        return [[replica] for replica in ordered[first:] + ordered[:first]]
