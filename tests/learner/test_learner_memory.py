"""What makes large models fit: bf16 with fp32 masters, adapters, activations computed twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from rayrl.config import AlgoConfig, Config, LearnerConfig, LoraConfig
from rayrl.errors import ConfigError
from rayrl.learner import base
from rayrl.learner.base import Learner
from rayrl.learner.batch import batch_of
from rayrl.learner.deepspeed import DeepSpeedLearner
from rayrl.learner.reference import ReferenceLearner
from rayrl.weights.flat import unflatten
from tests.learner_rows import make_model, make_rows

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = ["reference", 0, 1, 2, 3]
BF16_KINDS = ["reference", 1, 2, 3]
LORA = LoraConfig(rank=4, alpha=8.0)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("memory") / "model")


def make(kind: Any, model_dir: Path, lora: LoraConfig | None = None, **learner: Any) -> Learner:
    stage = 0 if kind == "reference" else kind
    algo = {key: learner.pop(key) for key in ("kl_coef",) if key in learner}
    cfg = Config(
        learner=LearnerConfig(zero_stage=stage, micro_batch_tokens=96, **learner),
        lora=lora or LoraConfig(),
        algo=replace(AlgoConfig(), **algo),
    )
    return (ReferenceLearner if kind == "reference" else DeepSpeedLearner)(cfg, model_dir)


def train(learner: Learner, seeds: range) -> dict[str, float]:
    for seed in seeds:
        batch = batch_of(make_rows(seed))
        metrics = learner.step(batch.rows, batch.totals)
    return metrics


def weights(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: tensor.float() for name, tensor in unflatten(*learner.flat_weights()).items()}


def moved(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return float(torch.sqrt(sum((a[n] - b[n]).square().sum() for n in a)))  # type: ignore[arg-type]


# bf16.


def test_bf16_learns_what_fp32_learns(model_dir: Path) -> None:
    """The fp32 masters go where fp32 training goes; Adam makes noise of the smallest gradients."""

    def path(dtype: str) -> tuple[torch.Tensor, float]:
        learner = make("reference", model_dir, dtype=dtype)
        assert isinstance(learner, ReferenceLearner)
        before = [one.detach().clone() for one in learner._masters]
        norm = train(learner, range(4))["grad_norm"]
        steps = [now - old for now, old in zip(learner._masters, before, strict=True)]
        return torch.cat([step.detach().flatten() for step in steps]), norm

    (full, wanted), (half, norm) = path("float32"), path("bfloat16")
    assert norm == pytest.approx(wanted, rel=0.05)
    assert float(torch.cosine_similarity(full, half, dim=0)) > 0.95
    assert float(half.norm()) == pytest.approx(float(full.norm()), rel=0.02)


@pytest.mark.parametrize("stage", BF16_KINDS[1:])
def test_deepspeed_keeps_fp32_masters_like_the_reference(model_dir: Path, stage: int) -> None:
    """At 1e-5 a step, most updates are smaller than a bf16 weight's rounding: they must add up."""
    want = make("reference", model_dir, dtype="bfloat16", lr=1e-5)
    got = make(stage, model_dir, dtype="bfloat16", lr=1e-5)
    metrics, theirs = train(want, range(12)), train(got, range(12))
    assert theirs["grad_norm"] == pytest.approx(metrics["grad_norm"], rel=0.02)
    start = weights(make("reference", model_dir, dtype="bfloat16"))
    distance = moved(weights(want), start)
    assert distance > 0
    assert moved(weights(got), weights(want)) < 0.1 * distance


def test_no_bf16_gradient_is_kept_beside_its_sum(model_dir: Path) -> None:
    learner = make(1, model_dir, dtype="bfloat16")
    left: list[bool] = []
    step = learner.model.step

    def look() -> None:
        left.extend(one.grad is not None for one in learner.module.parameters())
        step()

    learner.model.step = look
    assert train(learner, range(1))["grad_norm"] > 0
    assert left
    assert not any(left)


@pytest.mark.parametrize("kind", BF16_KINDS)
def test_a_bf16_resume_is_exact(model_dir: Path, tmp_path: Path, kind: Any) -> None:
    one = make(kind, model_dir, dtype="bfloat16", lr=1e-4)
    train(one, range(2))
    one.save(tmp_path / "save")
    train(one, range(2, 4))
    two = make(kind, model_dir, dtype="bfloat16", lr=1e-4)
    two.load(tmp_path / "save")
    train(two, range(2, 4))
    assert (one.flat_weights()[0] == two.flat_weights()[0]).all()
    with pytest.raises(ConfigError, match=r"learner\.dtype=bfloat16, but now it is float32"):
        make(kind, model_dir).load(tmp_path / "save")


@pytest.mark.parametrize("kind", BF16_KINDS)
def test_nothing_moves_where_a_bf16_gradient_is_not_finite(model_dir: Path, kind: Any) -> None:
    learner = make(kind, model_dir, dtype="bfloat16")
    train(learner, range(1))
    before = learner.flat_weights()[0]
    batch = batch_of(make_rows(1))
    rows = [replace(batch.rows[0], advantages=batch.rows[0].advantages * np.nan), *batch.rows[1:]]
    assert learner.step(rows, batch.totals)["skipped"] == 1
    assert (learner.flat_weights()[0] == before).all()


@pytest.mark.parametrize("kind", ["reference", 2])
def test_a_bf16_export_holds_what_was_pushed(model_dir: Path, tmp_path: Path, kind: Any) -> None:
    learner = make(kind, model_dir, dtype="bfloat16")
    train(learner, range(1))
    learner.export(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert again.dtype == torch.bfloat16
    state = again.state_dict()
    for name, tensor in unflatten(*learner.flat_weights()).items():
        assert torch.equal(state[name], tensor)


# Activations computed twice.


@pytest.mark.parametrize("lora", [LoraConfig(), LORA], ids=["all weights", "adapters"])
def test_checkpointing_changes_nothing(model_dir: Path, lora: LoraConfig) -> None:
    kept = make("reference", model_dir, lora)
    twice = make("reference", model_dir, lora, gradient_checkpointing=True)
    train(kept, range(2))
    train(twice, range(2))
    assert (kept.flat_weights()[0] == twice.flat_weights()[0]).all()


def test_checkpointing_keeps_less(model_dir: Path) -> None:
    def saved(**settings: Any) -> int:
        learner = make("reference", model_dir, **settings)
        batch = batch_of(make_rows(0))
        total = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            learner.step(batch.rows, batch.totals)
        return total

    assert saved(gradient_checkpointing=True) < saved()


# Adapters.


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_learn_and_nothing_else_does(model_dir: Path, tmp_path: Path, kind: Any) -> None:
    learner = make(kind, model_dir, LORA)
    start = weights(learner)
    plain = AutoModelForCausalLM.from_pretrained(model_dir).state_dict()
    assert start.keys() == plain.keys() - {"lm_head.weight"}
    assert all(torch.equal(start[name], plain[name]) for name in start)
    train(learner, range(2))
    now = weights(learner)
    changed = {name for name in now if not torch.equal(now[name], start[name])}
    assert changed == {name for name in now if ".self_attn." in name or ".mlp." in name}
    rows = make_rows(5)
    learned = learner.logprobs(rows)

    learner.export(tmp_path / "out")
    merged = make("reference", tmp_path / "out").logprobs(rows)
    assert max(np.abs(a - b).max() for a, b in zip(learned, merged, strict=True)) < 1e-5
    base_model = AutoModelForCausalLM.from_pretrained(model_dir)
    alone = PeftModel.from_pretrained(base_model, tmp_path / "out" / base.ADAPTER)
    state = alone.merge_and_unload().state_dict()
    assert all(torch.allclose(state[name], now[name], atol=1e-6) for name in now)


def test_the_same_seed_draws_the_same_adapters(model_dir: Path) -> None:
    one, two = make("reference", model_dir, LORA), make("reference", model_dir, LORA)
    train(one, range(1))
    torch.rand(3)
    train(two, range(1))
    assert (one.flat_weights()[0] == two.flat_weights()[0]).all()
    other = replace(one.cfg, run=replace(one.cfg.run, seed=1))
    third = ReferenceLearner(other, model_dir)
    names = dict(third.named_weights(adapters=True))
    assert len(names) == 2 * 7 * 2  # A and B of seven layers in two blocks
    first = dict(one.named_weights(adapters=True))
    assert not any(torch.equal(names[n], first[n]) for n in names if "lora_A" in n)


@pytest.mark.parametrize("kind", ["reference", 0, 2, 3])
def test_a_resume_of_adapters_is_exact(model_dir: Path, tmp_path: Path, kind: Any) -> None:
    one = make(kind, model_dir, LORA)
    train(one, range(2))
    one.save(tmp_path / "save")
    train(one, range(2, 4))
    two = make(kind, model_dir, LORA)
    two.load(tmp_path / "save")
    train(two, range(2, 4))
    assert (one.flat_weights()[0] == two.flat_weights()[0]).all()
    with pytest.raises(ConfigError, match=r"lora\.rank=4, but now it is 0"):
        make(kind, model_dir).load(tmp_path / "save")


@pytest.mark.parametrize("kind", ["reference", 3])
def test_the_kl_of_adapters_is_to_the_model_without_them(model_dir: Path, kind: Any) -> None:
    learner = make(kind, model_dir, LORA, kl_coef=0.1)
    assert train(learner, range(1))["kl"] == pytest.approx(0, abs=1e-7)
    assert train(learner, range(1, 3))["kl"] > 1e-7
    rows = make_rows(5)
    want = make("reference", model_dir).logprobs(rows)
    got = learner._reference_logprobs(rows)
    for row, wanted in zip(rows, want, strict=True):
        assert np.abs(got[id(row)] - wanted).max() < 1e-5
    assert learner._reference is None  # no second model is held


def test_a_wrong_target_is_named(model_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"lora\.targets=\['q_prj'\]"):
        make("reference", model_dir, replace(LORA, targets=["q_prj"]))
    only = make("reference", model_dir, replace(LORA, targets=["q_proj", "v_proj"]))
    assert len(dict(only.named_weights(adapters=True))) == 2 * 2 * 2


def test_sharded_weights_are_whole_a_bucket_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = 1 << 20
    monkeypatch.setattr(base, "BUCKET_BYTES", bucket)
    learner = make(3, make_model(tmp_path / "wide", intermediate_size=4096))
    parameters = [p for p in learner.module.parameters() if not p.ds_persist]  # not the small ones
    whole = []
    for _ in learner.named_weights():
        there = [p for p in parameters if p.ds_status.name == "AVAILABLE"]
        whole.append(sum(p.nbytes for p in there))
    matrix = 32 * 4096 * 4
    assert len(parameters) == 6
    assert max(whole) == 2 * matrix <= bucket
    assert all(p.ds_status.name == "NOT_AVAILABLE" for p in parameters)


def test_bf16_attention_sees_what_fp32_attention_sees(tmp_path: Path) -> None:
    """Head by head and mask by mask: values far apart, so that a wrong key would show."""
    for shape in ({}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1}):
        folder = make_model(tmp_path / str(len(shape)), initializer_range=0.5, **shape)
        rows = make_rows(3)
        exact = make("reference", folder).logprobs(rows)
        rounded = make("reference", folder, dtype="bfloat16").logprobs(rows)
        gaps = np.concatenate([np.abs(a - b) for a, b in zip(exact, rounded, strict=True)])
        spread = np.concatenate(exact).std()
        assert gaps.mean() < 0.02 * spread
