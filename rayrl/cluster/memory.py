"""What the processes of a run will take of a machine's memory, as `rayrl plan` prints it.

An estimate from above for architectures like Llama: a micro-batch counts as full, and so does the
KV cache. The constants were measured on Linux with torch 2.13, Ray 2.60, DeepSpeed 0.19 and vLLM
0.32 (`benchmarks/RESULTS.md`), as proportional set sizes, which count what processes share once.
What is on a GPU is not in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayrl.config import Config
from rayrl.errors import ConfigError
from rayrl.weights.model_dir import micro_batch_tokens, model_dir, parameter_count

__all__ = ["DTYPE_BYTES", "Share", "shares"]

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
GIB = 2**30

# GiB of a process without a model; LIBRARIES are shared by the ranks of a machine
DRIVER, ENV_WORKER, RAY = 0.25, 0.25, 0.8
LIBRARIES, LEARNER, REPLICA, VLLM = 0.4, 0.2, 0.2, 1.8


@dataclass(frozen=True, slots=True)
class Share:
    """What processes of a kind take together.

    Attributes:
        name: of the kind.
        count: of processes.
        gb: GiB of all of them.
    """

    name: str
    count: int
    gb: float


def shares(config: Config, *, learns: bool, plays: bool) -> list[Share]:
    """The largest first; nothing if the model at `model.path` is missing or its sizes are unknown.

    Args:
        learns: whether there are learners.
        plays: whether there are env workers and replicas.
    """
    try:
        folder = model_dir(config.model.path)
        shape, size = _Shape.of(folder), parameter_count(folder)
    except (ConfigError, OSError, ValueError, TypeError, AttributeError):
        return []
    return sorted(_shares(config, shape, size, learns, plays), key=lambda share: -share.gb)


@dataclass(frozen=True, slots=True)
class _Shape:
    """Sizes of a model; `keys` is what a token's keys have in a layer, over all heads."""

    layers: int
    hidden: int
    inner: int
    keys: int
    vocabulary: int
    positions: int

    @classmethod
    def of(cls, folder: Path) -> _Shape:
        """Read config.json.

        Raises:
            TypeError: a size is missing or no number.
        """
        settings = json.loads((folder / "config.json").read_text("utf-8"))
        settings = settings.get("text_config") or settings

        def size(*names: str, default: int | None = None) -> int:
            found: Any = next((one for name in names if (one := settings.get(name))), default)
            return int(found)

        layers = size("num_hidden_layers", "n_layer")
        hidden = size("hidden_size", "n_embd", "d_model")
        heads = size("num_attention_heads", "n_head")
        width = size("head_dim", default=hidden // heads)
        return cls(
            layers,
            hidden,
            size("intermediate_size", "n_inner", default=4 * hidden),
            width * size("num_key_value_heads", default=heads),
            size("vocab_size"),
            size("max_position_embeddings", "n_positions", default=0),
        )


def _shares(config: Config, shape: _Shape, size: int, learns: bool, plays: bool) -> Iterator[Share]:
    cluster = config.cluster
    if learns:
        ranks = config.learner.world_size
        each = LEARNER + (0 if cluster.learner_gpus else _of_learner(config, shape, size) / GIB)
        yield Share("learner", ranks, LIBRARIES + ranks * each)
    if plays:
        vllm = config.engine.kind == "vllm"
        each = VLLM if vllm else REPLICA
        if not cluster.replica_gpus:
            each += _of_engine(config, shape, size) / GIB
        yield Share("replica", cluster.replicas, cluster.replicas * each)
        workers = cluster.most_env_workers
        yield Share("env worker", workers, workers * ENV_WORKER)
    yield Share("Ray and the driver", 1, RAY + DRIVER)


def _of_learner(config: Config, shape: _Shape, size: int) -> float:
    """Bytes of one rank."""
    learner = config.learner
    sharded = 1 / learner.world_size
    bits16 = learner.dtype == "bfloat16"
    trained = 0 if config.lora.rank else size  # adapters are small
    # weights, and in the object store those of two pushes, and what a third may have touched
    held = float(size * DTYPE_BYTES[learner.dtype] * 4)
    if learner.zero_stage == 1 and bits16:  # Adam's moments, fp32 weights and sums of gradients
        held += trained * (8 + 4 + 4) * sharded
    elif learner.zero_stage or bits16:  # and bf16 gradients, and a flat copy of the sums
        held += trained * DTYPE_BYTES[learner.dtype]
        held += trained * (8 + 4 + 4 + 4 * bits16) * sharded
    else:
        held += trained * (DTYPE_BYTES[learner.dtype] + 8)
    if config.algo.kl_coef > 0 and not config.lora.rank:
        held += size * DTYPE_BYTES[learner.dtype]  # the reference
    tokens = micro_batch_tokens(config, model_dir(config.model.path), gpu=False)
    return held + tokens * _of_token(config, shape)


def _of_token(config: Config, shape: _Shape) -> int:
    """Bytes that one token's forward pass leaves for its backward pass."""
    # two norms in fp32, projections, attention and residuals; of the MLP four products
    layer = 14 * shape.hidden + 3 * shape.keys + 4 * shape.inner
    checkpoints = layer + shape.layers * shape.hidden
    kept = checkpoints if config.learner.gradient_checkpointing else shape.layers * layer
    logits = 2 * shape.vocabulary  # and their gradient
    return (kept + logits) * DTYPE_BYTES[config.learner.dtype]


def _of_engine(config: Config, shape: _Shape, size: int) -> float:
    """Bytes of one replica's model and KV cache."""
    engine = config.engine
    cache = engine.kv_cache_gb * GIB
    if engine.kind == "vllm":
        # it packs the weights for oneDNN, and keeps the mapped buffer of a push
        width = DTYPE_BYTES.get(engine.dtype, DTYPE_BYTES[config.learner.dtype])
        return 2 * size * width + max(GIB, cache)
    longest = engine.max_len or shape.positions
    token = 2 * shape.layers * shape.keys * DTYPE_BYTES["float32"]  # in bf16 half, in C++
    width = DTYPE_BYTES.get(engine.dtype, 4)
    copies = 1 if width == DTYPE_BYTES[config.learner.dtype] else 2  # a push as well
    return copies * size * width + min(cache, engine.max_live * longest * token)
