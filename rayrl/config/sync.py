"""How weights reach the replicas, and whether learners and replicas can share them, and GPUs."""

from __future__ import annotations

from rayrl.config.schema import Config
from rayrl.errors import ConfigError

__all__ = ["check_sync", "transport_of"]


def check_sync(config: Config) -> None:
    """Raise ConfigError if `cluster.sync` or `cluster.colocate` cannot work with the rest."""
    cluster = config.cluster
    if cluster.sync in ("nccl", "gloo") and config.engine.kind != "vllm":
        raise _wrong(
            f"sync={cluster.sync}",
            f"engine.kind={config.engine.kind} takes no stream; choose engine=vllm, or "
            "cluster.sync=object_store.",
        )
    if cluster.sync == "nccl":
        for key, gpus in (
            ("learner_gpus", cluster.learner_gpus),
            ("replica_gpus", cluster.replica_gpus),
        ):
            if gpus < 1:
                raise _wrong(
                    "sync=nccl",
                    f"every member needs a GPU of its own, and cluster.{key}={gpus:g}; set it to "
                    "1, or choose cluster.sync=object_store (a shared GPU) or gloo (CPUs).",
                )
    if cluster.sync == "gloo" and (cluster.learner_gpus or cluster.replica_gpus):
        raise _wrong("sync=gloo", "is for CPUs; choose nccl or object_store for GPUs.")
    if cluster.sync == "adapters":
        _check_adapters(config)
    if cluster.colocate:
        _check_colocated(config)


def _check_adapters(config: Config) -> None:
    if config.engine.kind != "vllm":
        raise _wrong(
            "sync=adapters",
            f"engine.kind={config.engine.kind} takes whole weights; choose engine=vllm, or "
            "cluster.sync=object_store.",
        )
    if not config.lora.rank:
        raise _wrong(
            "sync=adapters",
            "lora.rank=0 trains all weights, so there are no adapters; set lora.rank=16, or "
            "choose cluster.sync=auto.",
        )
    if config.cluster.colocate:
        raise _wrong(
            "sync=adapters",
            "a replica that sleeps gives up its weights, which adapters alone do not bring back; "
            "set cluster.colocate=false, or cluster.sync=object_store.",
        )
    if config.engine.on_update == "keep":
        raise _wrong(
            "sync=adapters",
            "engine.on_update=keep changes weights in the middle of an answer, but vLLM keeps each "
            "request on its adapter; set engine.on_update=wait or abort.",
        )


def _check_colocated(config: Config) -> None:
    cluster, ranks = config.cluster, config.learner.world_size
    share, rest = cluster.replica_gpus, cluster.learner_gpus
    if config.engine.kind != "vllm" and (share or rest):
        raise _wrong(
            "colocate=true",
            f"engine.kind={config.engine.kind} does not free a GPU while the learner works; choose "
            "engine=vllm, or share the GPU without taking turns: cluster=gpu.",
        )
    if config.train.max_lag:
        raise _wrong(
            "colocate=true",
            f"train.max_lag={config.train.max_lag} plays while the learner works, and here they "
            "take turns; set train.max_lag=0.",
        )
    if share == rest == 0:
        return  # CPUs take turns as well
    if not (0.5 < share < 1 and 0 < rest <= 1 - share):
        raise _wrong(
            "colocate=true",
            f"cluster.replica_gpus={share:g} and cluster.learner_gpus={rest:g}: a replica's share "
            "must be over half, so that no GPU gets two, and a rank's no more than what is left; "
            "set 0.6 and 0.4.",
        )
    if cluster.replicas != ranks:
        raise _wrong(
            "colocate=true",
            f"cluster.replicas={cluster.replicas} and learner.world_size={ranks}: each GPU has one "
            "of both; set them equal.",
        )


def _wrong(what: str, why: str) -> ConfigError:
    return ConfigError(f"cluster.{what}: {why}")


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
