"""Models that mix tokens by more than attention compute whole rows, and the same numbers."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import flex_attention
from transformers import AutoConfig, AutoModelForCausalLM, Lfm2Config, Lfm2ForCausalLM

from rayrl.config import Config, LearnerConfig
from rayrl.learner import attention
from rayrl.learner.attention import FLEX_BLOCK, IMPLEMENTATION, block_mask
from rayrl.learner.batch import batch_of
from rayrl.learner.forward import load_model
from rayrl.learner.logits import logits_before, shares_prefixes
from rayrl.learner.packing import pack
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


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention on the CPU, with gradients, which torch has but does not let be asked for."""
    warnings.filterwarnings("ignore", message=".*flex_attention called without torch.compile")
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    monkeypatch.setattr(attention, "FLEX", {"cpu"})


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(("dtype", "apart"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("width", [8, 16], ids=["narrow heads", "heads"])
def test_the_kernel_for_gpus_gives_the_same_logprobs_and_gradients(
    heads: int,
    width: int,
    dtype: torch.dtype,
    apart: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = make_model(tmp_path, num_key_value_heads=heads, hidden_size=4 * width)
    model = load_model(folder).to(dtype)
    rows = [row for seed in range(3) for row in make_rows(seed)]
    packed = pack([row.ids for row in rows], [row.loss_mask for row in rows])
    assert len(packed.ids) % FLEX_BLOCK  # so that there is padding
    weights = torch.from_numpy(np.random.default_rng(0).normal(size=len(packed.target))).to(dtype)
    found = []
    for flex in (False, True):
        monkeypatch.setattr(attention, "flex_pays", lambda *_, flex=flex: flex)
        logits, slot = logits_before(model, packed)
        logprobs = logits.log_softmax(-1)[slot, torch.from_numpy(packed.target)]
        gradients = torch.autograd.grad(logprobs @ weights, list(model.parameters()))
        found.append((logprobs, *gradients))
    for gathered, kernel in zip(*found, strict=True):
        largest = gathered.detach().abs().max()
        assert (gathered - kernel).detach().abs().max() <= apart * largest


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("kind", ["mistral", "gemma3_text", "cohere2"])
def test_rows_beyond_a_window_share_prefixes_with_the_kernel(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = AutoConfig.for_model(
        kind,
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        initializer_range=0.2,
        sliding_window=12,
        layer_types=["sliding_attention", "full_attention"],
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    rows = [row for seed in range(3) for row in make_rows(seed)]
    packed = pack([row.ids for row in rows], [row.loss_mask for row in rows])
    assert packed.lengths.max() > 16
    found = []
    for devices in ({"cpu"}, set()):
        monkeypatch.setattr(attention, "FLEX", devices)
        model = load_model(tmp_path)
        assert shares_prefixes(model) == bool(devices)
        with torch.no_grad():
            logits, slot = logits_before(model, packed)
        found.append(logits.log_softmax(-1)[slot])
    assert float((found[0] - found[1]).abs().max()) < 2e-5


@pytest.mark.parametrize("window", [100, 300])
@pytest.mark.parametrize("seed", range(3))
def test_its_windows_hide_only_what_is_too_far(seed: int, window: int) -> None:
    rng = np.random.default_rng(seed)
    prompt = rng.integers(0, 9, 150)
    rows = [np.append(prompt, rng.integers(0, 9, n)) for n in rng.integers(50, 400, 4)]
    packed = pack(rows, [np.arange(len(row)) > 0 for row in rows])
    n = len(packed.ids) // FLEX_BLOCK * FLEX_BLOCK
    ends, depth = np.minimum(packed.ends[:n], n), packed.positions[:n]
    query, key = np.arange(n)[:, None], np.arange(n)
    visible = (key <= query) & (query < ends[key]) & (depth[:, None] - depth < window)
    mask = block_mask(ends, "cpu", depth, window)
    every = torch.arange(n)
    computed = mask.mask_mod(0, 0, every[:, None], every).numpy()
    size = n // FLEX_BLOCK
    tiles = np.zeros((2, size, size), bool)  # those computed with the mask, and without
    for tile, count, order in zip(
        tiles,
        (mask.kv_num_blocks, mask.full_kv_num_blocks),
        (mask.kv_indices, mask.full_kv_indices),
        strict=True,
    ):
        for row in range(size):
            tile[row, order[0, 0, row, : count[0, 0, row]]] = True
    partial, whole = np.kron(tiles, np.ones((FLEX_BLOCK, FLEX_BLOCK), bool))
    assert not (partial & whole).any()
    assert not (partial | whole).all()
    assert np.array_equal((partial & computed) | whole, visible)


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
