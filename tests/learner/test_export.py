"""An export is the learner's model: whatever the architecture, and with whatever adapters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import PeftModel
from transformers import AutoModelForCausalLM

from rayrl.config import Config, LearnerConfig, LoraConfig
from rayrl.errors import ConfigError, RunFailed
from rayrl.learner import base, lora, readback
from rayrl.learner.base import Learner
from rayrl.learner.batch import Trajectory, batch_of, supervised_row
from rayrl.learner.deepspeed import DeepSpeedLearner
from rayrl.learner.reference import ReferenceLearner
from rayrl.run.folder import RunDir
from rayrl.weights.flat import unflatten
from tests.architectures import ARCHITECTURES, VOCABULARY, change_weights, names_in, save_model

pytestmark = pytest.mark.usefixtures("one_thread")

ALL: tuple[str, ...] = ("all-linear",)


def rows() -> list[Trajectory]:
    rng = np.random.default_rng(0)
    return [
        supervised_row(rng.integers(3, VOCABULARY, n).tolist(), [i > 0 for i in range(n)])
        for n in (9, 5, 14, 3)
    ]


def learner_of(
    folder: Path, rank: int = 0, targets: tuple[str, ...] = ALL, *, zero: int = -1, **learner: Any
) -> Learner:
    """The reference, or DeepSpeed's at a ZeRO stage."""
    cfg = Config(
        learner=LearnerConfig(zero_stage=max(zero, 0), **{"lr": 1e-6, **learner}),
        lora=LoraConfig(rank=rank, targets=list(targets)),
    )
    return (ReferenceLearner if zero < 0 else DeepSpeedLearner)(cfg, folder)


def plain_logprobs(folder: Path) -> NDArray[np.float32]:
    """Of all rows, by transformers alone, row by row."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    found = []
    for row in rows():
        ids = torch.from_numpy(row.ids.astype(np.int64))[None]
        with torch.no_grad():
            logprobs = model(ids, use_cache=False).logits[0].log_softmax(-1)
        found += [0.0, *logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist()]
    return np.array(found, np.float32)


def logprobs_of(learner: Learner) -> NDArray[np.float32]:
    return np.concatenate(learner.logprobs(rows()))


def stir(learner: Learner) -> None:
    """Give adapters that were just made, and change nothing, weights that change much."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, one in learner.module.named_parameters():
            if ".lora_" in name:
                one.copy_(0.3 * torch.randn(one.shape, generator=rng))


@pytest.mark.parametrize("rank", [0, 4], ids=["all weights", "adapters"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_small_step_exports_nearly_the_start(name: str, rank: int, tmp_path: Path) -> None:
    spread = 0.15 if name == "lfm2" else 0.03  # its convolutions must be seen for what they are
    start = save_model(name, tmp_path / "start", spread)
    learner = learner_of(start, rank, lr=3e-7)
    before = plain_logprobs(start)
    assert np.abs(logprobs_of(learner) - before).max() < 1e-4
    batch = batch_of(rows())
    learner.sft_step(batch.rows, batch.totals)
    learner.export(tmp_path / "out")
    after = plain_logprobs(tmp_path / "out")
    assert np.abs(after - logprobs_of(learner)).max() < 1e-4
    assert 0 < np.abs(after - before).max() < 1e-3
    assert names_in(tmp_path / "out") == names_in(start)


@pytest.mark.filterwarnings(
    "ignore:The following (rank|alpha)_pattern keys"
)  # peft, of its own doing
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_adapters_are_merged_as_they_are_computed(name: str, tmp_path: Path) -> None:
    start = save_model(name, tmp_path / "start")
    learner = learner_of(start, 4)
    stir(learner)
    learned = logprobs_of(learner)
    assert np.abs(learned - plain_logprobs(start)).mean() > 0.05
    learner.export(tmp_path / "out")
    assert np.abs(plain_logprobs(tmp_path / "out") - learned).max() < 1e-4
    assert names_in(tmp_path / "out") == names_in(start)
    pushed = unflatten(*learner.flat_weights())  # what replicas get is the same
    assert list(pushed) == list(learner_of(start).manifest().names())
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(exported[key], one) for key, one in pushed.items())
    alone = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(start), tmp_path / "out" / base.ADAPTER
    )
    merged = alone.merge_and_unload().state_dict()
    assert all(torch.allclose(merged[key], one, atol=1e-6) for key, one in pushed.items())


@pytest.mark.parametrize("rank", [0, 4])
def test_fused_experts_stay_as_the_start_has_them(rank: int, tmp_path: Path) -> None:
    start = save_model("qwen3_moe", tmp_path / "start", save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in names_in(start)
    learner = learner_of(start, rank)
    learner.export(tmp_path / "out")
    assert names_in(tmp_path / "out") == names_in(start)


TARGETS = {
    "embeddings": ("llama", ("embed_tokens", "q_proj")),
    "a head": ("llama", ("lm_head",)),
    "embeddings and head": ("gpt2 untied", ("wte", "lm_head", "c_attn")),
    "learned positions": ("gpt2", ("wpe", "c_proj")),
    "experts": ("qwen3_moe", ("gate_proj", "up_proj", "down_proj")),
    "a router": ("qwen3_moe", ("gate",)),
    "inside a convolution": ("lfm2", ("in_proj", "out_proj")),
}


@pytest.mark.parametrize("zero", [-1, 3], ids=["reference", "ZeRO 3"])
@pytest.mark.parametrize("case", TARGETS)
def test_adapters_on_other_layers_are_not_lost(case: str, zero: int, tmp_path: Path) -> None:
    name, targets = TARGETS[case]
    start = save_model(name, tmp_path / "start")
    if zero == 3 and name == "qwen3_moe":
        with pytest.raises(
            ConfigError, match=r"learner\.zero_stage=3: .*set learner\.zero_stage=2"
        ):
            learner_of(start, 4, targets, zero=zero)
        return
    learner = learner_of(start, 4, targets, zero=zero, lr=0.1)
    batch = batch_of(rows())
    for _ in range(2):
        learner.sft_step(batch.rows, batch.totals)
    learned = logprobs_of(learner)
    learner.export(tmp_path / "out")
    assert np.abs(plain_logprobs(tmp_path / "out") - learned).max() < 1e-4
    assert np.abs(learned - plain_logprobs(start)).max() > 1e-3


@pytest.mark.parametrize(
    ("name", "targets", "complaint"),
    [
        ("llama tied", ("lm_head", "q_proj"), "lm_head is tied"),
        ("llama tied", ("embed_tokens",), r"model\.embed_tokens is tied"),
        ("gpt2", ("wte", "c_attn"), r"transformer\.wte is tied"),
        ("mixtral", ("w1",), "w3"),  # peft's own words: w1 and w3 are one weight
        ("lfm2", ("conv",), "not supported"),
        ("llama", ("nothing",), "nothing"),
    ],
)
def test_adapters_that_would_be_lost_are_refused(
    name: str, targets: tuple[str, ...], complaint: str, tmp_path: Path
) -> None:
    start = save_model(name, tmp_path)
    with pytest.raises(ConfigError, match=rf"lora\.targets=\['{targets[0]}'.*(?s:.*){complaint}"):
        learner_of(start, 4, targets)


def test_a_layer_that_adapters_cannot_be_on_is_refused_at_the_start(tmp_path: Path) -> None:
    """PhiMoE's router is a linear layer that returns a pair."""
    from transformers import PhimoeConfig, PhimoeForCausalLM

    settings = {**ARCHITECTURES["mixtral"], "router_jitter_noise": 0.0}
    PhimoeForCausalLM(PhimoeConfig(**settings)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"lora\.targets=\['all-linear'\]: PhimoeForCausalLM"):
        learner_of(tmp_path, 4)
    learner_of(tmp_path, 4, ("q_proj",)).export(tmp_path / "out")


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("name", ["llama tied", "gpt2", "qwen3_moe", "lfm2"])
def test_a_bf16_export_is_near_enough(name: str, rank: int, tmp_path: Path) -> None:
    start = save_model(name, tmp_path / "start", spread=0.3)
    learner = learner_of(start, rank, dtype="bfloat16", lr=1e-2)
    batch = batch_of(rows())
    for _ in range(3):
        learner.sft_step(batch.rows, batch.totals)
    learner.export(tmp_path / "out")
    assert names_in(tmp_path / "out") == names_in(start)


# What is not the learner's model does not become one.


def export_into(run: Path, learner: Learner) -> None:
    """As the programs do."""
    with RunDir(run, learner.cfg) as folder, folder.whole("model") as path:
        learner.export(path)


def test_weights_that_were_written_wrong_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = learner_of(save_model("llama tied", tmp_path / "start"))
    check = readback.misfit

    def damaged(folder: Path, *args: Any) -> str:
        def change(weights: Mapping[str, Any]) -> dict[str, Any]:
            changed = dict(weights)
            changed["model.layers.1.mlp.up_proj.weight"] += 0.5
            changed["model.norm.weight"][3] += 2.0
            return changed

        change_weights(folder, change)
        return check(folder, *args)

    monkeypatch.setattr(base, "misfit", damaged)
    with pytest.raises(RunFailed) as failed:
        export_into(tmp_path / "run", learner)
    said = str(failed.value)
    assert "2 of 20 weights differ (model.norm.weight by 2, model.layers.1.mlp.up_proj" in said
    assert "the checkpoint is kept" in said
    assert [one.name for one in (tmp_path / "run").iterdir() if "model" in one.name] == []
    monkeypatch.undo()
    export_into(tmp_path / "run", learner)
    assert (tmp_path / "run" / "model" / "config.json").is_file()


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "lfm2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merge_that_is_not_what_the_learner_computes_fails(
    name: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = learner_of(save_model(name, tmp_path / "start", spread=0.3), 4, dtype=dtype)
    stir(learner)
    learner.export(tmp_path / "right")
    right = lora._delta
    monkeypatch.setattr(lora, "_delta", lambda layer: -right(layer))
    with pytest.raises(RunFailed, match=r"nats per token off.*merged adapters"):
        learner.export(tmp_path / "wrong")


def test_an_export_that_cannot_be_loaded_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = learner_of(save_model("gpt2", tmp_path / "start"))
    whole = base.unflatten

    def lacking(*args: Any) -> dict[str, Any]:
        weights = whole(*args)
        weights.pop("transformer.ln_f.bias")
        return weights

    monkeypatch.setattr(base, "unflatten", lacking)
    with pytest.raises(RunFailed, match=r"cannot be loaded: .*1 missing \(transformer.ln_f.bias"):
        learner.export(tmp_path / "out")


def test_the_probe_fits_any_vocabulary() -> None:
    for vocabulary in (2, 5, 300_000):
        probe = readback.probe_rows(vocabulary)
        assert [len(row.ids) for row in probe] == [8, 5, 7, 2]
        assert all(0 <= i < vocabulary for row in probe for i in row.ids)
