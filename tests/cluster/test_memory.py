"""The estimate of what a run's processes take."""

from __future__ import annotations

from typing import Any

import pytest

from rayrl.cluster import memory
from rayrl.cluster.memory import GIB, shares
from rayrl.config import Config
from rayrl.config.load import with_settings
from rayrl.weights.model_dir import EMBEDDED, model_dir, parameter_count

BASE = {
    "learner.zero_stage": 1,
    "learner.world_size": 2,
    "algo.kl_coef": 0.1,
    "engine.max_len": 512,
}
PRETRAINED = BASE | {"learner.dtype": "bfloat16", "engine.dtype": "bfloat16"}


def gb(settings: dict[str, Any], name: str = "") -> float:
    found = shares(configured(settings), learns=True, plays=True)
    return sum(share.gb for share in found if name in share.name)


def configured(settings: dict[str, Any]) -> Config:
    return with_settings(Config(), settings)


def test_a_learner_worked_out_by_hand() -> None:
    size = parameter_count(model_dir(EMBEDDED))
    assert size == 900_224
    # weights, gradients, a push and its copy, and two moments, all in fp32
    held = size * (4 + 4 + 4 + 4 + 8)
    # 4 layers of 14 × 128 + 3 × 128 + 4 × 384, and the logits of 368 ids with their gradient
    token = 4 * (4 * (1792 + 384 + 1536) + 2 * 368)
    expected = memory.LIBRARIES + memory.LEARNER + (held + 1000 * token) / GIB
    assert gb({"learner.micro_batch_tokens": 1000}, "learner") == pytest.approx(expected)


def test_a_replica_worked_out_by_hand() -> None:
    # 100 conversations of 200 ids, keys and values of 4 layers of 128, and the weights twice
    held = 100 * 200 * 2 * 4 * 128 * 4 + 2 * 900_224 * 4
    settings = {"engine.max_live": 100, "engine.max_len": 200}
    assert gb(settings, "replica") == pytest.approx(memory.REPLICA + held / GIB)


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"learner.micro_batch_tokens": 512}, {"learner.micro_batch_tokens": 4096}),
        ({"learner.gradient_checkpointing": True}, {}),
        ({"learner.world_size": 1}, {"learner.world_size": 2}),
        ({"algo.kl_coef": 0.0}, {"algo.kl_coef": 0.1}),
        ({"learner.micro_batch_tokens": 9, "lora.rank": 8}, {"learner.micro_batch_tokens": 9}),
        ({"engine.kv_cache_gb": 0.1}, {"engine.kv_cache_gb": 0.2}),
        ({"engine.max_live": 8}, {"engine.max_live": 64}),
        ({"engine.max_len": 128}, {"engine.max_len": 256}),
        ({"cluster.replicas": 1}, {"cluster.replicas": 3}),
        ({"cluster.env_workers": 1}, {"cluster.env_workers": 4}),
        ({"cluster.learner_gpus": 1}, {}),
        ({"cluster.replica_gpus": 1}, {}),
        ({"engine.kind": "embedded"}, {"engine.kind": "vllm"}),
    ],
)
@pytest.mark.parametrize("base", [BASE, PRETRAINED])
def test_what_takes_less(base: dict[str, Any], less: dict[str, Any], more: dict[str, Any]) -> None:
    assert gb(base | less) < gb(base | more)


def test_only_what_there_is_counts() -> None:
    config = configured({})
    names = {
        (learns, plays): {share.name for share in shares(config, learns=learns, plays=plays)}
        for learns in (True, False)
        for plays in (True, False)
    }
    always = {"Ray and the driver"}
    assert names[True, False] == always | {"learner"}
    assert names[False, True] == always | {"replica", "env worker"}
    assert names[True, True] == names[True, False] | names[False, True]
