"""Tiny random models of many architectures: the learner computes what transformers computes for
each row alone, and what the embedded engine sampled from; or it refuses the model and says why.

Rows are ragged, share prefixes, and are longer than every window, chunk and scaled length here.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from rayrl.config import Config, EngineConfig
from rayrl.engine.embedded.engine import EmbeddedEngine
from rayrl.errors import ConfigError
from rayrl.learner.batch import Trajectory
from rayrl.learner.forward import load_model, token_logprobs
from rayrl.learner.logits import shares_prefixes
from rayrl.learner.packing import pack
from rayrl.learner.reference import ReferenceLearner
from rayrl.types import Request, Sampling
from tests.learner_rows import VOCABULARY, make_rows

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = 2e-5  # nats; of gradients, relative to the largest
POSITIONS = 64
LIMIT = 12  # of windows, chunks and original positions: below the longest row

BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GQA = {"num_key_value_heads": 2}
MOE = {**GQA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MAMBA2 = {"chunk_size": 8, "state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1}


def rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, "rope_type": kind, **settings}}


LONGROPE = {
    "original_max_position_embeddings": LIMIT,
    **rope("longrope", short_factor=[1.0] * 4, long_factor=[4.0] * 4, factor=4.0),
}


class Case(NamedTuple):
    """An architecture, how the learner computes its rows, and whether the embedded engine does."""

    kind: str  # of AutoConfig
    settings: dict[str, Any]
    trie: bool = True
    engine: bool = True
    max_len: int = 0  # engine.max_len


CASES = {
    # attention
    "multi-head, untied": Case("llama", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "grouped, tied": Case("llama", {**GQA, "tie_word_embeddings": True}),
    "multi-query": Case("llama", {"num_key_value_heads": 1}),
    "norm of queries": Case("qwen3", {**GQA, "head_dim": 8}),
    "biases": Case("qwen2", GQA),
    "parallel layers": Case("gpt_neox", {}),
    "partial rotary": Case("phi", GQA),
    "norms after layers": Case("olmo2", GQA),
    "scaled": Case("granite", {**GQA, "attention_multiplier": 0.3, "logits_scaling": 2.0}),
    "latent": Case(
        "deepseek_v3",
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "n_group": 2,
            "topk_group": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "num_key_value_heads": 4,
            "first_k_dense_replace": 1,
        },
        engine=False,
    ),
    "window": Case("mistral", {**GQA, "sliding_window": LIMIT}, trie=False, engine=False),
    "window, not reached": Case(
        "mistral", {**GQA, "sliding_window": LIMIT}, engine=False, max_len=LIMIT
    ),
    "window of some layers": Case(
        "gemma3_text", {**GQA, "head_dim": 8, "sliding_window": LIMIT}, trie=False, engine=False
    ),
    "window and no positions": Case(
        "cohere2", {**GQA, "sliding_window": LIMIT}, trie=False, engine=False
    ),
    "chunks": Case(
        "llama4_text",
        {
            **GQA,
            "attention_chunk_size": LIMIT,
            "floor_scale": 10,
            "attn_scale": 0.5,
            "head_dim": 8,
            "num_local_experts": 2,
            "intermediate_size_mlp": 48,
            "no_rope_layers": [1, 0],
        },
        trie=False,
        engine=False,
    ),
    "no attention backends": Case("stablelm", GQA, trie=False, engine=False),
    # positions
    "rope, linear": Case("llama", {**GQA, **rope("linear", factor=2.0)}),
    "rope, dynamic": Case("llama", {**GQA, **rope("dynamic", factor=2.0)}),
    "rope, yarn": Case(
        "llama", {**GQA, **rope("yarn", factor=4.0, original_max_position_embeddings=LIMIT)}
    ),
    "rope, llama3": Case(
        "llama",
        {
            **GQA,
            **rope(
                "llama3",
                factor=4.0,
                original_max_position_embeddings=LIMIT,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
            ),
        },
    ),
    "rope, longrope, short of the limit": Case("phi3", {**GQA, **LONGROPE}, max_len=LIMIT),
    "none in some layers": Case("smollm3", {**GQA, "no_rope_layers": [1, 0]}),
    "learned": Case("gpt2", {}),
    "learned, from the mask": Case("opt", {"ffn_dim": 48, "dropout": 0.1, "layerdrop": 0.5}),
    "alibi": Case("bloom", {}, trie=False, engine=False),
    # experts
    "experts": Case("qwen3_moe", {**MOE, "head_dim": 8}),
    "experts, jitter": Case(
        "mixtral",
        {**GQA, "num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.3},
    ),
    "dropout by function": Case(
        "starcoder2", {**GQA, "residual_dropout": 0.3, "embedding_dropout": 0.3}
    ),
    "dropout by module": Case("gpt_neox", {"hidden_dropout": 0.3, "attention_dropout": 0.3}),
    # other ways to mix tokens
    "convolutions": Case(
        "lfm2",
        {**GQA, "block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention"]},
        trie=False,
        engine=False,
    ),
    "state space": Case("mamba", {"state_size": 8}, trie=False, engine=False),
    "state space, in chunks": Case("mamba2", MAMBA2, trie=False, engine=False),
    "state space beside attention": Case(
        "bamba",
        {
            **GQA,
            "attn_layer_indices": [1],
            "mamba_chunk_size": 8,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "mamba_n_heads": 4,
        },
        trie=False,
        engine=False,
    ),
    "linear attention": Case(
        "qwen3_next",
        {
            **MOE,
            "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_key_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_value_head_dim": 8,
            "shared_expert_intermediate_size": 24,
        },
        trie=False,
        engine=False,
    ),
    "recurrence and a window": Case(
        "recurrent_gemma",
        {
            **GQA,
            "attention_window_size": LIMIT,
            "block_types": ["recurrent", "attention"],
            "head_dim": 8,
            "lru_width": 32,
        },
        trie=False,
        engine=False,
    ),
}
REFUSED = {
    "sinks": (Case("gpt_oss", {**GQA, "head_dim": 8, "num_local_experts": 4}), "attention sinks"),
    "soft-capping": (Case("gemma2", {**GQA, "head_dim": 8}), "soft-capping"),
    "longrope": (
        Case("phi3", {**GQA, **LONGROPE}),
        rf"beside a longer one.*engine\.max_len={LIMIT}$",
    ),
    "longrope, just reached": (
        Case("phi3", {**GQA, **LONGROPE}, max_len=LIMIT + 1),
        rf"engine\.max_len={LIMIT}$",
    ),
    "dynamic, beyond its positions": (
        Case("llama", {**GQA, **rope("dynamic", factor=2.0)}, max_len=2 * POSITIONS),
        rf"engine\.max_len={POSITIONS}$",
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Path]:
    """Writes the model of a case, once."""
    folders: dict[str, Path] = {}

    def save(case: Case) -> Path:
        key = repr(case[:2])
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("model")
            torch.manual_seed(0)
            config = AutoConfig.for_model(case.kind, **{**BASE, **case.settings})
            AutoModelForCausalLM.from_config(config).save_pretrained(folders[key])
        return folders[key]

    return save


def rows_of(case: Case) -> list[Trajectory]:
    longest = case.max_len or POSITIONS
    rows = [row for row in make_rows(0, groups=8) if len(row.ids) <= longest]
    assert case.max_len or max(len(row.ids) for row in rows) > LIMIT + 4
    return rows[:16]


def each_row(folder: Path, rows: Sequence[Trajectory]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Logprobs of the rows' loss tokens by transformers, row by row, and gradients of their sum."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    found = []
    for row in rows:
        ids = torch.from_numpy(row.ids.astype(np.int64))
        logprobs = model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
        chosen = logprobs[:-1].gather(1, ids[1:, None])[:, 0][torch.from_numpy(row.loss_mask[1:])]
        chosen.sum().backward()
        found.append(chosen.detach())
    return found, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def gap(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest difference of gradients, of the largest gradient."""
    assert found.keys() == wanted.keys()
    largest = max(float(one.abs().max()) for one in wanted.values())
    return max(float((found[name] - wanted[name]).abs().max()) for name in wanted) / largest


@pytest.mark.parametrize("name", CASES)
def test_the_learner_computes_what_each_row_has_alone(
    name: str, saved: Callable[[Case], Path]
) -> None:
    case = CASES[name]
    folder, rows = saved(case), rows_of(case)
    wanted, gradients = each_row(folder, rows)
    packed = pack([row.ids for row in rows], [row.loss_mask for row in rows])
    expected = torch.cat([wanted[i] for i in packed.order])
    model = load_model(folder, max_len=case.max_len)
    assert shares_prefixes(model) is case.trie
    own = "sdpa" if model._supports_sdpa else "eager"
    for attention in dict.fromkeys((model.config._attn_implementation, own)):
        model.config._attn_implementation = attention
        logprobs, _ = token_logprobs(model, packed, 1.0)
        assert (logprobs - expected).abs().max() < TOLERANCE
        model.zero_grad()
        logprobs.sum().backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert gap(found, gradients) < TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_rows_are_computed_the_same_way_in_bf16(name: str, saved: Callable[[Case], Path]) -> None:
    case = CASES[name]
    model = load_model(saved(case), dtype=torch.bfloat16, max_len=case.max_len)
    assert shares_prefixes(model) is case.trie


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.engine])
def test_the_learner_has_the_embedded_engines_logprobs(
    name: str, saved: Callable[[Case], Path]
) -> None:
    case = CASES[name]
    folder = saved(case)
    model = AutoModelForCausalLM.from_pretrained(folder)
    rows = asyncio.run(_played(EmbeddedEngine(model, EngineConfig(max_len=case.max_len))))
    config = Config(engine=EngineConfig(max_len=case.max_len))
    for row, logprobs in zip(rows, ReferenceLearner(config, folder).logprobs(rows), strict=True):
        assert np.abs(logprobs - row.rollout_logprobs).max() < TOLERANCE


async def _played(engine: EmbeddedEngine) -> list[Trajectory]:
    """Rows of conversations that begin alike, of turns until there is no room."""

    async def conversation(number: int) -> Trajectory:
        rng = random.Random(number)
        ids, mask, logprobs = [1, 2, 3, number % 2], [False] * 4, [0.0] * 4
        turn = 0
        while len(ids) + 1 < min(engine.max_len, 40):
            request = Request(f"s{number}", tuple(ids), Sampling(max_tokens=4), (), turn)
            answer = await engine.generate(request)
            ids += [*answer.ids, rng.randrange(VOCABULARY)]
            mask += [True] * len(answer.ids) + [False]
            logprobs += [*answer.rollout_logprobs, 0.0]
            turn += 1
        length = min(len(ids), engine.max_len)
        arrays = np.array(ids, np.int32), np.array(mask), np.array(logprobs, np.float32)
        ids_, mask_, old = (one[:length] for one in arrays)
        return Trajectory(ids_, mask_, old, mask_.astype(np.float32))

    try:
        return await asyncio.gather(*map(conversation, range(4)))
    finally:
        await engine.close()


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_learner_would_compute_otherwise_is_refused(
    name: str, saved: Callable[[Case], Path]
) -> None:
    case, said = REFUSED[name]
    with pytest.raises(ConfigError, match=said):
        load_model(saved(case), max_len=case.max_len)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.engine])
def test_what_the_embedded_engine_cannot_run_is_refused(
    name: str, saved: Callable[[Case], Path]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved(CASES[name]))
    with pytest.raises(ConfigError, match=r"^model\.path: "):
        EmbeddedEngine(model, EngineConfig(max_len=CASES[name].max_len))


def test_the_embedded_engine_runs_longrope_short_of_its_limit_only(
    saved: Callable[[Case], Path],
) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved(REFUSED["longrope"][0]))
    for max_len in (0, LIMIT + 1):
        with pytest.raises(ConfigError, match=rf"engine\.max_len <= {LIMIT}\b"):
            EmbeddedEngine(model, EngineConfig(max_len=max_len))


def test_learned_positions_end_where_the_table_does(saved: Callable[[Case], Path]) -> None:
    folder = saved(CASES["learned"])
    learner = ReferenceLearner(Config(engine=EngineConfig(max_len=2 * POSITIONS)), folder)
    longest, longer = (
        Trajectory(np.arange(n) % 9, np.arange(n) > 3, *[np.zeros(n, np.float32)] * 2)
        for n in (POSITIONS, POSITIONS + 1)
    )
    assert learner.logprobs([longest])
    with pytest.raises(ConfigError, match=rf"a row has {POSITIONS + 1} ids.*have {POSITIONS};"):
        learner.logprobs([longer])
