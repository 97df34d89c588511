"""Models that mix tokens by more than attention compute whole rows, and the same numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Lfm2Config, Lfm2ForCausalLM

from rayrl.config import Config, LearnerConfig
from rayrl.learner import attention
from rayrl.learner.attention import FLEX_BLOCK, IMPLEMENTATION, block_mask
from rayrl.learner.batch import batch_of
from rayrl.learner.forward import load_model
from rayrl.learner.packing import pack
from rayrl.learner.reference import ReferenceLearner
from rayrl.learner.rows import logits_before
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


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_the_kernel_for_gpus_gives_the_same_logits(
    heads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(make_model(tmp_path, num_key_value_heads=heads, hidden_size=64))
    rows = [row for seed in range(3) for row in make_rows(seed)]
    packed = pack([row.ids for row in rows], [row.loss_mask for row in rows])
    assert len(packed.ids) % FLEX_BLOCK  # so that there is padding
    found = []
    with torch.no_grad():
        for flex in (False, True):
            monkeypatch.setattr(attention, "flex_pays", lambda *_, flex=flex: flex)
            found.append(logits_before(model, packed)[0])
    assert float((found[0] - found[1]).abs().max()) < 1e-5


@pytest.mark.parametrize("seed", range(5))
def test_its_mask_skips_the_blocks_that_nothing_sees(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = 8 * FLEX_BLOCK
    parents = np.array([rng.integers(max(-1, i - 200), i) if rng.random() < 0.02 else i - 1
                        for i in range(n)])  # fmt: skip
    open_ends: list[int] = []
    ends = np.full(n, n)
    for i, parent in enumerate(parents):  # a forest in preorder: a parent is still open
        while open_ends and open_ends[-1] != parent and open_ends[-1] > parent:
            ends[open_ends.pop()] = i
        open_ends.append(i)
    query, key = np.arange(n)[:, None], np.arange(n)
    visible = (key <= query) & (query < ends[key])
    tiles = visible.reshape(8, FLEX_BLOCK, 8, FLEX_BLOCK)
    seen, whole = tiles.any((1, 3)), tiles.all((1, 3))
    mask = block_mask(ends, "cpu")
    parts = (
        (mask.kv_num_blocks, mask.kv_indices, seen & ~whole),
        (mask.full_kv_num_blocks, mask.full_kv_indices, whole),
        # of the gradient, by key block
        (mask.q_num_blocks, mask.q_indices, (seen & ~whole).T),
        (mask.full_q_num_blocks, mask.full_q_indices, whole.T),
    )
    for count, order, wanted in parts:
        for row in range(8):
            listed = order[0, 0, row, : count[0, 0, row]].tolist()
            assert listed == np.flatnonzero(wanted[row]).tolist()
