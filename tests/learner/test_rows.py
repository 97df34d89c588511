"""Models that mix tokens by more than attention compute whole rows, and the same numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Lfm2Config, Lfm2ForCausalLM

from rayrl.config import Config, LearnerConfig
from rayrl.learner.attention import IMPLEMENTATION
from rayrl.learner.batch import batch_of
from rayrl.learner.forward import load_model
from rayrl.learner.reference import ReferenceLearner
from tests.learner_rows import VOCABULARY, make_model, make_rows


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LFM2: one layer of attention, two of short convolutions."""
    folder = tmp_path_factory.mktemp("hybrid") / "model"
    torch.manual_seed(0)
    config = Lfm2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        block_auto_adjust_ff_dim=False,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        layer_types=["conv", "full_attention", "conv"],
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    Lfm2ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_which_models_may_share_prefixes(hybrid: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    llama = load_model(make_model(tmp_path / "llama"), dtype=dtype)
    assert llama.config._attn_implementation == IMPLEMENTATION
    assert load_model(hybrid, dtype=dtype).config._attn_implementation == "sdpa"


def test_a_hybrid_has_the_logprobs_and_gradients_of_each_row_alone(hybrid: Path) -> None:
    learner = ReferenceLearner(Config(learner=LearnerConfig(micro_batch_tokens=96)), hybrid)
    plain = AutoModelForCausalLM.from_pretrained(hybrid).train()
    rows = make_rows(0)
    found = learner.logprobs(rows)
    for row, values in zip(rows, found, strict=True):
        ids = torch.from_numpy(row.ids.astype(np.int64))
        logprobs = plain(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
        wanted = torch.cat([torch.zeros(1), logprobs[:-1].gather(1, ids[1:, None])[:, 0]])
        wanted = wanted.detach().numpy() * row.loss_mask
        assert np.abs(values - wanted).max() < 1e-5
    batch = batch_of(rows)
    metrics = learner.step(batch.rows, batch.totals)
    assert metrics["updates"] == 1
    assert metrics["grad_norm"] > 0
