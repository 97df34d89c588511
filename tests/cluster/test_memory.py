"""The estimate of what a run's processes take."""

from __future__ import annotations

import json
from pathlib import Path
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
    # weights, three pushes, gradients, and two moments, all in fp32
    held = size * (4 + 3 * 4 + 4 + 8)
    # 4 layers of 14 × 128 + 3 × 128 + 4 × 384, and the logits of 368 ids with their gradient
    token = 4 * (4 * (1792 + 384 + 1536) + 2 * 368)
    expected = memory.LIBRARIES + memory.LEARNER + (held + 1000 * token) / GIB
    assert gb({"learner.micro_batch_tokens": 1000}, "learner") == pytest.approx(expected)


def test_a_replica_worked_out_by_hand() -> None:
    # 100 conversations of 200 ids, keys and values of 4 layers of 128, and the weights
    held = 100 * 200 * 2 * 4 * 128 * 4 + 900_224 * 4
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
        (
            {"engine.dtype": "bfloat16", "learner.dtype": "bfloat16"},
            {"engine.dtype": "float32", "learner.dtype": "bfloat16"},
        ),
        (
            {"learner.zero_stage": 1, "learner.dtype": "bfloat16"},
            {"learner.zero_stage": 2, "learner.dtype": "bfloat16"},
        ),
    ],
)
@pytest.mark.parametrize("base", [BASE, PRETRAINED])
def test_what_takes_less(base: dict[str, Any], less: dict[str, Any], more: dict[str, Any]) -> None:
    assert gb(base | less) < gb(base | more)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"hidden_size": 64, "num_hidden_layers": 2}',
        '{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": [9]}',
    ],
)
def test_a_model_of_unknown_sizes_has_no_estimate(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    for path in (tmp_path, tmp_path / "none"):
        assert not shares(configured({"model.path": str(path)}), learns=True, plays=True)


@pytest.mark.parametrize(
    "settings",
    [
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 9, "n_inner": None},
        {
            "text_config": {
                "hidden_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "head_dim": None,
                "vocab_size": 9,
            }
        },
    ],
)
def test_sizes_by_other_names(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(settings))
    token = 4 * (2 * (14 * 64 + 3 * 64 + 4 * 256) + 2 * 9)
    changes = {"model.path": str(tmp_path), "learner.micro_batch_tokens": 1000}
    expected = memory.LIBRARIES + memory.LEARNER + 1000 * token / GIB
    assert gb(changes, "learner") == pytest.approx(expected)


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
