"""Dropout, skipped layers and router noise are off in the learner, also where layers are computed
twice; what cannot be turned off is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.opt.modeling_opt import OPTAttention

from rayrl.config import Config, LearnerConfig, LoraConfig
from rayrl.errors import ConfigError
from rayrl.learner.base import Learner
from rayrl.learner.batch import batch_of
from rayrl.learner.deepspeed import DeepSpeedLearner
from rayrl.learner.forward import checkpoint_layers, load_model
from rayrl.learner.reference import ReferenceLearner
from tests.learner_rows import VOCABULARY, make_model, make_rows

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = ["reference", 0, 2, 3]  # or the ZeRO stage


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OPT: dropout by function in every layer, and layers that are skipped by chance."""
    folder = tmp_path_factory.mktemp("noisy") / "model"
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "opt",
        vocab_size=VOCABULARY,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        init_std=0.2,
        dropout=0.5,
        attention_dropout=0.5,
        layerdrop=0.5,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def make(kind: Any, folder: Path, rank: int = 0, **learner: Any) -> Learner:
    stage = 0 if kind == "reference" else kind
    config = Config(
        learner=LearnerConfig(zero_stage=stage, micro_batch_tokens=96, **learner),
        lora=LoraConfig(rank=rank),
    )
    return (ReferenceLearner if kind == "reference" else DeepSpeedLearner)(config, folder)


@pytest.mark.parametrize("rank", [0, 4], ids=["all weights", "adapters"])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_random_in_a_step(noisy: Path, kind: Any, rank: int) -> None:
    batch = batch_of(make_rows(0))

    def trained(**settings: Any) -> bytes:
        learner = make(kind, noisy, rank, **settings)
        for _ in range(2):
            learner.step(batch.rows, batch.totals)
        assert not any(module.training for module in learner.module.modules())
        return learner.flat_weights()[0].tobytes()

    assert trained() == trained() == trained(gradient_checkpointing=True)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_layers_are_computed_twice(
    noisy: Path, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    forward = OPTAttention.forward

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return forward(self, *args, **options)

    monkeypatch.setattr(OPTAttention, "forward", counted)
    batch = batch_of(make_rows(0))
    counts = []
    for checkpointing in (False, True):
        learner = make(kind, noisy, gradient_checkpointing=checkpointing)
        calls = 0
        learner.step(batch.rows, batch.totals)
        counts.append(calls)
    assert counts[1] == 2 * counts[0] > 0


def test_a_model_without_layers_is_not_checkpointed() -> None:
    with pytest.raises(ConfigError, match=r"learner\.gradient_checkpointing=true: Linear"):
        checkpoint_layers(torch.nn.Linear(1, 1))


def always_dropped(self: Any, x: Tensor) -> Tensor:
    return torch.nn.functional.dropout(self.down_proj(self.up_proj(x)), 0.1)


def always_jittered(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(self.up_proj(x)) + 1e-4 * torch.randn_like(x)


@pytest.mark.parametrize("forward", [always_dropped, always_jittered])
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"resid_pdrop": 0.1}, r"\(resid_pdrop=0\.1\)"),
        ({"router": {"jitter": 0.01, "noise_free": False}}, r"\(jitter=0\.01\)"),
        ({}, "its config names nothing of the kind"),
    ],
    ids=["named", "named inside", "not named"],
)
def test_what_stays_random_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    forward: Callable[..., Tensor],
    settings: dict[str, Any],
    said: str,
) -> None:
    folder = make_model(tmp_path, **settings)
    monkeypatch.setattr(LlamaMLP, "forward", forward)
    with pytest.raises(ConfigError, match=rf"LlamaForCausalLM gives other logits each.*{said}"):
        load_model(folder)


def test_a_module_that_stays_random_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model(tmp_path)
    initialize = LlamaMLP.__init__

    def with_noise(self: Any, config: Any) -> None:
        initialize(self, config)
        self.noise_scale = 0.2

    monkeypatch.setattr(LlamaMLP, "__init__", with_noise)
    monkeypatch.setattr(LlamaMLP, "forward", always_dropped)
    with pytest.raises(ConfigError, match=r"\(LlamaMLP\.noise_scale=0\.2\)"):
        load_model(folder)
