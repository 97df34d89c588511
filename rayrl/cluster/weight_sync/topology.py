"""Resolve `cluster.sync`, without importing ray: `rayrl plan` runs before anything starts."""

from __future__ import annotations

from rayrl.config import Config

__all__ = ["transport_of"]


def transport_of(config: Config) -> str:
    """Resolve `cluster.sync` to object_store, nccl, gloo or adapters.

    auto is nccl if learners and vLLM replicas have whole GPUs of their own on more than one node
    (`cluster.placement` spreads them), otherwise object_store.
    """
    cluster = config.cluster
    if cluster.sync != "auto":
        return cluster.sync
    separate = cluster.placement in ("SPREAD", "STRICT_SPREAD") and not cluster.colocate
    gpus = cluster.learner_gpus >= 1 and cluster.replica_gpus >= 1
    return "nccl" if config.engine.kind == "vllm" and separate and gpus else "object_store"
