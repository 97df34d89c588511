"""What `cluster.sync=auto` comes to. Without ray: a plan is made before anything starts."""

from __future__ import annotations

from rayrl.config import Config

__all__ = ["transport_of"]


def transport_of(config: Config) -> str:
    """What `cluster.sync` comes to: object_store, nccl, gloo or adapters.

    auto is nccl where learners and vLLM replicas have whole GPUs of their own on more than one
    node (`cluster.placement` spreads them), and else the object store.
    """
    cluster = config.cluster
    if cluster.sync != "auto":
        return cluster.sync
    apart = cluster.placement in ("SPREAD", "STRICT_SPREAD") and not cluster.colocate
    gpus = cluster.learner_gpus >= 1 and cluster.replica_gpus >= 1
    return "nccl" if config.engine.kind == "vllm" and apart and gpus else "object_store"
